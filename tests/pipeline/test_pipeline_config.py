"""From recipe, variant, corpus and --set to one configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from kestrel import recipe as recipes
from kestrel.errors import KestrelError, UsageError
from kestrel.pipeline.config import Config, Options, class_names, load_config, resolve, save_text, variants
from kestrel.pipeline.plan import main as plan
from kestrel.settings import load_yaml, to_dict
from kestrel.train.schedule import phase_steps, schedule

ROOT = Path(__file__).resolve().parents[2]
CORPORA = list(load_yaml(ROOT / "conf" / "corpora.yaml")["corpora"])
PROTOCOLS = sorted(path.stem for path in (ROOT / "conf" / "protocols").glob("*.yaml"))
FRONTENDS = sorted(path.stem for path in (ROOT / "conf" / "frontends").glob("*.yaml"))
RECIPES = [(name, variant) for name in recipes.names(ROOT) for variant in variants(ROOT, name)]


def make(*sets: str, start: Path = ROOT, root: Path = ROOT, **options: Any) -> Config:
    return resolve(root, Options(set=list(sets), **options), start)


def write_features(folder: Path, classes: list[str], **attributes: str) -> Path:
    """A folder of feature files with nothing in them but what the planner reads."""
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file.attrs.update({"format": "kestrel-features-1", "classes": json.dumps(classes), **attributes})
            file["features"] = np.zeros((1, 4, 3), np.float32)
    return folder


# ------------------------------------------------------------------------------------------------------- precedence


def test_recipe_then_variant_then_set() -> None:
    base = make(variant="base", corpus="gsc_v2")
    assert (base.model.noise_train, base.model.hidden, base.train.batch_size) == (0.1, 108, 100)
    readme = make(variant="readme", corpus="gsc_v2")
    assert (readme.model.noise_train, readme.model.hidden) == (0.0, 108)
    changed = make("model.noise_train=0.2", "model.hidden=16", variant="readme", corpus="gsc_v2")
    assert (changed.model.noise_train, changed.model.hidden, changed.train.batch_size) == (0.2, 16, 100)
    assert make("model.hidden=16", "model.hidden=32").model.hidden == 32


def test_the_variant_follows_the_corpus() -> None:
    assert make().variant == "mini"
    assert make(corpus="gsc_v2").variant == "base"
    assert make(variant="base").variant == "base"


def test_a_length_in_epochs_replaces_one_in_steps_and_back() -> None:
    base = make(variant="base")
    assert (base.train.steps, base.train.epochs, base.train.lr_steps) == (20200, None, [10000, 10000, 200])
    epochs = make("train.epochs=5", variant="base")
    assert (epochs.train.steps, epochs.train.epochs, epochs.train.lr_steps) == (None, 5, [])
    assert epochs.train.lr == base.train.lr
    steps = make("train.steps=500", "train.lr=0.1", variant="mini")
    assert (steps.train.steps, steps.train.epochs) == (500, None)
    retrain = make("retrain.epochs=2", variant="base").retrain
    assert retrain is not None and (retrain.steps, retrain.epochs) == (None, 2)
    same = make("train.steps=20200", variant="base")
    assert same.train.lr_steps == [], "the segments of another length do not fit a given one"
    own = make("train.epochs=5", "train.lr_steps=10,10", variant="base")
    assert own.train.lr_steps == [10, 10]


@pytest.mark.parametrize(("recipe", "variant"), RECIPES)
def test_every_variant_has_learning_rates_for_its_length(recipe: str, variant: str) -> None:
    """As written, with no setting changed."""
    config = make(recipe=recipe, variant=variant)
    for name, phase in (("train", config.train), ("retrain", config.retrain)):
        if phase is not None and (phase.steps is not None or phase.epochs is not None):
            total = phase_steps(phase, 370, name)
            assert schedule(phase, total, name)(0) > 0


@pytest.mark.parametrize("sets", [("train.epochs=3", "train.steps=3"), ("train.epochs=null",)])
def test_a_phase_needs_exactly_one_length(sets: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"train: give exactly one of train\.epochs and train\.steps"):
        make(*sets, variant="mini")


def test_retraining_can_be_left_out() -> None:
    assert make("retrain=null").retrain is None


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("modle.hidden=3", "unknown key 'modle'; did you mean 'model'?"),
        ("model.hiden=3", "unknown key 'model.hiden'; did you mean 'model.hidden'?"),
        ("protocol.word=yes", "did you mean 'protocol.words'?"),
        ("frontend.hopp=3", "did you mean 'frontend.hop'?"),
        ("corpus.test_dri=x", "did you mean 'corpus.test_dir'?"),
        ("train.learning_rate=1", "unknown key 'train.learning_rate'"),
        ("feature.frontend=iscas", "unknown front end 'iscas'; did you mean 'iscas21'?"),
        ("model=3", "model is a section; name a key in it"),
        ("train=null", "train is a section"),
        ("model.hidden", "expected key.sub=value"),
        ("model.hidden=0", "model.hidden: 0 is out of bounds"),
        ("train.optimizer=adm", "did you mean 'adam'?"),
        ("protocol.words=yes,yes", "each once"),
        ("protocol.words=", "protocol.words"),
        ("protocol.name=a/b", "protocol.name"),
        ("protocol.sample_rate=8000", "front end iscas21 wants 16000 Hz, protocol mini-12-"),
        ("corpus.test_dir=nowhere", "corpus.test_dir: no such folder: nowhere"),
    ],
)
def test_wrong_settings_name_key_and_nearest(sets: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(sets)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "iscas21"}, "unknown recipe 'iscas21'; did you mean 'iscas21_lstm'?"),
        ({"variant": "readmee"}, "unknown variant 'readmee'; did you mean 'readme'?"),
        ({"corpus": "gsc_v3"}, "unknown corpus 'gsc_v3'; did you mean 'gsc_v"),
        ({"corpus": "nowhere/at/all"}, "--corpus nowhere/at/all: no such folder"),
        ({"corpus": "gsc_v2", "protocol": "gsc_v2-12-offical"}, "did you mean 'gsc_v2-12-official'?"),
        (
            {"protocol": "gsc_v2-12-hash"},
            "protocol gsc_v2-12-hash belongs to corpus gsc_v2, not to mini: use --corpus gsc_v2",
        ),
        ({"seed": -1}, "--seed -1"),
        ({"checkpoint": "none.pt"}, "--checkpoint none.pt: no such file"),
    ],
)
def test_wrong_options_name_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(**options)
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- names


def test_default_tag_names_variant_protocol_and_seed() -> None:
    assert make(seed=3).tag == "mini-mini-12-seed3"
    assert make(corpus="gsc_v2").tag == "base-gsc_v2-12-official-seed0"
    assert make(tag="mine").tag == "mine"


@pytest.mark.parametrize("tag", ["a/b", "../x", "a b", "", "ü/", "a\tb", "$x"])
def test_bad_tags_are_refused(tag: str) -> None:
    if tag == "":
        assert make(tag=tag).tag == "mini-mini-12-seed0"
        return
    with pytest.raises(UsageError, match="--tag"):
        make(tag=tag)


def test_changed_rules_get_a_protocol_name_of_their_own() -> None:
    plain = make(corpus="gsc_v2")
    assert plain.protocol is not None
    assert (plain.protocol_name, plain.protocol.benchmark) == ("gsc_v2-12-official", True)
    assert plain.protocol.expect["test"] == 4890
    words = make("protocol.words=yes,no", corpus="gsc_v2")
    percent = make("protocol.unknown_percentage=20", corpus="gsc_v2")
    names = {config.protocol_name for config in (plain, words, percent)}
    assert len(names) == 3
    assert all(name.startswith("gsc_v2-12-official") for name in names)
    assert words.protocol is not None
    assert (words.protocol.benchmark, words.protocol.expect) == (False, {})
    assert words.classes == ["yes", "no", "unknown", "silence"]
    assert make("protocol.words=yes,no", corpus="gsc_v2").protocol_name == words.protocol_name
    assert make("protocol.unknown_percentage=10", corpus="gsc_v2").protocol_name == plain.protocol_name
    assert make("protocol.words=yes,no", "protocol.name=two", corpus="gsc_v2").protocol_name == "two"


def test_a_synthetic_corpus_of_another_size_is_another_protocol() -> None:
    corpus = make().corpus
    assert corpus is not None
    assert make("corpus.speakers=7").protocol_name != "mini-12"
    assert make(f"corpus.speakers={corpus.speakers}").protocol_name == "mini-12"


def test_a_changed_front_end_gets_a_name_of_its_own() -> None:
    plain, changed = make(), make("frontend.coefficients=20")
    assert plain.frontend is not None and changed.frontend is not None
    assert plain.frontend.name == "iscas21"
    assert changed.frontend.name.startswith("iscas21-") and len(changed.frontend.name) == len("iscas21-") + 6
    assert changed.frontend.coefficients == 20
    again = make("frontend.coefficients=40")
    assert again.frontend is not None and again.frontend.name == "iscas21"
    assert make(corpus="gsc_v2").frontend == plain.frontend


def test_classes_follow_the_protocol() -> None:
    assert make().classes == [
        "yes",
        "no",
        "up",
        "down",
        "left",
        "right",
        "on",
        "off",
        "stop",
        "go",
        "unknown",
        "silence",
    ]
    listed = make(corpus="gsc_v2", protocol="gsc_v2-35-list")
    assert len(listed.classes) == 35 and listed.protocol is not None
    assert class_names(listed.protocol) == listed.protocol.words
    assert {"yes", "no", "on", "off"} <= set(listed.classes)


# --------------------------------------------------------------------------------------------------- folders as corpus


def test_a_folder_as_corpus(tmp_path: Path) -> None:
    (tmp_path / "my own words").mkdir()
    config = make("protocol.words=on,off", corpus="my own words", start=tmp_path)
    assert config.corpus is not None and config.protocol is not None
    assert (config.corpus.kind, config.corpus.name) == ("folder", "my_own_words")
    assert config.corpus.dir == str(tmp_path / "my own words")
    assert config.protocol.split == "auto"
    assert config.protocol_name.startswith("my_own_words-4-")
    assert config.variant == "base"
    assert config == make("protocol.words=on,off", corpus=str(tmp_path / "my own words") + "/")
    assert make(corpus="../my own words", start=tmp_path / "my own words").protocol_name == "my_own_words-12"


def test_a_separate_test_folder_is_another_protocol(tmp_path: Path) -> None:
    for name in ("words", "test a", "test b"):
        (tmp_path / name).mkdir()
    names = [make(corpus="./words", start=tmp_path).protocol_name]
    for name in ("test a", "test b"):
        config = make(f"corpus.test_dir={name}", corpus="./words", start=tmp_path)
        assert config.corpus is not None and config.corpus.test_dir == str(tmp_path / name)
        names.append(config.protocol_name)
    assert len(set(names)) == 3
    (tmp_path / "moved" / "test a").mkdir(parents=True)
    assert make("corpus.test_dir=moved/test a", corpus="./words", start=tmp_path).protocol_name == names[1]


def test_a_folder_named_like_a_known_corpus_has_a_place_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    config = make(corpus="./mini", start=tmp_path)
    assert config.corpus is not None
    assert (config.corpus.name, config.corpus.kind, config.variant) == ("mini-folder", "folder", "base")
    named = make(corpus="mini", start=tmp_path)
    assert named.corpus is not None and named.corpus.kind == "synthetic"


def test_a_folder_inside_the_repository_is_stored_relative_to_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("conf", "recipes"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(ROOT / name)
    (root / "data" / "own").mkdir(parents=True)
    config = make(corpus="own", root=root, start=root / "data")
    assert config.corpus is not None and config.corpus.dir == "data/own"


# ----------------------------------------------------------------------------------------------------------- feat-dir


def test_feature_files_bring_classes_and_protocol(tmp_path: Path) -> None:
    folder = write_features(
        tmp_path / "my feats", ["yes", "no"], protocol=json.dumps({"name": "lm-2"}), corpus="gsc_v2"
    )
    config = make(feat_dir="my feats", start=tmp_path)
    assert (config.classes, config.protocol_name, config.variant) == (["yes", "no"], "lm-2", "base")
    assert (config.feat_dir, config.corpus, config.frontend) == (str(folder), None, None)
    assert config.augment.waveform is False
    assert config.tag == "base-lm-2-seed0"
    bare = write_features(tmp_path / "bare files", ["a"])
    assert make(feat_dir=str(bare)).tag == "base-bare_files-seed0"


def test_feature_files_take_no_settings_of_corpus_and_front_end(tmp_path: Path) -> None:
    folder = str(write_features(tmp_path / "feats", ["yes", "no"]))
    for sets in ("protocol.words=yes", "corpus.seed=1", "frontend.hop=100"):
        with pytest.raises(UsageError, match="--feat-dir brings its own"):
            make(sets, feat_dir=folder)
    with pytest.raises(UsageError, match="--feat-dir brings its own"):
        make(feat_dir=folder, protocol="mini-12")


def test_unfit_feature_folders_are_one_line(tmp_path: Path) -> None:
    def fails(folder: Path, message: str) -> None:
        with pytest.raises(KestrelError) as caught:
            make(feat_dir=str(folder))
        assert message in str(caught.value) and "\n" not in str(caught.value)

    fails(tmp_path / "none", "train.h5 does not exist")
    damaged = write_features(tmp_path / "damaged", ["a"])
    (damaged / "validation.h5").write_bytes(b"no HDF5 at all")
    fails(damaged, "validation.h5 is not a readable HDF5 file")
    other = write_features(tmp_path / "other", ["a"])
    with h5py.File(other / "test.h5", "r+") as file:
        file.attrs["classes"] = json.dumps(["b"])
    fails(other, "test.h5 has other classes than train.h5")
    foreign = write_features(tmp_path / "foreign", ["a"], format="something else")
    fails(foreign, "is no feature file")
    broken = write_features(tmp_path / "broken", ["a"], protocol="{not json")
    fails(broken, "train.h5")


# -------------------------------------------------------------------------------------------------------- round trips


def test_a_saved_configuration_reads_back(tmp_path: Path) -> None:
    config = make("protocol.words=yes,no,on", "train.lr=1e-5", "feature.post=[{normalise: channel}]", tag="1e5", seed=2)
    (tmp_path / "config.yaml").write_text(save_text(config), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml", ROOT)
    assert to_dict(again) == to_dict(config)
    assert again == config
    assert type(again.model) is type(config.model)


def test_a_configuration_with_feature_files_reads_back(tmp_path: Path) -> None:
    config = make("retrain=null", feat_dir=str(write_features(tmp_path / "feats", ["yes", "no"])))
    (tmp_path / "config.yaml").write_text(save_text(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml", ROOT) == config


@pytest.mark.parametrize(("recipe", "variant"), RECIPES)
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_variant_resolves_for_every_corpus(
    recipe: str, variant: str, corpus: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = make(recipe=recipe, variant=variant, corpus=corpus)
    assert config.tag == f"{variant}-{config.protocol_name}-seed0"
    # In a root without results, so that the answer does not depend on what was run here.
    for name in ("conf", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    options = ["--recipe", recipe, "--variant", variant, "--corpus", corpus, "--dry-run"]
    plan(options, tmp_path, tmp_path / "plan", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"exp/{recipe}/{config.tag}:"
    assert [line.split()[1] for line in lines[1:]] == list("0123456")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf", "recipes"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_resolves_with_its_corpus(protocol: str) -> None:
    corpus = load_yaml(ROOT / "conf" / "protocols" / f"{protocol}.yaml")["corpus"]
    config = make(corpus=corpus, protocol=protocol)
    assert config.protocol_name == protocol
    assert config.protocol is not None and set(config.protocol.expect) <= {"train", "validation", "test"}


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_every_front_end_resolves(frontend: str) -> None:
    config = make(f"feature.frontend={frontend}")
    assert config.frontend is not None and config.frontend.name == frontend


@pytest.mark.parametrize(("recipe", "variant"), RECIPES)
def test_a_variant_is_a_small_delta_that_changes_something(recipe: str, variant: str) -> None:
    if variant == "base":
        assert load_yaml(ROOT / "recipes" / recipe / "recipe.yaml")["summary"]
        return
    text = (ROOT / "recipes" / recipe / "variants" / f"{variant}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# Parent: "), "says what it changes"
    base = to_dict(make(recipe=recipe, variant="base"))
    changed = to_dict(make(recipe=recipe, variant=variant))
    different = {key for key in base if base[key] != changed[key]} - {"variant", "tag"}
    assert bool(different) != ("Delta: none" in text), "a name for the base alone says so"
