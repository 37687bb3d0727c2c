"""Settings of the recipe: every variant builds the network that its README names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kestrel.models.inventory import parameters
from kestrel.nn.low_bit import LowBit
from kestrel.pipeline.config import Config, Options, resolve, variants
from kestrel.recipe.tinyspeech import build

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "recipes" / "tinyspeech" / "README.md").read_text(encoding="utf-8")
SHAPES = {"logmel": (48, 9), "logmel-fine": (98, 40), "logmel-chip": (48, 20)}


def config(variant: str) -> Config:
    return resolve(ROOT, Options(recipe="tinyspeech", variant=variant, corpus="gsc_v2"), ROOT)


@pytest.mark.parametrize("variant", variants(ROOT, "tinyspeech"))
def test_every_variant_is_in_the_readme(variant: str) -> None:
    assert f"`{variant}`" in README


@pytest.mark.parametrize(
    ("variant", "weights", "all_parameters"),
    [
        ("x+logmel", 10923, 12073),
        ("y+logmel", 6120, 7048),
        ("z+logmel", 2712, 3288),
        ("m+logmel", 4729, 4943),
        ("qp+logmel", 4327, 5077),
        ("qp4+logmel", 2857, 3319),
        ("mcu+logmel-chip", 2932, 3353),
        ("sep8+logmel-fine", 2084, 2392),
        ("sep16+logmel-fine", 4396, 4864),
    ],
)
def test_sizes_are_those_of_the_readme(variant: str, weights: int, all_parameters: int) -> None:
    shape = SHAPES[variant.rpartition("+")[2]]
    net = build(config(variant).model, shape, 12)
    assert sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, LowBit)) == weights
    assert parameters(net) == all_parameters
    assert f"{weights:,}" in README
    assert f"{all_parameters:,}" in README
    assert net(torch.randn(2, *shape)).shape == (2, 12)


@pytest.mark.parametrize(
    ("variant", "grid"), [("z", "8bit"), ("z-4bit", "4bitsym"), ("z-2bit", "2bitsym"), ("z-ternary", "ternary")]
)
def test_variants_of_z_differ_in_their_grid(variant: str, grid: str) -> None:
    made = config(variant).model
    assert (made.net, made.weights, made.quant_from) == ("z", grid, "retrain")


def test_the_map_of_the_original_has_its_places() -> None:
    net = build(config("z+full-map").model, (88, 12), 12)
    assert net.shapes(88)["first.conv"][1:] == (88, 12)
    assert net.macs(88) > 10 * build(config("z").model, (88, 12), 12).macs(88)
