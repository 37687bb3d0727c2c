"""The 8-bit LSTM: its variants, its size, what it shares with the network of parallel blocks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kestrel.models.inventory import parameters
from kestrel.pipeline.config import Options, resolve, variants
from kestrel.pipeline.stages import Run, present
from kestrel.recipe import hello_edge_lstm, iscas21_lstm

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "hello_edge_lstm"
# Weights and biases of an LSTM with two biases and its read-out, for 12 classes: 4 H (I + H) + 8 H + 12 H + 12.
COUNTS = {(118, 10): 62_788, (118, 40): 76_948, (344, 10): 493_996, (344, 40): 535_276}
RANGES = 13 + 2  # clipping ranges of the cell and of the read-out, which the published counts leave out
PAPER = [
    (f"8w8a-{hidden}{suffix}{fixed}", hidden, width, fixed == "")
    for hidden in (118, 344)
    for suffix, width in (("", 10), ("-40", 40))
    for fixed in ("", "-fixed")
]


def settings(variant: str) -> hello_edge_lstm.ModelSpec:
    return resolve(ROOT, Options(recipe=RECIPE, variant=variant, corpus="gsc_v2"), ROOT).model


@pytest.mark.parametrize(("variant", "hidden", "width", "trained"), PAPER)
def test_size_and_settings_of_the_table(variant: str, hidden: int, width: int, trained: bool) -> None:
    config = resolve(ROOT, Options(recipe=RECIPE, variant=variant, corpus="gsc_v2"), ROOT)
    model = config.model
    assert (model.quant_inp, model.quant_actMVM, model.quant_actNM, model.quant_w) == (8, 8, 8, 8), "tied"
    assert (model.hidden, model.n_msb, model.pact_a, model.drop_p, model.noise_eval) == (hidden, 1, trained, 0, 0)
    assert config.frontend is not None and config.frontend.coefficients == width
    assert (config.train.batch_size, config.train.steps, config.train.lr_steps) == (100, 30_000, [10_000, 10_000])
    assert config.train.lr == [5e-4, 1e-4, 2e-5] and config.retrain is None
    net = hello_edge_lstm.build(model, (49, width), 12)
    assert parameters(net) == COUNTS[hidden, width] + RANGES
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == COUNTS[hidden, width] + RANGES * trained
    assert net.macs(49) == 49 * 4 * hidden * (width + hidden) + 12 * hidden


def test_the_weight_quantiser_spends_its_levels_inside_the_weights_bound() -> None:
    torch.manual_seed(0)
    net = hello_edge_lstm.build(settings("8w8a-118"), (49, 10), 12)
    with torch.no_grad():
        for parameter in (net.lstm.w_ih, net.lstm.b_ih, net.readout.weight):
            parameter.copy_(torch.linspace(-3, 3, parameter.numel()).view_as(parameter))
    net.project()
    for group in net.weight_groups():
        assert (group.bits, group.limit) == (8, 1.0), group.name
        assert group.tensor.abs().max() <= 127 / 128
    assert len(net.weight_groups()[0].tensor.unique()) == 255
    assert net.penalty().keys() == {"range_l2"}


def test_it_is_the_block_of_the_other_recipe() -> None:
    ours, theirs = (
        {field.name: field.type for field in dataclasses.fields(spec)}
        for spec in (hello_edge_lstm.ModelSpec, iscas21_lstm.ModelSpec)
    )
    assert ours == theirs
    assert hello_edge_lstm.build is iscas21_lstm.build


def test_there_is_no_stage_4_unless_it_is_asked_for(tmp_path: Path) -> None:
    config = resolve(ROOT, Options(recipe=RECIPE, variant="mini"), ROOT)
    run = Run(ROOT, tmp_path, config)
    assert present(run, "retrain") == f"recipe {RECIPE} has no such stage"
    assert run.checkpoint() == ("pretrain", tmp_path / "pretrain" / "best.pt")
    noisy = resolve(
        ROOT, Options(recipe=RECIPE, variant="mini", set=["retrain.steps=5", "model.noise_train=0.1"]), ROOT
    )
    assert noisy.retrain is not None and noisy.retrain.steps == 5
    assert present(Run(ROOT, tmp_path, noisy), "retrain") is None


def test_the_names_of_the_table_are_there() -> None:
    assert {name for name, *_ in PAPER} | {"base", "mini", "logmel", "logmel-10", "masks"} == set(
        variants(ROOT, RECIPE)
    )
