"""The files of a training stage: best.pt, last.pt, time.json; training goes on while a full disk refuses them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from kestrel.errors import KestrelError
from kestrel.store import checkpoint
from kestrel.store.atomic import disk_error, read_json, remove_stale, write_json

BEST, LAST, TIME, NONFINITE = "best.pt", "last.pt", "time.json", "nonfinite.pt"
Standing = tuple[int, float]  # (correct validation clips, -validation loss), or (step, 0): larger is better
NOTHING: Standing = (-1, -math.inf)
Keep = Literal["best", "last"]


def standing(correct: int, loss: float, step: int = 0, keep: Keep = "best") -> Standing:
    """What candidates are compared by: accuracy, then lower loss; or the step, where the last one is kept."""
    return (correct, -loss) if keep == "best" else (step, 0.0)


def prepare_folder(out_dir: Path) -> None:
    """Make the folder and remove what a killed save left in it. Raises KestrelError where it cannot be written."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_stale(out_dir)
    except OSError as error:
        raise disk_error(out_dir, error) from None


def load_resumable(out_dir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state in last.pt, or None where there is none.

    Raises KestrelError where last.pt or best.pt is damaged or was trained with another configuration.
    """
    state = None
    for name in (BEST, LAST):
        path = out_dir / name
        if not path.exists():
            continue
        state = checkpoint.load(path)
        theirs = state.get("identity")
        if not isinstance(theirs, dict) or theirs.get("config_hash") != identity.get("config_hash"):
            raise KestrelError(
                f"{path} is of another configuration: restore that to continue, or start anew with --force"
            )
        if name == LAST and "optimizer" not in state:
            raise KestrelError(f"{path} does not hold the state of a training: remove it and start anew with --force")
    if not (out_dir / LAST).exists() or state is None:
        return None
    if state["best"] is not None and not (out_dir / BEST).exists():
        raise KestrelError(f"{out_dir / BEST} is missing beside {LAST}: start anew with --force")
    return state


class Keeper:
    """Writes checkpoints; a failure is raised only while there is no older last.pt, and at the end."""

    def __init__(self, out_dir: Path, identity: dict[str, Any], log: logging.Logger, which: Keep = "best") -> None:
        self.out_dir, self.identity, self.log, self.which = out_dir, identity, log, which
        self.best, self.last = out_dir / BEST, out_dir / LAST
        self._pending: dict[str, Any] | None = None
        self._failures: dict[str, KestrelError] = {}
        # A killed run may leave a best.pt newer than its last.pt. It is only ever replaced by a better one.
        self._kept = NOTHING
        if self.best.exists():
            self._kept = self._standing(checkpoint.load(self.best)["metrics"])
        clock = read_json(out_dir / TIME) if (out_dir / TIME).exists() else {}
        self._seconds, self._starts = float(clock.get("train_seconds", 0.0)), int(clock.get("starts", 0)) + 1

    def _standing(self, metrics: dict[str, Any]) -> Standing:
        correct, loss = metrics["validation_correct"], metrics["validation_loss"]
        return standing(correct, loss, metrics.get("step", 0), self.which)

    def offer(self, model: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Write best.pt if this candidate is strictly better than the one on disk."""
        candidate = self._standing(metrics)
        if candidate > self._kept:
            self._kept = candidate
            self._pending = checkpoint.snapshot({"model": model, "identity": self.identity, "metrics": metrics})
            self.attempt(BEST, self._write_best)

    def keep(self, state: dict[str, Any], seconds: float) -> None:
        """Write last.pt and the training time (`seconds` of this start)."""

        def write() -> None:
            checkpoint.save(self.last, {**state, "identity": self.identity})
            clock = {"train_seconds": round(self._seconds + seconds, 3), "starts": self._starts}
            write_json(self.out_dir / TIME, clock)

        if self._pending is not None:
            self.attempt(BEST, self._write_best)
        if self._pending is None:  # else last.pt would know of a best one that is nowhere on disk
            self.attempt(LAST, write)

    def attempt(self, name: str, write: Callable[[], None]) -> None:
        """Write the file `name`. A failure is raised where there is no last.pt yet, else logged and remembered."""
        try:
            write()
            if self._failures.pop(name, None) is not None:
                self.log.info("%s is written again", name)
        except (KestrelError, OSError) as error:
            failure = error if isinstance(error, KestrelError) else disk_error(self.out_dir / name, error)
            said = name in self._failures
            self._failures[name] = failure
            if not self.last.exists():
                raise failure from None
            if not said:
                self.log.error("%s (training goes on with the older file, each save tries again)", failure)

    def raise_failure(self) -> None:
        """Raise what a file's last write failed with, if one did."""
        for failure in self._failures.values():
            raise failure

    def put_aside(self, content: dict[str, Any]) -> Path | None:
        """Write nonfinite.pt for a look at what went wrong; None where even that fails."""
        try:
            checkpoint.save(self.out_dir / NONFINITE, {**content, "identity": self.identity})
        except (KestrelError, OSError) as error:
            self.log.error("%s", error)
            return None
        return self.out_dir / NONFINITE

    def _write_best(self) -> None:
        if self._pending is not None:
            checkpoint.save(self.best, self._pending)
            self._pending = None
