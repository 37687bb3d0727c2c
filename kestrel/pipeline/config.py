"""From recipe, variant, corpus and --set to one fully resolved, typed configuration."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kestrel import recipe as recipes
from kestrel.corpus.spec import AugmentSpec, CorpusSpec, ProtocolSpec
from kestrel.errors import KestrelError, UsageError, unknown
from kestrel.export.spec import ExportSpec
from kestrel.frontend.spec import FeatureSpec, FrontendSpec
from kestrel.pipeline.pretrained import find
from kestrel.score.spec import ScoreSpec
from kestrel.settings import build, dump_yaml, load_yaml, merge, parse_assignment, setting, to_dict
from kestrel.store.hashing import sha256_json
from kestrel.train.spec import RetrainSpec, TrainSpec

DESCRIPTIONS = ("summary", "try")  # of a recipe.yaml, for people
SECTIONS = ("frontend", "feature", "augment", "model", "train", "retrain", "score", "export")


@dataclass
class Options:
    """The options of run.sh that choose and change a run."""

    recipe: str = "iscas21_lstm"
    corpus: str = "mini"
    protocol: str | None = None
    variant: str | None = None
    tag: str | None = None
    seed: int = 0
    set: list[str] = field(default_factory=list)
    feat_dir: str | None = None
    checkpoint: str | None = None
    pretrained: bool = False


@dataclass
class Config:
    """One run, fully resolved; `config.yaml` of its experiment folder."""

    recipe: str = setting("", "recipe")
    variant: str = setting("base", "variant of the recipe")
    tag: str = setting("", "folder of the run below exp/<recipe>")
    seed: int = setting(0, "seed of everything random", min=0)
    feat_dir: str | None = setting(None, "folder of feature files made elsewhere")
    checkpoint: str | None = setting(None, "checkpoint that score and export take instead of the run's own")
    classes: list[str] = setting([], "class names in the order of the labels")
    corpus: CorpusSpec | None = setting(None, "")
    protocol: ProtocolSpec | None = setting(None, "")
    protocol_name: str = setting("", "name of the protocol")
    frontend: FrontendSpec | None = setting(None, "")
    feature: FeatureSpec = field(default_factory=FeatureSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    model: Any = None
    train: TrainSpec = field(default_factory=TrainSpec)
    retrain: RetrainSpec | None = setting(None, "")
    score: ScoreSpec = field(default_factory=ScoreSpec)
    export: ExportSpec = field(default_factory=ExportSpec)


def load_config(path: Path, root: Path) -> Config:
    """Read a resolved `config.yaml` back."""
    data = load_yaml(path)
    config: Config = build(Config, data)
    config.model = build(recipes.load(config.recipe, root).ModelSpec, data.get("model"), "model")
    return config


def save_text(config: Config) -> str:
    """The text of `config.yaml`."""
    return dump_yaml(to_dict(config))


def class_names(protocol: ProtocolSpec) -> list[str]:
    """Classes of a protocol in the order of their labels."""
    classes = list(protocol.words)
    if protocol.unknown_percentage is not None:
        classes.append("unknown")
    if protocol.silence_percentage is not None:
        classes.append("silence")
    return classes


def _length_overrides(base: dict, delta: dict) -> dict:
    """Lay a phase section over another: a given length in epochs replaces one in steps, and the other way round."""
    base = dict(base)
    for given, other in (("epochs", "steps"), ("steps", "epochs")):
        if delta.get(given) is not None and delta.get(other) is None:
            base.pop(other, None)
            if "lr_steps" not in delta and "lr_epochs" not in delta:
                base.pop("lr_steps", None)
                base.pop("lr_epochs", None)
    return merge(base, delta)


def _overlay(base: dict, delta: dict) -> dict:
    merged = merge(base, delta)
    for phase in ("train", "retrain"):
        if isinstance(base.get(phase), dict) and isinstance(delta.get(phase), dict):
            merged[phase] = _length_overrides(base[phase], delta[phase])
    return merged


def variants(root: Path, recipe: str) -> list[str]:
    """Variants of a recipe, `base` first."""
    return ["base", *sorted(p.stem for p in (root / "recipes" / recipe / "variants").glob("*.yaml"))]


def _check_variant(variant: str, available: list[str]) -> None:
    """Raises UsageError where a part of `variant` (`a+b`: the deltas of a, then those of b) is unknown or stands twice."""
    parts = variant.split("+")
    for part in parts:
        if part not in available:
            raise unknown("variant", part, available)
    if len(parts) > 1 and (len(set(parts)) < len(parts) or "base" in parts):
        raise UsageError(f"--variant {variant}: join different variants, each once, and leave out base")


def _is_folder(name: str, start: Path) -> bool:
    return "/" in name or name.startswith(".") or (start / name).is_dir()


def resolve_path(root: Path, path: str, start: Path) -> str:
    """A path given by the user in folder `start`: relative to `root` where it lies inside, else absolute."""
    absolute = Path(os.path.abspath(start / Path(path).expanduser()))
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)


def _corpus(root: Path, options: Options, overrides: dict, start: Path) -> tuple[dict, str | None]:
    """The corpus section and the corpus's default protocol."""
    known = load_yaml(root / "conf" / "corpora.yaml").get("corpora", {})
    if options.corpus in known:
        entry = dict(known[options.corpus])
        protocol = entry.pop("protocol")
        entry.pop("script", None)
        section = {"name": options.corpus, **entry}
    elif _is_folder(options.corpus, start):
        folder = Path(os.path.abspath(start / Path(options.corpus).expanduser()))
        if not folder.is_dir():
            raise UsageError(f"--corpus {options.corpus}: no such folder")
        name = re.sub(r"[^\w.-]+", "_", folder.name) or "corpus"
        if name in known:  # its own place in data/ and feat/
            name += "-folder"
        section = {"name": name, "kind": "folder", "dir": str(folder)}
        protocol = None
    else:
        error = unknown("corpus", options.corpus, known)
        raise UsageError(f"{error}; a folder in GSC layout is given by a path such as ./{options.corpus}")
    section = merge(section, overrides)
    for key in ("dir", "test_dir"):
        if section.get(key):
            section[key] = resolve_path(root, str(section[key]), start)
            if not (root / section[key]).is_dir():
                raise UsageError(f"corpus.{key}: no such folder: {section[key]}")
    return section, protocol


def _protocol(root: Path, name: str | None, corpus: CorpusSpec, overrides: dict) -> ProtocolSpec:
    """A named protocol of conf/protocols, or one made from a folder; changed rules get a name of their own."""
    base: dict[str, Any] = {}
    if name is not None:
        known = {path.stem: path for path in (root / "conf" / "protocols").glob("*.yaml")}
        if name not in known:
            raise unknown("protocol", name, known)
        base = load_yaml(known[name])
        owner = base.pop("corpus", None)
        if owner is not None and owner != corpus.name:
            raise UsageError(f"protocol {name} belongs to corpus {owner}, not to {corpus.name}: use --corpus {owner}")
        base["name"] = name
    plain = build(ProtocolSpec, base, "protocol")
    spec: ProtocolSpec = build(ProtocolSpec, merge(base, overrides), "protocol")
    if len(set(spec.words)) != len(spec.words) or not spec.words:
        raise UsageError("protocol.words: expected at least one word, each once")
    different = {f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != getattr(plain, f.name)}
    if corpus.kind == "folder":
        if corpus.test_dir:  # by its name: the same clips may lie elsewhere on another machine
            different["test_dir"] = Path(corpus.test_dir).name
    elif corpus.kind == "synthetic":
        defaults = CorpusSpec()
        different |= {
            key: getattr(corpus, key)
            for key in ("speakers", "keyword_takes", "seed")
            if getattr(corpus, key) != getattr(defaults, key)
        }
    if "name" not in overrides:
        spec.name = plain.name or f"{corpus.name}-{len(class_names(spec))}"
        if different:
            spec.name += f"-{sha256_json(different)[:6]}"
    if different and "expect" not in overrides:
        spec.expect, spec.benchmark = {}, False
    if not re.fullmatch(r"[\w.-]+", spec.name):
        raise UsageError(f"protocol.name: {spec.name!r} must be letters, digits, '.', '_' and '-' only")
    return spec


def _frontend(root: Path, name: str, overrides: dict) -> FrontendSpec:
    known = {path.stem: path for path in (root / "conf" / "frontends").glob("*.yaml")}
    if name not in known:
        raise unknown("front end", name, known)
    base = load_yaml(known[name])
    plain = build(FrontendSpec, base, "frontend")
    spec: FrontendSpec = build(FrontendSpec, merge(base, overrides), "frontend")
    different = {f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != getattr(plain, f.name)}
    spec.name = name + (f"-{sha256_json(different)[:6]}" if different else "")
    return spec


def read_feature_attributes(folder: Path) -> dict[str, Any]:
    """Classes, protocol, corpus and front end that the feature files in `folder` name."""
    import h5py

    found: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        path = folder / f"{split}.h5"
        try:
            with h5py.File(path, "r") as file:
                attributes = {
                    key: file.attrs[key]
                    for key in ("format", "classes", "protocol", "corpus", "frontend")
                    if key in file.attrs
                }
        except FileNotFoundError:
            raise KestrelError(
                f"--feat-dir: {path} does not exist (a folder needs train.h5, validation.h5 and test.h5)"
            ) from None
        except OSError as error:
            raise KestrelError(f"--feat-dir: {path} is not a readable HDF5 file ({error})") from None
        if attributes.get("format") != "kestrel-features-1" or "classes" not in attributes:
            raise KestrelError(f"--feat-dir: {path} is no feature file (attribute format is not kestrel-features-1)")
        if found and attributes["classes"] != found["classes"]:
            raise KestrelError(f"--feat-dir: {path} has other classes than train.h5")
        found = found or attributes
    try:
        classes, protocol = json.loads(found["classes"]), json.loads(found.get("protocol", "{}"))
        name = str(protocol.get("name") or folder.name)
    except (ValueError, TypeError, AttributeError):
        raise KestrelError(f"--feat-dir: classes or protocol of {folder / 'train.h5'} are not valid JSON") from None
    return {
        "classes": classes,
        "protocol_name": re.sub(r"[^\w.-]+", "_", name),
        "corpus": str(found.get("corpus", "features")),
    }


def variant_data(root: Path, recipe: str, variant: str) -> dict[str, Any]:
    """The sections of recipe.yaml under the deltas of a variant. Raises UsageError for an unknown section."""
    folder = root / "recipes" / recipe
    data = load_yaml(folder / "recipe.yaml")
    for key in DESCRIPTIONS:
        data.pop(key, None)
    for key in data:
        if key not in SECTIONS:
            raise unknown("key", f"{folder.name}/recipe.yaml: {key}", SECTIONS)
    for part in () if variant == "base" else variant.split("+"):
        delta = load_yaml(folder / "variants" / f"{part}.yaml")
        for key in delta:
            if key not in SECTIONS:
                raise unknown("key", f"{folder.name}/variants/{part}.yaml: {key}", SECTIONS)
        data = _overlay(data, delta)
    return data


def resolve(root: Path, options: Options, start: Path) -> Config:
    """The configuration that the options describe; paths in them are relative to the folder `start`.

    Precedence: recipe.yaml < variant (in `a+b` a, then b) < --set. Raises UsageError for an unknown name, key or value.
    """
    recipe = recipes.load(options.recipe, root)
    sets: dict[str, Any] = {}
    for text in options.set:
        sets = merge(sets, parse_assignment(text))
    top = ("corpus", "protocol", *SECTIONS)
    for key, value in sets.items():
        if key not in top:
            raise unknown("key", key, top)
        if not isinstance(value, dict) and not (key == "retrain" and value is None):
            raise UsageError(f"--set {key}=...: {key} is a section; name a key in it, such as {key}.name")
    feat_dir = resolve_path(root, options.feat_dir, start) if options.feat_dir else None
    available = variants(root, options.recipe)
    variant = options.variant
    if variant is None:
        variant = "mini" if options.corpus == "mini" and feat_dir is None and "mini" in available else "base"
    _check_variant(variant, available)
    data = variant_data(root, options.recipe, variant)
    corpus_sets, protocol_sets = sets.pop("corpus", {}), sets.pop("protocol", {})
    data = _overlay(data, sets)

    config = Config(recipe=options.recipe, variant=variant, seed=options.seed, feat_dir=feat_dir)
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed}: must not be negative")
    config.feature = build(FeatureSpec, data.get("feature"), "feature")
    config.augment = build(AugmentSpec, data.get("augment"), "augment")
    config.model = build(recipe.ModelSpec, data.get("model"), "model")
    config.train = build(TrainSpec, data.get("train"), "train")
    config.retrain = build(RetrainSpec, data["retrain"], "retrain") if data.get("retrain") is not None else None
    if config.retrain is not None and config.retrain.start is not None:
        given = config.retrain.start
        config.retrain.start = resolve_path(root, given, start if "start" in sets.get("retrain", {}) else root)
        if not (root / config.retrain.start).is_file():
            raise UsageError(f"retrain.start: {given}: no such file")
    config.score = build(ScoreSpec, data.get("score"), "score")
    config.export = build(ExportSpec, data.get("export"), "export")
    for name, phase in (("train", config.train), ("retrain", config.retrain)):
        if phase is not None and (phase.epochs is None) == (phase.steps is None):
            raise UsageError(f"{name}: give exactly one of {name}.epochs and {name}.steps")
    if feat_dir is not None:
        if corpus_sets or protocol_sets or sets.get("frontend") or options.protocol:
            raise UsageError("--feat-dir brings its own corpus, protocol and front end: leave out settings of these")
        attributes = read_feature_attributes(root / feat_dir)
        config.classes, config.protocol_name = attributes["classes"], attributes["protocol_name"]
        config.augment.waveform = False
    else:
        section, default_protocol = _corpus(root, options, corpus_sets, start)
        config.corpus = build(CorpusSpec, section, "corpus")
        config.protocol = _protocol(root, options.protocol or default_protocol, config.corpus, protocol_sets)
        config.protocol_name = config.protocol.name
        config.classes = class_names(config.protocol)
        config.frontend = _frontend(root, config.feature.frontend, data.get("frontend") or {})
        if config.frontend.sample_rate != config.protocol.sample_rate:
            raise UsageError(
                f"front end {config.frontend.name} wants {config.frontend.sample_rate} Hz, "
                f"protocol {config.protocol.name} has {config.protocol.sample_rate} Hz"
            )
    if options.checkpoint:
        config.checkpoint = resolve_path(root, options.checkpoint, start)
        if not (root / config.checkpoint).is_file():
            raise UsageError(f"--checkpoint {options.checkpoint}: no such file")
    if options.pretrained:
        if options.checkpoint:
            raise UsageError("--pretrained and --checkpoint: give one of them")
        config.checkpoint = str(find(root, options.recipe, variant).relative_to(root))
    origin = "pretrained" if options.pretrained else f"seed{options.seed}"
    config.tag = options.tag or f"{variant}-{config.protocol_name}-{origin}"
    if not re.fullmatch(r"[\w.=,+-]+", config.tag):
        raise UsageError(f"--tag {config.tag!r}: letters, digits, '.', '_', '-', '=' and ',' only")
    return config
