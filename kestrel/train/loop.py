"""The one training loop: phases, validation, best and last checkpoints, exact resume.

Everything random in update number k is drawn from generators started from (seed, stage, k, process), as the order of
clips and their augmentation are keyed by (seed, epoch, row). A run that is stopped at any batch and started again
therefore repeats what a straight run does, on the CPU bit by bit, without generator states in its checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from kestrel.errors import KestrelError, RunAgain
from kestrel.models.spotter import KeywordSpotter
from kestrel.store import checkpoint
from kestrel.train.curves import draw_curves
from kestrel.train.data import Batch, Split
from kestrel.train.device import choose_device, keep_memory, seed_generator
from kestrel.train.history import Row, Running, write_metrics
from kestrel.train.keeper import BEST, LAST, NOTHING, Keeper, Standing, load_resumable, prepare_folder, standing
from kestrel.train.optimizer import make_optimizer, undecayed
from kestrel.train.ranks import Ranks
from kestrel.train.schedule import phase_steps, schedule
from kestrel.train.search import Search, search_of
from kestrel.train.signals import StopFlag
from kestrel.train.spec import PhaseSpec, TrainSpec
from kestrel.train.validation import Evaluation, evaluate

METRICS, CURVES = "metrics.csv", "curves.png"
CURVES_SECONDS = 30.0  # least time between two drawings of the curves
_SHOWN = 5  # utterance ids in an error

ProgressCallback = Callable[[int, int, str], None]


@dataclass
class Job:
    """One training stage.

    `phase` holds its length, optimiser and learning rates, `train` what both stages share. `identity` is plain data
    kept in the checkpoints (recipe, variant, classes, model settings, ...); its `config_hash` decides whether a
    checkpoint in `out_dir` may be continued.
    """

    stage: Literal["pretrain", "retrain"]
    phase: PhaseSpec
    train: TrainSpec
    seed: int
    out_dir: Path
    identity: dict[str, Any]

    @property
    def section(self) -> str:
        """The section of the configuration that `phase` comes from."""
        return "train" if self.stage == "pretrain" else "retrain"


@dataclass(frozen=True)
class Result:
    """What a finished stage leaves: its files, validation accuracy (0-1) and loss of the best, updates made, and the
    seconds of this start (time.json has those of all starts)."""

    best: Path
    last: Path
    best_accuracy: float
    best_loss: float
    steps: int
    seconds: float


def train(
    job: Job,
    spotter: KeywordSpotter,
    train: Split,
    validation: Split,
    log: logging.Logger | None = None,
    progress: ProgressCallback | None = None,
    stop: StopFlag | None = None,
) -> Result:
    """Train `spotter` (its `post` fitted, its weights the initial ones) and keep what scores best on `validation`.

    Writes best.pt, last.pt, metrics.csv, curves.png and time.json into `job.out_dir`, and continues from a last.pt
    found there. In stage retrain the initial weights are the first candidate, so that the result is never worse than
    them. `progress(done, total, text)` is called for each batch. `stop` may be entered earlier by the caller.

    Raises UsageError for settings that do not fit together; RunAgain after SIGTERM, SIGUSR1 or SIGINT, with the state
    saved; KestrelError where the loss is not finite, where a file cannot be written, and where last.pt belongs to
    another configuration.
    """
    if "config_hash" not in job.identity:
        raise ValueError("the identity of a job needs a config_hash")
    if train.classes != validation.classes:
        raise KestrelError(f"{train.name} and {validation.name} have different classes: make both from one protocol")
    if train.shape != validation.shape:
        raise KestrelError(
            f"{train.name} has features {train.shape}, {validation.name} {validation.shape} (frames, width): "
            "make both with one front end"
        )
    device = choose_device(job.train.device)
    if job.train.threads is not None:
        torch.set_num_threads(job.train.threads)
    if device.type == "cpu":
        keep_memory()
    log = logging.getLogger("kestrel") if log is None else log
    with StopFlag() if stop is None else stop as flag, Ranks(device) as ranks:
        training = _Training(job, spotter, train, validation, ranks, flag, log, progress)
        training.restore()
        training.run()
        return training.finish()


class _Training:
    """State of a running stage. `step` counts the updates made; epoch and batch follow from it."""

    def __init__(
        self,
        job: Job,
        spotter: KeywordSpotter,
        train: Split,
        validation: Split,
        ranks: Ranks,
        stop: StopFlag,
        log: logging.Logger,
        progress: ProgressCallback | None,
    ) -> None:
        self.job, self.ranks, self.stop, self.log, self.progress = job, ranks, stop, log, progress
        self.device = ranks.device
        self.spotter = spotter.to(self.device)
        self.split, self.validation = train.to(self.device), validation.to(self.device)
        self.per_epoch = spotter.net.updates_per_epoch = train.batches_per_epoch
        self.total = phase_steps(job.phase, self.per_epoch, job.section)
        self.rate = schedule(job.phase, self.total, job.section, self.per_epoch)
        self.search: Search | None = search_of(self.spotter, self.validation, job, self.total, ranks, log)
        if self.search is not None:  # statistics of a batch need clips of all classes, files are often sorted by class
            self.validation = self.search.mixed(self.validation)
        apart = {id(parameter) for parameter in self.search.parameters} if self.search is not None else set()
        self.parameters: list[Tensor] = [
            parameter for parameter in spotter.parameters() if parameter.requires_grad and id(parameter) not in apart
        ]
        if not self.parameters:
            raise KestrelError("the network has no trainable parameters")
        self.optimizer = make_optimizer(job.phase, self.parameters, self.device, undecayed(spotter, job.phase))
        self.keeper: Keeper | None = None

        self.step = 0
        self.history: list[Row] = []
        self.running = Running()
        self.best: Standing = NOTHING
        self.best_accuracy = 0.0

        self.started = self.saved = time.monotonic()
        self.saved_step: int | None = None
        self.drawn = -math.inf
        self.first_step = 0  # of this start
        self.learning = 0.0  # seconds of updates since the last validation
        self.learned = 0  # clips of these updates
        self.votes = 0.0  # processes that were asked to stop

    # ------------------------------------------------------------------------------------------- saving and resuming

    def state(self) -> dict[str, Any]:
        """What last.pt holds."""
        return {
            "stage": self.job.stage,
            "step": self.step,
            "epoch": self.step // self.per_epoch,
            "batch": self.step % self.per_epoch,
            "total": self.total,
            "clips": len(self.split),
            "batch_size": self.split.batch_size,
            "model": self.spotter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({} if self.search is None else {"search": self.search.state()}),
            "history": self.history,
            "running": self.running.state(),
            "best": None if self.best == NOTHING else {"standing": self.best, "accuracy": self.best_accuracy},
        }

    def restore(self) -> None:
        """Continue from last.pt, or begin."""
        job = self.job
        self.ranks.on_first(lambda: prepare_folder(job.out_dir))
        state = self.ranks.on_first(lambda: load_resumable(job.out_dir, job.identity))
        if self.ranks.first:
            self.keeper = Keeper(job.out_dir, job.identity, self.log, job.phase.keep)
        if state is None:
            self.ranks.equalise([*self.spotter.parameters(), *self.spotter.buffers()])
            self.log.info("%s: %s", job.stage, self._plan())
        else:
            self._load(state)
            self.log.info("%s: continues at step %d of %d", job.stage, self.step, self.total)
        self._training_phase()
        self.first_step = self.step
        if state is None:
            self.save()

    def _load(self, state: dict[str, Any]) -> None:
        last, section = self.job.out_dir / LAST, self.job.section
        mine = (self.job.stage, len(self.split), self.split.batch_size)
        if (state["stage"], state["clips"], state["batch_size"]) != mine:
            raise KestrelError(
                f"{last} is of {state['stage']} on {state['clips']} clips in batches of {state['batch_size']}, this is "
                f"{mine[0]} on {mine[1]} in batches of {mine[2]}: start anew with --force"
            )
        self.step = state["step"]
        if self.step > self.total:
            raise KestrelError(
                f"{last} is at step {self.step}, past the end at {self.total}: raise {section}.epochs (or .steps)"
                " or start anew with --force"
            )
        if not self.rate.agrees(schedule(self.job.phase, state["total"], section, self.per_epoch), self.step):
            raise KestrelError(
                f"{last} was trained for a length of {state['total']} steps and its learning rates depend on it:"
                " restore the length, or start anew with --force"
            )
        fused = [group.get("fused") for group in self.optimizer.param_groups]
        try:
            self.spotter.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.search is not None:
                self.search.load(state["search"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise KestrelError(f"{last} does not fit the network ({reason}): start anew with --force") from None
        for group, value in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = value  # the device may have changed
        self.history = state["history"]
        for row in self.history:
            self._observe(row["step"], row["validation_loss"])
        self.running = Running(state["running"])
        if state["best"] is not None:
            self.best, self.best_accuracy = tuple(state["best"]["standing"]), state["best"]["accuracy"]

    def save(self) -> None:
        """Write last.pt (in the first process)."""
        if self.keeper is not None:
            self.keeper.keep(self.state(), time.monotonic() - self.started)
        self.saved, self.saved_step = time.monotonic(), self.step

    def leave(self) -> NoReturn:
        """Save and ask to be run again."""
        self.save()
        if self.keeper is not None:
            self.keeper.raise_failure()
        asked = self.stop.signal or "another process"
        raise RunAgain(f"stopped by {asked} at step {self.step} of {self.total}, the state is saved")

    # ----------------------------------------------------------------------------------------------------- training

    def run(self) -> None:
        """All batches and validations that are left."""
        self.validate_if_due()
        while self.step < self.total:
            epoch, batch_number = divmod(self.step, self.per_epoch)
            batches = self.split.batches(epoch, batch_number, self.ranks.rank, self.ranks.world)
            with contextlib.closing(batches):
                for batch in batches:
                    if self._stopping():
                        self.leave()
                    began = time.monotonic()
                    self.update(batch)
                    if self.search is not None:
                        self.search.after_update(self.step)
                    self.learning += time.monotonic() - began
                    self._show_progress()
                    self.validate_if_due()
                    self._save_if_due()
                    if self.step == self.total:
                        break

    def update(self, batch: Batch) -> None:
        """One optimiser step on this process's share of a batch. Raises KestrelError where a number is not finite."""
        start = self.step % self.per_epoch * self.split.batch_size
        size = min(self.split.batch_size, len(self.split) - start)  # clips of the batch in all processes
        self.ranks.equalise(self.spotter.buffers() if self.ranks.world > 1 else ())
        seed_generator(self.device, "update", self.job.seed, self.job.stage, self.step, self.ranks.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        names, values = self._gradients(batch, len(batch.labels) / size)
        values = self.ranks.sum_gradients(self.parameters, values)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        *sums, norm = torch.cat([values, _norm(gradients).to(values)]).tolist()  # the one wait for the device
        loss_sum, correct, self.votes, *penalties = sums
        if not all(map(math.isfinite, (loss_sum, norm, *penalties))):
            self.abort("loss" if not math.isfinite(loss_sum + sum(penalties)) else "gradient")
        limit = self.job.phase.grad_clip
        if 0 < limit < norm:
            for gradient in gradients:
                gradient.mul_(limit / norm)
        self.optimizer.step()
        with torch.no_grad():
            self.spotter.net.project()
        self.running.add(size, round(correct), loss_sum, dict(zip(names, penalties, strict=True)))
        self.step += 1
        self.learned += size

    def _gradients(self, batch: Batch, share: float) -> tuple[list[str], Tensor]:
        """Gradients of `share` times the mean loss of the batch; names of the penalties; sums for `update`.

        The sums are cross-entropy, correct clips, votes to stop, and the penalties times `share`.
        """
        stop = 1.0 if self.stop else 0.0
        if share == 0:  # a short batch left this process without a clip
            with torch.no_grad():
                names = list(self.spotter.net.penalty())
            return names, torch.tensor([0.0, 0.0, stop, *(0.0 for _ in names)], device=self.device)
        logits = self.spotter(batch.features)  # [B, T, F] -> [B, C]
        cross_entropy = functional.cross_entropy(logits, batch.labels, label_smoothing=self.job.phase.label_smoothing)
        penalty = self.spotter.net.penalty()
        loss = cross_entropy
        for term in penalty.values():
            loss = loss + term
        (loss if share == 1 else loss * share).backward()
        with torch.no_grad():
            correct = (logits.argmax(1) == batch.labels).sum()
            sums = [cross_entropy * len(batch.labels), correct, torch.tensor(stop, device=self.device)]
            sums += [term * share for term in penalty.values()]
            return list(penalty), torch.stack([value.detach().float().reshape(()) for value in sums])

    def abort(self, what: str) -> NoReturn:
        """Stop because of a number that is not finite: name the clips, put the weights aside."""
        epoch, number = divmod(self.step, self.per_epoch)
        message = f"the {what} is not finite at step {self.step + 1} (epoch {epoch + 1}, batch {number + 1})"
        if self.keeper is not None:
            with contextlib.closing(self.split.batches(epoch, number)) as batches:
                batch = next(batches)
            ids = self.split.utt_ids(batch.rows)
            broken = (~torch.isfinite(batch.features).all(-1).all(-1)).cpu().numpy()
            if broken.any():
                names = self.split.utt_ids(batch.rows[broken])
                message += f", where features of {_some(names)} are not finite: make them again"
            else:
                message += f", with {_some(ids)}: lower {self.job.section}.lr, or set {self.job.section}.grad_clip"
            aside = {"model": self.spotter.state_dict(), "step": self.step, "rows": batch.rows.tolist(), "utt_ids": ids}
            path = self.keeper.put_aside(aside)
            if path is not None:
                message += f"; the weights before it are in {path}"
        raise KestrelError(message)

    # --------------------------------------------------------------------------------------------------- validation

    def validate_if_due(self) -> None:
        """Validate every `validate_every` batches or each epoch, at the end, and initial weights of a retraining."""
        every = self.job.phase.validate_every or self.per_epoch
        at_start = self.step == 0 and self.job.stage == "retrain"
        due = at_start or self.step == self.total or (self.step > 0 and self.step % every == 0)
        if not due or (self.history and self.history[-1]["step"] == self.step):
            return
        began = time.monotonic()
        seed = self.job.seed
        found = self.ranks.on_first(lambda: evaluate(self.spotter, self.validation, seed, self.device, self.stop))
        if found is None:
            self.leave()
        self._training_phase()
        if not math.isfinite(found.loss_sum):
            self._abort_validation()
        self._record(found, time.monotonic() - began)
        self.save()

    def _abort_validation(self) -> NoReturn:
        message = f"the validation loss is not finite at step {self.step}: lower {self.job.section}.lr"
        if self.keeper is not None:
            path = self.keeper.put_aside({"model": self.spotter.state_dict(), "step": self.step})
            message += f"; the weights are in {path}" if path is not None else ""
        raise KestrelError(message)

    def _record(self, found: Evaluation, seconds: float) -> None:
        """Note a validation in the history, the pictures and the log; keep the weights if they are the best so far."""
        where = {
            "step": self.step,
            "epoch": round(self.step / self.per_epoch, 4),
            "phase": self.job.stage,
            "lr": self.rate(max(self.step - 1, 0)),
        }
        measured = {"validation_loss": found.loss, "validation_accuracy": found.accuracy}
        trained = self.running.row()
        self.history.append(where | trained | measured)
        self._observe(self.step, found.loss)
        self.running = Running()
        reached = standing(found.correct, found.loss, self.step, self.job.phase.keep)
        better = reached > self.best
        if better:
            self.best, self.best_accuracy = reached, found.accuracy
        if self.keeper is not None:
            if better:
                counts = {"validation_correct": found.correct, "validation_clips": found.clips}
                self.keeper.offer(self.spotter.state_dict(), where | trained | measured | counts)
            self._write_pictures(at_most_every=CURVES_SECONDS)
            self.log.info("%s", self._line(trained, found, better, seconds))
        if self.search is not None:
            self.search.record(self.step, found, self.keeper)
        self.learning, self.learned = 0.0, 0

    def _observe(self, step: int, loss: float) -> None:
        """Tell the learning rate of a validation; the one before the first update is none of this training."""
        if step:
            self.rate.observe(loss)

    def _write_pictures(self, at_most_every: float) -> None:
        """metrics.csv, and curves.png where it was not drawn for that many seconds."""
        if self.keeper is None:
            return
        out_dir, rows = self.job.out_dir, self.history
        self.keeper.attempt(METRICS, lambda: write_metrics(out_dir / METRICS, rows))
        if time.monotonic() - self.drawn >= at_most_every:
            title = " ".join(str(self.job.identity[key]) for key in ("recipe", "tag") if key in self.job.identity)
            title = f"{title} {self.job.stage}".strip()
            self.keeper.attempt(CURVES, lambda: draw_curves(out_dir / CURVES, rows, title))
            self.drawn = time.monotonic()
            if self.search is not None:
                self.search.draw(self.keeper)

    def finish(self) -> Result:
        """Write what is left to write. Raises KestrelError where a file could not be written to the end."""
        if self.saved_step != self.step and self.step > self.first_step:
            self.save()
        self._write_pictures(at_most_every=0.0)
        if self.keeper is not None:
            self.keeper.raise_failure()
        best = self.job.out_dir / BEST
        metrics = self.ranks.on_first(lambda: checkpoint.load(best)["metrics"])
        return Result(
            best,
            self.job.out_dir / LAST,
            metrics["validation_accuracy"],
            metrics["validation_loss"],
            self.step,
            time.monotonic() - self.started,
        )

    # ------------------------------------------------------------------------------------------------------ helpers

    def _save_if_due(self) -> None:
        minutes = (time.monotonic() - self.saved) / 60
        if minutes >= self.job.train.save_minutes and self.saved_step != self.step:
            self.save()

    def _stopping(self) -> bool:
        """Whether to stop here; several processes stop at the same batch, the one after any of them was asked to."""
        return bool(self.stop) if self.ranks.world == 1 else self.votes > 0

    def _training_phase(self) -> None:
        """Switch the network to this stage; what it draws on the way is the same whenever that happens."""
        seed_generator(self.device, "phase", self.job.seed, self.job.stage)
        self.spotter.train()
        self.spotter.net.set_phase(self.job.stage)

    def _show_progress(self) -> None:
        if self.progress is None or not self.ranks.first:
            return
        epochs = -(-self.total // self.per_epoch)
        text = f"epoch {(self.step - 1) // self.per_epoch + 1}/{epochs}"
        text += f"  loss {self.running.loss / self.running.clips:.3f}"
        text += f"  accuracy {100 * self.running.correct / self.running.clips:.1f} %"
        if self.best != NOTHING and self.job.phase.keep == "best":
            text += f"  best {100 * self.best_accuracy:.2f} %"
        self.progress(self.step, self.total, text)

    def _plan(self) -> str:
        phase, epochs = self.job.phase, self.total / self.per_epoch
        weights = sum(parameter.numel() for parameter in self.parameters)
        text = f"{self.total:,} steps of {self.split.batch_size} clips ({epochs:.4g} epochs of {len(self.split):,})"
        processes = f", {self.ranks.world} processes" if self.ranks.world > 1 else ""
        return f"{text}, {phase.optimizer}, {weights:,} trainable parameters, on {self.device}{processes}"

    def _line(self, trained: Row, found: Evaluation, better: bool, seconds: float) -> str:
        text = f"step {self.step:,}/{self.total:,}  epoch {self.step / self.per_epoch:.4g}"
        text += f"  lr {self.rate(max(self.step - 1, 0)):.3g}"
        if trained:
            text += f"  train loss {trained['train_loss']:.4f} accuracy {100 * trained['train_accuracy']:.2f} %"
        text += f"  validation loss {found.loss:.4f} accuracy {100 * found.accuracy:.2f} %{' (best)' if better and self.job.phase.keep == 'best' else ''}"
        if self.learning > 0:
            text += f"  {self.learned / self.learning:,.0f} clips/s"
        done = self.step - self.first_step
        if done and self.step < self.total:
            elapsed = time.monotonic() - self.started
            text += f"  ETA {_clock(elapsed / done * (self.total - self.step))}"
        return text


def _norm(gradients: list[Tensor]) -> Tensor:
    """2-norm of all gradients together, [1]."""
    if not gradients:
        return torch.zeros(1)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients])).reshape(1)


def _some(names: list[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more clips" if len(names) > _SHOWN else shown


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
