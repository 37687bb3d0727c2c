"""What the step scripts do: open the inputs of a run, call the library, name the outputs."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kestrel import recipe as recipes
from kestrel.errors import KestrelError, UsageError
from kestrel.frontend.spec import stored
from kestrel.pipeline.console import progress
from kestrel.pipeline.launch import run_processes
from kestrel.pipeline.stages import SPLITS, Run, Status, done_file, started_file
from kestrel.settings import build, load_yaml, to_dict
from kestrel.store.atomic import read_json, remove_stale, write_json
from kestrel.store.hashing import sha256_file, sha256_json

if TYPE_CHECKING:
    from torch import Tensor

    from kestrel.models.spotter import KeywordSpotter
    from kestrel.store.hdf5 import AudioFile, FeatureFile
    from kestrel.train.data import Split

log = logging.getLogger("kestrel")
DRAWN = ("curves.png", "search.png")
FOUND = ("architecture.yaml", "search.csv")  # of a search


def obtain_corpus(run: Run) -> None:
    """Run the corpus's script of local/ (`obtain(spec, out, nproc)`) and note where the audio is."""
    from kestrel.corpus.source import write_roots

    corpus = run.config.corpus
    assert corpus is not None
    entry = load_yaml(run.root / "conf" / "corpora.yaml")["corpora"].get(corpus.name, {})
    script = run.root / entry.get("script", "local/folder.py")
    sys.path.insert(0, str(script.parent))
    main, test = importlib.import_module(script.stem).obtain(corpus, run.raw, run.nproc)
    write_roots(run.raw, main, corpus.test_dir or test)


def roots(run: Run) -> dict[str, Path]:
    """The folders of the corpus's audio: `main`, and `test` where the test clips lie apart."""
    from kestrel.corpus.source import read_roots

    main, test = read_roots(run.raw)
    return {"main": main} if test is None else {"main": main, "test": test}


def make_packs(run: Run, status: Status) -> None:
    """Pack the audio of each split, unless the packs of these manifests are there; several front ends share them."""
    from kestrel.corpus.manifest import read_manifest, read_protocol
    from kestrel.frontend.extract import pack_audio, pack_noise

    marker = done_file(run.packs)
    if marker.exists() and read_json(marker)["inputs"] == status.inputs and not run.force:
        log.info("packed audio is up to date")
        return
    marker.unlink(missing_ok=True)
    remove_stale(run.packs)
    protocol, found = read_protocol(run.manifests), roots(run)
    for split in SPLITS:
        clips = read_manifest(run.manifests / f"{split}.csv")
        pack_audio(clips, found, protocol, split, run.packs / f"{split}.h5", progress(f"pack {split}"))
    pack_noise(protocol, found, run.packs / "noise.h5")
    write_json(marker, {"inputs": status.inputs})


def make_features(run: Run) -> list[str]:
    """Compute the features of each split from its packed audio."""
    from kestrel.frontend.extract import extract
    from kestrel.frontend.make import make_frontend
    from kestrel.store.hdf5 import AudioFile

    assert run.config.frontend is not None
    frontend = make_frontend(run.config.frontend)
    for split in SPLITS:
        with AudioFile(run.packs / f"{split}.h5") as audio:
            extract(audio, frontend, run.features / f"{split}.h5", progress=progress(f"features {split}"))
    return [f"{split}.h5" for split in SPLITS]


def feature_file(run: Run, split: str) -> FeatureFile:
    """The feature file of a split. Raises KestrelError where its classes are not those of the run."""
    from kestrel.store.hdf5 import FeatureFile

    file = FeatureFile(run.features / f"{split}.h5")
    if file.classes != run.config.classes:
        raise KestrelError(f"{file.path} has classes {file.classes}, the run expects {run.config.classes}")
    return file


def build_spotter(run: Run, feature_shape: tuple[int, int]) -> KeywordSpotter:
    """Feature steps and network of the run for features (frames, width), freshly initialised from the seed."""
    import torch

    from kestrel.frontend.post import Post
    from kestrel.models.spotter import KeywordSpotter

    config = run.config
    torch.manual_seed(config.seed)
    post = Post(config.feature.post, feature_shape)
    return KeywordSpotter(
        post, recipes.load(config.recipe, run.root).build(config.model, post.output_shape, len(config.classes))
    )


def identity(run: Run, file: FeatureFile, config_hash: str) -> dict[str, Any]:
    """What a checkpoint says about itself (plain types)."""
    config = run.config
    return {
        "recipe": config.recipe,
        "variant": config.variant,
        "tag": config.tag,
        "seed": config.seed,
        "protocol": {"name": config.protocol_name, "hash": file.protocol["hash"]},
        "classes": config.classes,
        "frontend": stored(config.frontend) if config.frontend is not None else None,
        "post": config.feature.post,
        "model": to_dict(config.model),
        "input_shape": list(file.shape[1:]),
        "config_hash": config_hash,
    }


def training_split(run: Run) -> Split:
    """Training clips: packed audio, augmented anew in each epoch, or the stored features."""
    from kestrel.corpus.augment import Augmenter, FeatureAugmenter
    from kestrel.frontend.make import make_frontend
    from kestrel.store.hdf5 import AudioFile, read_noise
    from kestrel.train.data import Split

    config = run.config
    batches: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "training": True,
        "seed": config.seed,
        "workers": config.train.workers,
        "feature_augmenter": FeatureAugmenter(config.augment, config.seed) if config.augment.features else None,
    }
    if not config.augment.waveform:
        if config.feat_dir is not None:
            log.info("features are given: no waveform augmentation")
        return Split(feature_file(run, "train"), **batches)
    assert config.protocol is not None and config.frontend is not None
    silence = config.classes.index("silence") if config.protocol.silence_percentage is not None else None
    noise, offsets, _ = read_noise(run.packs / "noise.h5")
    augmenter = Augmenter(config.augment, noise, offsets, config.protocol.sample_rate, silence, config.seed)
    frontend = make_frontend(config.frontend)
    return Split(AudioFile(run.packs / "train.h5"), frontend=frontend, augmenter=augmenter, **batches)


def train_here(run: Run, stage: Literal["pretrain", "retrain"]) -> None:
    """Train one stage in this process (one of several where WORLD_SIZE says so); it was begun before.

    Retraining starts from the best weights of pretraining.
    """

    from kestrel.train.data import Split
    from kestrel.train.loop import Job, train
    from kestrel.train.signals import StopFlag

    config = run.config
    with StopFlag() as stop:
        validation_file = feature_file(run, "validation")
        spotter = build_spotter(run, (validation_file.shape[1], validation_file.shape[2]))
        if stage == "retrain":
            _start_retraining(run, spotter)
            spotter.net = spotter.net.successor(to_train=True)
        else:
            with feature_file(run, "train") as file:
                spotter.post.fit(_finite(file))
        phase = config.train if stage == "pretrain" else config.retrain
        assert phase is not None
        begun = read_json(started_file(run.out(stage)))
        settings = {key: value for key, value in begun["settings"].items() if key != "train"}
        who = identity(run, validation_file, sha256_json([settings, begun["inputs"]]))
        if (structure := spotter.net.structure()) is not None:
            who["structure"] = structure
        job = Job(stage=stage, phase=phase, train=config.train, seed=config.seed, out_dir=run.out(stage), identity=who)
        held_out = Split(validation_file, batch_size=config.train.eval_batch_size)
        result = train(job, spotter, training_split(run), held_out, progress=progress(stage), stop=stop)
    log.info("best validation accuracy %.2f %% (%s)", 100 * result.best_accuracy, result.best.relative_to(run.root))


def _finite(file: FeatureFile) -> Iterator[Tensor]:
    """Features [B, T, F] of all clips. Raises KestrelError with the name of a clip whose features are not finite."""
    import torch

    from kestrel.models.evaluate import refuse_not_finite

    row = 0
    for batch in file.iterate():
        features = torch.from_numpy(batch)
        refuse_not_finite(file, features, np.arange(row, row + len(batch)))
        row += len(batch)
        yield features


def _start_retraining(run: Run, spotter: KeywordSpotter) -> None:
    """Give `spotter` the best weights of stage 3, or those of the checkpoint `retrain.start`.

    Buffers that such a checkpoint lacks (masks of a pruning that begins now) stay as they are.
    """
    from kestrel.models.compact import state_of
    from kestrel.store.checkpoint import load

    config = run.config
    start = None if config.retrain is None else config.retrain.start
    if start is None:
        spotter.load_state_dict(load(run.out("pretrain") / "best.pt")["model"])
        return
    content = load(run.root / start)
    who, state = content.get("identity", {}), state_of(content, start)
    for key, expected in (("recipe", config.recipe), ("classes", config.classes), ("post", config.feature.post)):
        if who.get(key) != expected:
            raise KestrelError(f"retrain.start: {start} has another {key}: {who.get(key)}, the run has {expected}")
    if "structure" in who:
        spotter.net = spotter.net.with_structure(who["structure"])
    own = spotter.state_dict()
    weights = {name for name, _ in spotter.named_parameters()}
    wrong = sorted((weights - state.keys()) | (state.keys() - own.keys()))
    wrong += [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    if wrong:
        raise KestrelError(f"retrain.start: {start} is a checkpoint of another network: {', '.join(wrong[:3])}")
    spotter.load_state_dict({**own, **state})


def train_stage(run: Run, stage: Literal["pretrain", "retrain"]) -> tuple[list[str], tuple[str, ...]]:
    """Train one stage, in `train.processes` processes."""
    if run.config.train.processes > 1:
        run_processes(run, stage, run.config.train.processes)
    else:
        train_here(run, stage)
    outputs, volatile = ["best.pt", "metrics.csv", *DRAWN, "last.pt", "time.json"], ("last.pt", "time.json", *DRAWN)
    return [name for name in (*outputs, *FOUND) if (run.out(stage) / name).exists()], volatile


def _with_defaults(settings: type, data: Any) -> Any:
    """Settings of an older checkpoint, with the defaults of those that came later; `data` where they do not fit."""
    try:
        return to_dict(build(settings, data))
    except UsageError:
        return data


def _difference(name: str, found: Any, expected: Any) -> str:
    """What of a checkpoint's configuration is not the run's: the settings that differ, not those that agree."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return f"its {name} is {found}, the run has {expected}"
    return "; ".join(
        _difference(f"{name}.{key}", found.get(key), expected.get(key))
        for key in dict.fromkeys((*found, *expected))
        if found.get(key) != expected.get(key)
    )


def load_checkpoint(run: Run) -> tuple[KeywordSpotter, dict[str, Any], Path]:
    """The trained spotter that score and export take, its checkpoint's content, and the file."""
    from kestrel.models.compact import state_of
    from kestrel.store.checkpoint import load

    _, path = run.checkpoint()
    content = load(path)
    config = run.config
    who = {**content.get("identity", {})}
    who["model"] = _with_defaults(type(config.model), who.get("model"))
    model = to_dict(config.model)
    free = getattr(recipes.load(config.recipe, run.root), "EVALUATION_ONLY", ())
    if config.checkpoint is not None:  # the same weights may be scored under other noise than they were selected with
        model |= {key: value for key, value in who.get("model", {}).items() if key in free}
    for key, expected in (
        ("recipe", config.recipe),
        ("classes", config.classes),
        ("model", model),
        ("post", config.feature.post),
    ):
        if who.get(key) != expected:
            raise KestrelError(
                f"{path} is a checkpoint of another configuration: {_difference(key, who.get(key), expected)}"
            )
    spotter = build_spotter(run, tuple(who["input_shape"]))
    if "structure" in who:
        spotter.net = spotter.net.with_structure(who["structure"])
    spotter.load_state_dict(state_of(content, str(path)))
    spotter.net = spotter.net.successor()
    if (structure := spotter.net.structure()) is not None:
        who["structure"] = structure
    deviations = config.score.deviations()
    if deviations:
        if not hasattr(spotter.net, "evaluate_with"):
            raise KestrelError(f"score.{next(iter(deviations))}: recipe {config.recipe} has no model of device noise")
        spotter.net.evaluate_with(**deviations)  # type: ignore[operator]
    return spotter, who, path


def stage_seconds(run: Run) -> dict[str, float]:
    """Seconds that each finished stage took."""
    found = {}
    for stage in ("download", "prepare", "feature", "pretrain", "retrain", "score", "export"):
        if stage in ("download", "prepare", "feature") and run.config.feat_dir is not None:
            continue
        marker = done_file(run.out(stage))
        if marker.exists():
            found[stage] = read_json(marker)["seconds"]
    return found


def _provenance(run: Run, checkpoint: Path) -> dict[str, Any]:
    import torch

    environment = read_json(run.exp / "env.json")
    times = [run.out(stage) / "time.json" for stage in ("pretrain", "retrain")]
    seconds = sum(read_json(path)["train_seconds"] for path in times if path.exists() and run.config.checkpoint is None)
    return {
        "checkpoint_sha256": sha256_file(checkpoint),
        "git_commit": environment["git_commit"],
        "git_dirty": environment["git_dirty"],
        "torch": torch.__version__,
        "device": "cpu",
        "train_seconds": round(seconds, 1),
        "command": environment["command"],
    }


def _scored_identity(run: Run, who: dict[str, Any], file: FeatureFile) -> dict[str, Any]:
    config = run.config
    rules = file.protocol
    return {
        **who,
        "tag": config.tag,
        "variant": config.variant,
        "protocol": {"name": config.protocol_name, "hash": rules["hash"]},
        "protocol_rules": rules,
        "corpus": file.corpus,
        "frontend": stored(config.frontend) if config.frontend is not None else file.frontend,
        "feature": to_dict(config.feature),
    }


def _feature_scale(run: Run) -> float | None:
    """Scale of the integer model's feature codes, from the validation split; None where a given folder has none."""
    from kestrel.lower.spotter import feature_scale_of

    if not (run.features / "validation.h5").exists():
        return None
    with feature_file(run, "validation") as file:
        return feature_scale_of(file)


def score_stage(run: Run) -> list[str]:
    """Score the checkpoint on the split of `score.split`."""
    from kestrel.frontend.make import make_frontend
    from kestrel.score.run import score

    config = run.config
    spotter, who, path = load_checkpoint(run)
    with feature_file(run, config.score.split) as file, _packed_audio(run, config.score.split) as audio:
        curves = [(stage, run.out(stage) / "metrics.csv") for stage in ("pretrain", "retrain")]
        result = score(
            spotter,
            file,
            run.out("score"),
            identity=_scored_identity(run, who, file),
            split=config.score.split,
            seed=config.seed,
            chip=config.score.chip,
            chips=config.score.chips,
            machine=config.score.machine,
            frontend=make_frontend(config.frontend) if config.frontend is not None else None,
            snrs=config.score.snr,
            batch_size=config.train.eval_batch_size,
            feature_scale=_feature_scale(run),
            analog_bits=config.export.weight_bits,
            metrics_csv=[(stage, csv) for stage, csv in curves if csv.exists() and config.checkpoint is None],
            provenance=_provenance(run, path),
            extra={"structure": who["structure"]} if "structure" in who else None,
            audio=audio,
            progress=progress("score"),
        )
    low, high = result["ci95"]
    log.info(
        "%s accuracy %.2f %% of %d clips (95 %% interval %.2f to %.2f), protocol %s",
        config.score.split, 100 * result["accuracy"], result["n"], 100 * low, 100 * high, config.protocol_name,
    )  # fmt: skip
    if "chips" in result:
        spread = result["chips"]
        log.info(
            "%d chips: mean %.2f %%, standard deviation %.2f points, worst %.2f %% (chip %d)",
            spread["count"], 100 * spread["mean"], 100 * spread["sd"], 100 * spread["worst"], spread["worst_chip"],
        )  # fmt: skip
    if "integer_accuracy" in result:
        compared = result["integer"]
        log.info(
            "integer model %.2f %%, fake-quant with the same weight codes %.2f %% (both without device noise)",
            100 * result["integer_accuracy"], 100 * compared["fake_quant_accuracy"],
        )  # fmt: skip
    else:
        log.info("not scored in integers: %s", result["integer_obstacle"])
    if "fixed_frontend_accuracy" in result:
        compared = result["fixed_frontend"]
        log.info(
            "from sound in integers %.2f %% (%s)",
            100 * result["fixed_frontend_accuracy"],
            f"{compared['difference_points']:+.2f} points against float features"
            if "difference_points" in compared
            else "trained on fixed-point features: this is the accuracy of the integer model",
        )  # fmt: skip
    else:
        log.info("not scored from sound in integers: %s", result["fixed_frontend_obstacle"])
    return sorted(path.name for path in run.out("score").iterdir() if not path.name.startswith("."))


def _packed_audio(run: Run, split: str) -> AbstractContextManager[AudioFile | None]:
    """The sound of a split; None for features that were made elsewhere, or where the packs were removed."""
    from kestrel.store.hdf5 import AudioFile

    if run.config.feat_dir is not None:
        return nullcontext()
    path = run.packs / f"{split}.h5"
    return AudioFile(path) if path.exists() else nullcontext()


def export_stage(run: Run) -> list[str]:
    """Export the checkpoint and check the files on the test split."""
    from kestrel.export.run import export

    config = run.config
    spotter, who, path = load_checkpoint(run)
    with feature_file(run, config.score.split) as file, _packed_audio(run, config.score.split) as audio:
        export(
            spotter,
            file,
            run.out("export"),
            identity=_scored_identity(run, who, file),
            split=config.score.split,
            seed=config.seed,
            chip=config.score.chip,
            batch_size=config.train.eval_batch_size,
            settings=config.export,
            feature_scale=_feature_scale(run),
            provenance=_provenance(run, path),
            audio=audio,
            progress=progress("export"),
        )
    folder = run.out("export")
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not path.name.startswith("."))
