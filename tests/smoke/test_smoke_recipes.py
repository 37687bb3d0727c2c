"""Every recipe and variant through all stages on a tiny corpus, and what a second start does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_kit import ROOT, Checkout

SHORT = ("train.epochs=1", "train.batch_size=32", "train.eval_batch_size=64", "retrain.epochs=1")
# Variants for feature files made elsewhere get features of the tiny corpus, made by this front end.
FEATURES_OF = {"logmel": "logmel40"}
RECIPES = [
    (folder.name, variant)
    for folder in sorted((ROOT / "recipes").iterdir())
    if (folder / "recipe.yaml").exists()
    for variant in ["base", *sorted(path.stem for path in (folder / "variants").glob("*.yaml"))]
]

pytestmark = pytest.mark.smoke


def _sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _features(checkout: Checkout, corpus: Path, frontend: str) -> Path:
    done = checkout.run(
        "--corpus",
        str(corpus),
        "--tag",
        f"make-{frontend}",
        "--stop-stage",
        "2",
        *_sets(f"feature.frontend={frontend}"),
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (checkout.root / "feat").glob(f"*/*/{frontend}")
    return folder


@pytest.mark.parametrize(("recipe", "variant"), RECIPES)
def test_recipe_runs_through_all_stages(checkout: Checkout, tiny_corpus: Path, recipe: str, variant: str) -> None:
    """Trains, scores and exports; the second start finds every stage up to date."""
    tag = f"smoke-{variant}"
    options = ["--recipe", recipe, "--variant", variant, "--tag", tag, *_sets(*SHORT)]
    if variant in FEATURES_OF:
        options += ["--feat-dir", str(_features(checkout, tiny_corpus, FEATURES_OF[variant]))]
    else:
        options += ["--corpus", str(tiny_corpus)]
    first = checkout.run(*options)
    assert first.returncode == 0, first.stderr
    exp = checkout.root / "exp" / recipe / tag
    result = json.loads((exp / "score" / "result.json").read_text())
    scored = (exp / "score" / "scores.csv").read_text().splitlines()
    assert result["n"] == len(scored) - 1 > 0
    assert result["ci95"][0] <= result["accuracy"] <= result["ci95"][1]
    assert result["weight_bytes"] == (exp / "export" / "weights.bin").stat().st_size
    assert f"{100 * result['accuracy']:.2f} %" in first.stdout
    for name in ("report.md", "confusion.png", "curves.png"):
        assert (exp / "score" / name).stat().st_size > 0
    for name in ("card.md", "model.onnx", "codes.npz"):
        assert (exp / "export" / name).stat().st_size > 0

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
