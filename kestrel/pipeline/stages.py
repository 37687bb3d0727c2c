"""The stages: what each reads, writes and depends on, and whether it is up to date.

A stage leaves `.done.json` last in its folder: the settings and inputs that it depended on, its outputs with their
hashes, and an id made of these hashes, which later stages record as their input.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError
from kestrel.frontend.spec import stored
from kestrel.pipeline.config import Config
from kestrel.settings import to_dict
from kestrel.store.atomic import read_json, write_json
from kestrel.store.hashing import sha256_file, sha256_json

SPLITS = ("train", "validation", "test")
# Settings that may change without a new start: they change how fast a result comes, not the result.
FREE_TRAIN = ("workers", "threads", "device", "save_minutes", "processes", "eval_batch_size")
LENGTH = ("epochs", "steps")


@dataclass(frozen=True)
class Stage:
    """One numbered stage."""

    number: int
    name: str
    does: str


STAGES = (
    Stage(0, "download", "get the corpus: download, synthesise, or note where the user's folder is"),
    Stage(1, "prepare", "check every clip, write the manifests of the protocol"),
    Stage(2, "feature", "pack the audio, compute features into HDF5 files"),
    Stage(3, "pretrain", "train the network (dense or noise-free phase)"),
    Stage(4, "retrain", "train on with what the hardware does to it (noise, deltas, few bits)"),
    Stage(5, "score", "accuracy with interval, pictures, report"),
    Stage(6, "export", "files for deployment, checked against the trained network"),
)
BY_NAME = {stage.name: stage for stage in STAGES}


@dataclass
class Run:
    """A resolved run: its root, its experiment folder and its configuration."""

    root: Path
    exp: Path
    config: Config
    nproc: int = 1
    force: bool = False

    @property
    def raw(self) -> Path:
        """Folder of the raw audio (or of the pointer to it)."""
        assert self.config.corpus is not None
        return self.root / "data" / self.config.corpus.name / "raw"

    @property
    def manifests(self) -> Path:
        """Folder of the protocol's manifests."""
        assert self.config.corpus is not None
        return self.root / "data" / self.config.corpus.name / self.config.protocol_name

    @property
    def packs(self) -> Path:
        """Folder of the packed audio."""
        assert self.config.corpus is not None
        return self.root / "feat" / self.config.corpus.name / self.config.protocol_name / "audio"

    @property
    def features(self) -> Path:
        """Folder of the feature files."""
        if self.config.feat_dir is not None:
            return self.root / self.config.feat_dir
        assert self.config.corpus is not None and self.config.frontend is not None
        return self.packs.parent / self.config.frontend.name

    def out(self, stage: str) -> Path:
        """The folder that a stage writes."""
        folders = {"download": "raw", "prepare": "manifests", "feature": "features"}
        return getattr(self, folders[stage]) if stage in folders else self.exp / stage

    def checkpoint(self) -> tuple[str, Path]:
        """(name, path) of the checkpoint that score and export take."""
        if self.config.checkpoint is not None:
            return "checkpoint", self.root / self.config.checkpoint
        stage = "retrain" if self.config.retrain is not None else "pretrain"
        if (
            stage == "retrain"
            and not done_file(self.out("retrain")).exists()
            and not (self.out("retrain") / "best.pt").exists()
        ):
            stage = "pretrain"
        return stage, self.out(stage) / "best.pt"


@dataclass
class Status:
    """What running a stage would do, and why."""

    action: str  # "absent", "skip", "run", "resume", "extend", "blocked", "refused"
    reason: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


def done_file(folder: Path) -> Path:
    """The done-marker of a stage folder."""
    return folder / ".done.json"


def started_file(folder: Path) -> Path:
    """What an unfinished training stage was started with."""
    return folder / ".started.json"


def _without(data: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def settings_of(run: Run, stage: str) -> dict[str, Any]:
    """The part of the configuration that a stage depends on."""
    config = run.config

    def section(value: Any) -> Any:
        if value is None:
            return None
        settings, added = to_dict(value), getattr(value, "ADDED_LATER", ())
        defaults = to_dict(type(value)()) if added else {}
        return {key: item for key, item in settings.items() if key not in added or item != defaults[key]}

    if stage == "download":
        return {"corpus": section(config.corpus)}
    if stage == "prepare":
        return {"protocol": section(config.protocol)}
    if stage == "feature":
        return {"frontend": None if config.frontend is None else stored(config.frontend)}
    network = {
        "recipe": config.recipe,
        "seed": config.seed,
        "classes": config.classes,
        "post": config.feature.post,
        "augment": section(config.augment),
        "model": section(config.model),
    }
    train = _without(section(config.train), FREE_TRAIN)
    if stage == "pretrain":
        return {**network, "train": train}
    if stage == "retrain":
        phase = None if config.retrain is None else _without(section(config.retrain), ("start",))  # that is an input
        return {**network, "batch_size": config.train.batch_size, "train": phase}
    shared = {
        "recipe": config.recipe,
        "variant": config.variant,
        "tag": config.tag,
        "seed": config.seed,
        "model": section(config.model),
    }
    shared["eval_batch_size"] = config.train.eval_batch_size
    # Both use both: score reports the exported bits, export checks its files on the scored split.
    return {**shared, "score": section(config.score), "export": section(config.export)}


def result_id(folder: Path) -> str | None:
    """The id of a finished stage, or None."""
    marker = done_file(folder)
    return read_json(marker)["id"] if marker.exists() else None


def listing_id(folder: Path) -> str:
    """A fingerprint of a folder's files: names, sizes and times of change, not their contents."""
    rows = []
    stack, seen = [str(folder)], set()
    while stack:
        place = stack.pop()
        real = os.path.realpath(place)
        if real in seen:  # links in a circle
            continue
        seen.add(real)
        try:
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir():
                        stack.append(entry.path)
                    else:
                        stat = entry.stat(follow_symlinks=not entry.is_symlink() or os.path.exists(entry.path))
                        rows.append((os.path.relpath(entry.path, folder), stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            raise KestrelError(f"cannot list {error.filename or place}: {error.strerror}") from None
    return sha256_json(sorted(rows))


def _file_id(run: Run, path: Path) -> str:
    """SHA-256 of a file made elsewhere; kept beside the run, so that large files are hashed once."""
    cache_file = run.exp / "hashes.json"
    cache = read_json(cache_file) if cache_file.exists() else {}
    stat = path.stat()
    key = f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
    if key not in cache:
        cache[key] = sha256_file(path)
        with contextlib.suppress(KestrelError):  # it only saves time; a dry run makes no folder for it
            if run.exp.is_dir():
                write_json(cache_file, cache)
    return cache[key]


def inputs_of(run: Run, stage: str) -> dict[str, str | None]:
    """Input name to id; None where the input is missing."""
    config = run.config
    if stage == "download":
        assert config.corpus is not None
        found: dict[str, str | None] = {}
        for key in ("dir", "test_dir"):
            folder = getattr(config.corpus, key)
            if folder is not None:
                found[key] = listing_id(run.root / folder) if (run.root / folder).is_dir() else None
        return found
    if stage == "prepare":
        return {"download": result_id(run.raw)}
    if stage == "feature":
        return {"prepare": result_id(run.manifests)}

    def features(splits: tuple[str, ...]) -> dict[str, str | None]:
        if config.feat_dir is None:
            return {"feature": result_id(run.features)}
        paths = {split: run.features / f"{split}.h5" for split in splits}
        return {f"feature {split}": _file_id(run, path) if path.exists() else None for split, path in paths.items()}

    if stage == "pretrain":
        return features(("train", "validation"))
    if stage == "retrain":
        start = config.retrain.start if config.retrain is not None else None
        if start is not None:
            path = run.root / start
            return {**features(("train", "validation")), "start": _file_id(run, path) if path.exists() else None}
        return {**features(("train", "validation")), "pretrain": result_id(run.out("pretrain"))}
    name, path = run.checkpoint()
    if name == "checkpoint":
        checkpoint: str | None = _file_id(run, path) if path.exists() else None
    else:
        checkpoint = result_id(run.out(name))
    # The scale of the integer model comes from validation features.
    return {**features(tuple(dict.fromkeys(("validation", config.score.split)))), name: checkpoint}


_MADE_BY = {"download": 0, "prepare": 1, "feature": 2, "pretrain": 3, "retrain": 4}


def _missing(run: Run, stage: str, name: str) -> str:
    key = name.split()[0]
    if key in ("dir", "test_dir"):
        return f"corpus.{key} does not exist: {getattr(run.config.corpus, key)}"
    if key == "checkpoint":
        return f"--checkpoint {run.config.checkpoint} does not exist"
    if key == "start":
        assert run.config.retrain is not None
        return f"retrain.start does not exist: {run.config.retrain.start}"
    if key == "feature" and run.config.feat_dir is not None:
        return f"{run.config.feat_dir} has no {name.split()[1]}.h5"
    number = _MADE_BY[key]
    half = " (it was started and is not finished)" if started_file(run.out(key)).exists() else ""
    return f"stage {BY_NAME[stage].number} needs the result of stage {number} {key}{half}: run ./run.sh with --stage {number}"


def present(run: Run, stage: str) -> str | None:
    """None where the run has this stage, else the line that says why not."""
    if run.config.feat_dir is not None and stage in ("download", "prepare", "feature"):
        return f"features are given by --feat-dir {run.config.feat_dir}"
    if stage == "retrain" and run.config.retrain is None:
        return f"recipe {run.config.recipe} has no such stage"
    if stage == "pretrain" and run.config.retrain is not None and run.config.retrain.start is not None:
        return f"stage 4 starts from {run.config.retrain.start}"
    return None


def _changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted(set(old) | set(new)):
            found += _changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [f"{prefix} {old} -> {new}"]


def _split_length(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    phase = settings["train"]
    return {**settings, "train": _without(phase, LENGTH)}, {key: phase[key] for key in LENGTH}


def _prefix_of(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a phase of the old length is the beginning of one of the new length."""
    phase = new["train"]
    if phase["schedule"] != "segments":
        return phase["schedule"] == "plateau"
    return len(phase["lr"]) == 1 or len(phase["lr_steps"] or phase.get("lr_epochs", [])) >= len(phase["lr"]) - 1


def _longer(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(old[key] is not None and new[key] is not None and new[key] > old[key] for key in LENGTH)


def _outputs_present(folder: Path, marker: dict[str, Any]) -> str | None:
    for name, output in marker["outputs"].items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != output["bytes"]:
            return f"{name} was changed"
    return None


def _packs_missing(run: Run, stage: str) -> str | None:
    """Stage 2 also makes the packed audio; several front ends share it."""
    if stage != "feature":
        return None
    names = [done_file(run.packs).name, *(f"{name}.h5" for name in (*SPLITS, "noise"))]
    missing = [name for name in names if not (run.packs / name).exists()]
    return f"packed audio is missing ({missing[-1]})" if missing else None


def status(run: Run, stage: str, expected: frozenset[str] = frozenset()) -> Status:
    """What running `stage` now would do. `expected`: stages that a dry run counts as done before it."""
    absent = present(run, stage)
    if absent is not None:
        return Status("absent", absent)
    settings = settings_of(run, stage)
    found = inputs_of(run, stage)
    for name, value in found.items():
        if value is None and name.split()[0] not in expected:
            return Status("blocked", _missing(run, stage, name))
    rerun = [name for name in found if name.split()[0] in expected]
    if stage in ("score", "export") and "retrain" in expected and run.config.checkpoint is None:
        rerun = ["retrain"]  # it will be there by then
    inputs = {name: value or "" for name, value in found.items()}
    folder = run.out(stage)
    marker_file, started = done_file(folder), started_file(folder)
    if run.force:
        return Status("run", "--force", settings, inputs)
    if rerun:
        return Status("run", f"after stage {_MADE_BY[rerun[0].split()[0]]} {rerun[0].split()[0]}", settings, inputs)
    if marker_file.exists():
        marker = read_json(marker_file)
        changes = _changes(marker["settings"], settings)
        if marker["inputs"] != inputs:
            return Status(
                "run",
                f"its input changed ({', '.join(k for k in inputs if marker['inputs'].get(k) != inputs[k])})",
                settings,
                inputs,
            )
        if not changes:
            problem = _outputs_present(folder, marker) or _packs_missing(run, stage)
            if problem is None:
                return Status("skip", "up to date", settings, inputs)
            return Status("run", problem, settings, inputs)
        if stage in ("pretrain", "retrain"):
            old_rest, old_length = _split_length(marker["settings"])
            new_rest, new_length = _split_length(settings)
            if old_rest == new_rest and _longer(old_length, new_length):
                if _prefix_of(marker["settings"], settings):
                    return Status("extend", f"longer: {'; '.join(changes)}", settings, inputs)
                why = "its learning-rate schedule depends on the length"
                return Status("run", f"from its start, since {why} ({'; '.join(changes)})", settings, inputs)
        return Status("run", f"settings changed: {'; '.join(changes)}", settings, inputs)
    if started.exists():
        begun = read_json(started)
        changes = _changes(begun["settings"], settings)
        if begun["inputs"] != inputs:
            changes.append("its input changed")
        if not changes:
            return Status("resume", "continues where it stopped", settings, inputs)
        old_rest, _ = _split_length(begun["settings"])
        new_rest, _ = _split_length(settings)
        if begun["inputs"] == inputs and old_rest == new_rest and _prefix_of(begun["settings"], settings):
            return Status("resume", f"continues with another length: {'; '.join(changes)}", settings, inputs)
        reason = f"unfinished with other settings ({'; '.join(changes)}): restore them to continue, or --force to start it anew"
        return Status("refused", reason, settings, inputs)
    return Status("run", "not yet run", settings, inputs)


def outdated_inputs(run: Run, stage: str) -> list[str]:
    """A line for each earlier result that is taken as it is although settings or inputs changed since it was made."""
    lines = []
    for earlier in STAGES[1 : BY_NAME[stage].number]:  # not stage 0: it would list the folder of the user again
        if present(run, earlier.name) is not None or not done_file(run.out(earlier.name)).exists():
            continue
        state = status(replace(run, force=False), earlier.name)
        if state.action in ("run", "extend"):
            lines.append(
                f"taking stage {earlier.number} {earlier.name} as it is, but {state.reason} (--stage {earlier.number} renews it)"
            )
    return lines


def begin(run: Run, stage: str, state: Status) -> None:
    """Make the stage folder ready: continue in it, or start anew with a finished one kept as `<stage>.prev`."""
    folder = run.out(stage)
    if BY_NAME[stage].number >= 3 and state.action == "run" and folder.exists():
        if done_file(folder).exists():
            previous = folder.with_name(f"{folder.name}.prev")
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(folder, previous)
        else:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if stage in ("pretrain", "retrain"):
        write_json(started_file(folder), {"settings": state.settings, "inputs": state.inputs})
    done_file(folder).unlink(missing_ok=True)


def finish(
    run: Run, stage: str, state: Status, outputs: list[str], seconds: float, volatile: tuple[str, ...] = ()
) -> None:
    """Write the done-marker; `outputs` are paths below the stage folder, `volatile` ones stay out of the id."""
    folder = run.out(stage)
    if not outputs:
        raise KestrelError(f"stage {stage} wrote nothing")
    table = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in outputs}
    identity = {name: entry["sha256"] for name, entry in table.items() if name not in volatile}
    if stage == "download":
        identity |= state.inputs | {"settings": sha256_json(state.settings)}
    marker = {
        "stage": stage,
        "id": sha256_json(identity),
        "settings": state.settings,
        "inputs": state.inputs,
        "outputs": table,
        "seconds": round(seconds, 1),
    }
    write_json(done_file(folder), marker)
    started_file(folder).unlink(missing_ok=True)
