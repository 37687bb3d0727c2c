"""Every recipe and variant through all stages on a tiny corpus, and what a second start does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from run_kit import ROOT, Checkout, write_tone_corpus

from kestrel import recipe as recipes
from kestrel.pipeline.config import load_config, variant_data, variants
from kestrel.pipeline.plan import main as plan
from kestrel.pipeline.stages import STAGES, Run, done_file, present
from kestrel.pipeline.step import Body, _work
from kestrel.train import loop

TRAINING = {"train": 4, "validation": 2, "test": 2}  # speakers; 10 keywords each: at most 64 clips in each split
HALF = "protocol.clip_samples=8000"  # half the steps of a recurrent network, whose ONNX graph is unrolled
WHOLE_CLIPS = ("tinyspeech",)  # recipes whose variants are made for clips of a second
# Through run.sh and with the C program: every recipe, and once features that were made elsewhere.
WHOLE = [*((recipe, "base") for recipe in recipes.names(ROOT)), (recipes.names(ROOT)[0], "logmel")]
JOINED = [("hello_edge_lstm", "8w8a-344-40-fixed+logmel-10"), ("proxylessnas_kws", "net-5+8w8a+logmel")]
# Deltas that fit only a network of another variant.
PARENTS = {("tinyspeech", "logmel-chip"): "mcu+", ("tinyspeech", "logmel-fine"): "sep16+"}
VARIANTS = [
    (recipe, PARENTS.get((recipe, variant), "") + variant)
    for recipe in recipes.names(ROOT)
    for variant in variants(ROOT, recipe)
] + JOINED
REST = [which for which in VARIANTS if which not in WHOLE]
# Settings that make a recipe or variant small enough, where a short training alone does not.
SMALL = {
    "bit-serial": ("model.n_msb=1",),  # its ONNX graph has products for each slice, block and step
    "proxylessnas_kws": (
        "model.n_cell_stages=3",
        "model.expansions=1,2",
        "model.search.warmup_epochs=0",
        "model.search.arch_start_epoch=0",
    ),
}

pytestmark = pytest.mark.smoke


def _sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _short(root: Path, recipe: str, variant: str) -> list[str]:
    """One epoch of each phase that the variant has."""
    phases = [phase for phase in ("train", "retrain") if variant_data(root, recipe, variant).get(phase) is not None]
    lengths = (f"{phase}.epochs=1" for phase in phases)
    return _sets(
        *lengths, "train.batch_size=16", "train.eval_batch_size=64", *SMALL.get(recipe, ()), *SMALL.get(variant, ())
    )


def _wants_features(variant: str) -> bool:
    """Whether a variant is made for feature files from elsewhere; it gets features of front end logmel40."""
    return "logmel" in variant


def _length(recipe: str) -> tuple[str, ...]:
    return () if recipe in WHOLE_CLIPS else (HALF,)


def _features(checkout: Checkout, corpus: Path, recipe: str) -> Path:
    name = "whole-clips" if recipe in WHOLE_CLIPS else "half-clips"
    folder = checkout.root / "feat" / corpus.name.replace(" ", "_") / name / "logmel40"
    if not (folder / "test.h5").exists():
        sets = _sets("feature.frontend=logmel40", f"protocol.name={name}", *_length(recipe))
        done = checkout.run("--corpus", str(corpus), "--tag", f"make-{name}", "--stop-stage", "2", *sets)
        assert done.returncode == 0, done.stderr
    return folder


def _data(checkout: Checkout, corpus: Path, recipe: str, variant: str) -> list[str]:
    if _wants_features(variant):
        return ["--feat-dir", str(_features(checkout, corpus, recipe))]
    return ["--corpus", str(corpus), *_sets(*_length(recipe))]


@pytest.fixture(scope="session")
def few_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of at most 64 clips in each split."""
    return write_tone_corpus(tmp_path_factory.mktemp("corpora") / "few clips", TRAINING)


def _check_files(exp: Path, *exported: str) -> dict:
    result = json.loads((exp / "score" / "result.json").read_text())
    scored = (exp / "score" / "scores.csv").read_text().splitlines()
    assert result["n"] == len(scored) - 1 > 0
    assert result["ci95"][0] <= result["accuracy"] <= result["ci95"][1]
    assert result["weight_bytes"] == (exp / "export" / "weights.bin").stat().st_size
    for name in ("report.md", "confusion.png", "curves.png"):
        assert (exp / "score" / name).stat().st_size > 0
    for name in ("card.md", "model.onnx", "codes.npz", *exported):
        assert (exp / "export" / name).stat().st_size > 0
    return result


@pytest.mark.parametrize(("recipe", "variant"), WHOLE)
def test_recipe_runs_through_all_stages(checkout: Checkout, few_clips: Path, recipe: str, variant: str) -> None:
    """Trains, scores and exports; the second start finds every stage up to date."""
    tag = f"smoke-{variant}"
    options = ["--recipe", recipe, "--variant", variant, "--tag", tag, *_short(checkout.root, recipe, variant)]
    options += _data(checkout, few_clips, recipe, variant)
    first = checkout.run(*options, timeout=300)
    assert first.returncode == 0, first.stderr
    exp = checkout.root / "exp" / recipe / tag
    result = _check_files(exp)
    assert f"{100 * result['accuracy']:.2f} %" in first.stdout

    before = {path: path.read_bytes() for path in sorted((exp / "score").iterdir())}
    second = checkout.run(*options)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("up to date") + second.stderr.count("nothing to do") >= 4
    assert "not yet run" not in second.stderr
    forced = checkout.run(*options, "--stage", "5", "--stop-stage", "5", "--force")
    assert forced.returncode == 0, forced.stderr
    after = {path: path.read_bytes() for path in sorted((exp / "score").iterdir())}
    assert {p.name for p in before} == {p.name for p in after}
    assert all(before[path] == after[path] for path in before if path.name != ".done.json")


@pytest.mark.parametrize(("recipe", "variant"), REST)
def test_variant_trains_scores_and_exports(
    checkout: Checkout,
    few_clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recipe: str,
    variant: str,
) -> None:
    """The stages of every variant, one epoch, in this process and without C program; then all of them are up to date."""
    monkeypatch.setattr(loop, "draw_curves", lambda path, rows, title: path.write_text(title))
    torch.set_num_threads(1)
    root, tag = checkout.root, f"variant-{variant}"
    data = _data(checkout, few_clips, recipe, variant)
    settings = [*_short(root, recipe, variant), *_sets("export.c=false", "export.vectors=0")]
    plan(["--recipe", recipe, "--variant", variant, "--tag", tag, *data, *settings], root, tmp_path / "plan", tmp_path)
    exp = root / "exp" / recipe / tag
    run = Run(root, exp, load_config(exp / "config.yaml", root))
    for again in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "kestrel"):
            for stage in STAGES:
                _work(run, stage.name, _body(root, stage.name), False)
                assert present(run, stage.name) is not None or done_file(run.out(stage.name)).exists()
        assert ("(not yet run)" in caplog.text) is not again, caplog.text
    _check_files(exp)
    assert json.loads((exp / "score" / "result.json").read_text())["n"] <= 64


def _body(root: Path, stage: str) -> Body:
    """What a step script does."""
    spec = importlib.util.spec_from_file_location(f"step_{stage}", root / "steps" / f"{stage}.py")
    assert spec is not None and spec.loader is not None
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    return step.work
