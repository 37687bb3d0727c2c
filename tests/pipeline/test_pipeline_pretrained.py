"""Checkpoints kept with a recipe: written small, verified, scored by --pretrained."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from run_kit import ROOT, Checkout, copy_code

from kestrel import recipe as recipes
from kestrel.errors import KestrelError, UsageError
from kestrel.frontend.post import Post
from kestrel.models.compact import state_of
from kestrel.models.spotter import KeywordSpotter
from kestrel.pipeline import keep_pretrained
from kestrel.pipeline.config import variant_data
from kestrel.pipeline.keep_pretrained import LIMIT, keep
from kestrel.pipeline.pretrained import find, folder, kept
from kestrel.pipeline.stages import Run
from kestrel.pipeline.step import load_config
from kestrel.settings import build, to_dict
from kestrel.store.atomic import write_json
from kestrel.store.checkpoint import load
from kestrel.store.hashing import sha256_file

RECIPE, VARIANT, LARGE = "hello_edge_lstm", "8w8a-118+logmel", "8w8a-344+logmel"
CLASSES = ["yes", "no", "silence"]
KEPT = [(recipe, variant) for recipe in recipes.names(ROOT) for variant in kept(ROOT, recipe)]


def write_features(place: Path) -> Path:
    """Feature files of 98 frames x 40 bands, whose classes differ in their mean."""
    place.mkdir(parents=True)
    centres = np.random.default_rng(9).normal(size=(len(CLASSES), 1, 40))
    for seed, (split, clips) in enumerate((("train", 48), ("validation", 15), ("test", 24))):
        draw = np.random.default_rng(seed)
        labels = np.arange(clips) % len(CLASSES)
        with h5py.File(place / f"{split}.h5", "w") as file:
            file.attrs.update({"format": "kestrel-features-1", "classes": json.dumps(CLASSES), "split": split})
            file.attrs.update({"corpus": "tones", "frontend": '{"name": "made"}', "protocol": '{"name": "three"}'})
            file["features"] = (centres[labels] + 2 * draw.normal(size=(clips, 98, 40))).astype(np.float32)
            file["labels"] = labels.astype(np.int64)
            names = [f"{CLASSES[label]}/s{row:03d}_nohash_0" for row, label in enumerate(labels)]
            file.create_dataset("utt_id", data=names, dtype=h5py.string_dtype())
            file.create_dataset("speaker", data=[f"s{row:03d}" for row in range(clips)], dtype=h5py.string_dtype())
    return place


class Site:
    """A copy of the code with feature files, and runs of the recipe on them."""

    def __init__(self, checkout: Checkout, feats: Path) -> None:
        self.checkout, self.root, self.feats = checkout, checkout.root, feats

    def start(self, *options: str, variant: str = VARIANT) -> subprocess.CompletedProcess[str]:
        """Train one epoch, or score."""
        known = ["--recipe", RECIPE, "--variant", variant, "--feat-dir", str(self.feats), "--stop-stage", "5"]
        return self.checkout.run(*known, *options)

    def run(self, tag: str) -> Run:
        """The run of a tag."""
        exp = self.root / "exp" / RECIPE / tag
        return Run(self.root, exp, load_config(exp / "config.yaml", self.root))

    def result(self, tag: str) -> dict:
        """Its result.json."""
        return json.loads((self.root / "exp" / RECIPE / tag / "score" / "result.json").read_text())

    def answers(self, tag: str) -> list[list[str]]:
        """Its scores.csv."""
        with (self.root / "exp" / RECIPE / tag / "score" / "scores.csv").open() as file:
            return list(csv.reader(file))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A trained run `first`, whose checkpoint is kept."""
    checkout = copy_code(tmp_path_factory.mktemp("pretrained") / "kestrel copy")
    for recipe in recipes.names(checkout.root):  # the tests do not depend on what is kept here
        for path in folder(checkout.root, recipe).glob("*"):
            path.unlink()
    made = Site(checkout, write_features(tmp_path_factory.mktemp("feats") / "three"))
    done = made.start("--tag", "first", "--set", "train.epochs=1", "--set", "train.batch_size=16", "--keep-pretrained")
    assert done.returncode == 0, done.stderr
    assert "kept recipes/hello_edge_lstm/pretrained/8w8a-118+logmel.pt" in done.stderr
    return made


def test_the_kept_file_is_small_and_described(site: Site) -> None:
    place = find(site.root, RECIPE, VARIANT)
    facts = json.loads(place.with_suffix(".json").read_text())
    assert (facts["sha256"], facts["bytes"]) == (sha256_file(place), place.stat().st_size)
    assert facts["parameters"] < facts["bytes"] < facts["parameters"] + 20_000
    result = site.result("first")
    for key in ("accuracy", "integer_accuracy", "n", "split", "protocol", "parameters"):
        assert facts[key] == result[key], key
    assert (facts["recipe"], facts["variant"], facts["licence"]) == (RECIPE, VARIANT, "Apache-2.0")
    assert facts["trained_checkpoint_sha256"] == result["checkpoint_sha256"]
    text = place.with_suffix(".md").read_text()
    for shown in (facts["sha256"], f"{100 * facts['accuracy']:.2f} %", facts["command"], "Apache-2.0", "`three`"):
        assert shown in text
    assert str(site.feats) not in text + json.dumps(facts)
    left = {path.name for path in place.parent.iterdir()}
    assert left == {f"{VARIANT}{end}" for end in (".pt", ".json", ".md")}


def test_pretrained_scores_the_kept_file_without_training(site: Site) -> None:
    done = site.start("--pretrained", "--stage", "5")
    assert done.returncode == 0, done.stderr
    tag = f"{VARIANT}-three-pretrained"
    assert site.answers(tag) == site.answers("first")
    assert site.result(tag)["checkpoint_sha256"] == sha256_file(find(site.root, RECIPE, VARIANT))
    assert site.result(tag)["command"].endswith("--pretrained")
    whole = site.start("--pretrained", "--dry-run")
    assert [line.split()[1] for line in whole.stdout.splitlines()[1:]] == ["5"]
    replay = subprocess.run(
        ["bash", str(site.root / "exp" / RECIPE / tag / "command.sh"), "--stage", "5", "--stop-stage", "5"],
        env=site.checkout.environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert replay.returncode == 0 and "up to date" in replay.stderr


@pytest.mark.parametrize("broken", ["changed", "undescribed"])
def test_a_file_that_is_not_the_described_one_is_refused(site: Site, broken: str) -> None:
    place = find(site.root, RECIPE, VARIANT)
    damaged = place if broken == "changed" else place.with_suffix(".json")
    before = damaged.read_bytes()
    try:
        if broken == "changed":
            damaged.write_bytes(before[:-1] + b"?")
        else:
            damaged.unlink()
        done = site.start("--pretrained", "--stage", "5")
    finally:
        damaged.write_bytes(before)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert ("SHA-256" if broken == "changed" else "is missing") in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--variant", "8w8a-344"],
            "no checkpoint of hello_edge_lstm, variant 8w8a-344; there is one for --variant 8w8a",
        ),
        (["--checkpoint", "run.sh"], "--pretrained and --checkpoint: give one of them"),
        (["--stage", "3", "--stop-stage", "4"], "stages 3 and 4 have nothing to train"),
        (["--keep-pretrained"], "--keep-pretrained keeps the weights of one run that trains"),
        (["--recipe", "iscas21_lstm", "--variant", "logmel"], "the recipe keeps none"),
    ],
)
def test_wrong_uses_are_one_line(site: Site, options: list[str], message: str) -> None:
    done = site.start("--pretrained", *options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


def test_other_settings_than_those_of_the_variant_are_not_kept(site: Site) -> None:
    sets = ["--set", "model.hidden=9", "--set", "feature.post=[{average: 2}]", "--set", "train.epochs=1"]
    done = site.start("--tag", "other", *sets, "--stop-stage", "3", "--keep-pretrained")
    assert done.returncode == 1
    assert "not kept: the run changes model.hidden, feature.post of variant 8w8a-118+logmel" in done.stderr
    assert kept(site.root, RECIPE) == [VARIANT]


def test_a_large_or_unfinished_network_is_not_kept(site: Site) -> None:
    unfinished = site.start("--tag", "large", "--set", "train.epochs=1", "--dry-run", variant=LARGE)
    assert unfinished.returncode == 0
    done = site.start("--tag", "large", "--set", "train.epochs=1", "--stop-stage", "3", variant=LARGE)
    assert done.returncode == 0, done.stderr
    with pytest.raises(
        KestrelError, match=r"not kept: the checkpoint of 8w8a-344\+logmel has 5\d\d,\d{3} bytes"
    ) as caught:
        keep(site.run("large"))
    assert "300,000" in str(caught.value) and "\n" not in str(caught.value)
    (site.run("large").out("pretrain") / ".done.json").unlink()
    with pytest.raises(KestrelError, match="not kept: stage 3 pretrain of the run is not finished"):
        keep(site.run("large"))
    assert kept(site.root, RECIPE) == [VARIANT]


def test_a_failure_while_it_is_measured_leaves_the_old_file(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    place = find(site.root, RECIPE, VARIANT)
    before = {path: path.read_bytes() for path in place.parent.iterdir()}

    def fail(run: Run) -> list[str]:
        raise KestrelError("no score")

    monkeypatch.setattr(keep_pretrained, "score_stage", fail)
    with pytest.raises(KestrelError, match="no score"):
        keep(site.run("first"))
    assert {path: path.read_bytes() for path in place.parent.iterdir()} == before


def test_a_setting_that_came_later_has_its_default(site: Site) -> None:
    """Files outlive the settings that were known when they were written."""
    from kestrel.pipeline.work import load_checkpoint
    from kestrel.store.checkpoint import save

    run = site.run("first")
    path = run.out("pretrain") / "best.pt"
    before, content = path.read_bytes(), load(path)
    try:
        del content["identity"]["model"]["cs"]  # 0 in the run, as is its default
        save(path, content)
        assert load_checkpoint(run)[1]["model"] == to_dict(run.config.model)
        content["identity"]["model"]["hidden"] = 117
        save(path, content)
        with pytest.raises(KestrelError, match="another configuration: its model.hidden is 117, the run has 118$"):
            load_checkpoint(run)
    finally:
        path.write_bytes(before)


def test_find_in_a_root_of_its_own(tmp_path: Path) -> None:
    place = folder(tmp_path, "r")
    with pytest.raises(UsageError, match="no checkpoint of r, variant v; the recipe keeps none"):
        find(tmp_path, "r", "v")
    place.mkdir(parents=True)
    (place / "v.pt").write_bytes(b"weights")
    (place / ".tmp-x.pt").write_bytes(b"")
    write_json(place / "v.json", {"sha256": sha256_file(place / "v.pt")})
    assert find(tmp_path, "r", "v") == place / "v.pt"
    assert kept(tmp_path, "r") == ["v"]


@pytest.mark.parametrize(("recipe", "variant"), KEPT)
def test_what_is_kept_here_loads_into_its_variant(recipe: str, variant: str) -> None:
    path = find(ROOT, recipe, variant)
    assert path.stat().st_size <= LIMIT and path.with_suffix(".md").exists()
    content = load(path)
    who, module, data = content["identity"], recipes.load(recipe, ROOT), variant_data(ROOT, recipe, variant)
    model = build(module.ModelSpec, data["model"], "model")
    assert (who["recipe"], who["variant"]) == (recipe, variant)
    assert to_dict(build(module.ModelSpec, who["model"])) == to_dict(model)
    post = Post(who["post"], tuple(who["input_shape"]))
    spotter = KeywordSpotter(post, module.build(model, post.output_shape, len(who["classes"])))
    spotter.load_state_dict(state_of(content))
    assert all(torch.isfinite(value).all() for value in spotter.state_dict().values())
