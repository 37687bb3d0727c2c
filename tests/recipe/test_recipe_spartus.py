"""The delta recipe: the original's settings, what its variants switch on, joined variants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kestrel.models.inventory import parameters
from kestrel.pipeline.config import Config, Options, resolve, variants
from kestrel.recipe import spartus

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]


def _config(variant: str, *sets: str) -> Config:
    return resolve(ROOT, Options(recipe="spartus", variant=variant, corpus="gsc_v2", set=list(sets)), ROOT)


def test_settings_of_the_original() -> None:
    config = _config("base")
    model = config.model
    assert (model.rnn_type, model.rnn_layers, model.rnn_size) == ("GRU", 1, 64)
    assert config.frontend is not None and (config.frontend.name, config.frontend.mel_bands) == ("spartus", 16)
    assert config.retrain is not None
    assert (config.train.epochs, config.retrain.epochs, config.train.batch_size) == (20, 10, 32)
    assert (model.thx, model.thh, model.delta_from, model.beta) == ([0.1], [0.1], "retrain", 0)
    for phase in (config.train, config.retrain):
        assert (phase.optimizer, phase.lr[0], phase.weight_decay, phase.grad_clip) == ("adamw", 1e-3, 0.01, 200)
    net = spartus.build(model, (61, 16), 12)
    assert parameters(net) == 16_524 and net.macs(1) == 16_128
    assert vars(_config("delta").model) == vars(model)


@pytest.mark.parametrize("size", ["1x64", "1x128", "1x256", "1x512", "2x256", "2x512"])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_sizes_and_exact_pruning(kind: str, size: str) -> None:
    config = _config(f"{kind}+{size}+delta-cbtd")
    layers, units = map(int, size.split("x"))
    model = config.model
    assert (model.rnn_type, model.rnn_layers, model.rnn_size) == (kind.upper(), layers, units)
    net = spartus.build(model, (61, 16), 12)
    assert net.pruner is not None
    for name, balance in net.pruner.plan.items():
        rows = dict(net.named_parameters())[name].shape[0]
        assert balance.local(rows) % 16 == 0 and balance.kept(rows) * 16 == balance.local(rows), name


def test_what_variants_switch_on() -> None:
    for variant, retrain, start, pruned, threshold in (
        ("dense", False, "retrain", "none", 0.0),
        ("delta", True, "retrain", "none", 0.1),
        ("delta-scratch", False, "pretrain", "none", 0.1),
        ("cbtd", True, "retrain", "pretrain", 0.0),
        ("delta-cbtd", True, "retrain", "pretrain", 0.1),
    ):
        config = _config(variant)
        model = config.model
        assert (config.retrain is not None, model.delta_from, model.cbtd_from) == (retrain, start, pruned), variant
        assert model.thx == model.thh == [threshold], variant
        assert variant.endswith("cbtd") == (model.gamma_rnn == 15 / 16), variant
    fixed = _config("fixed").model
    assert (fixed.qa, fixed.qw, fixed.qc, fixed.qcw) == (1, 1, 1, 1)
    assert (fixed.aqi, fixed.aqf, fixed.nqi, fixed.nqf, fixed.wqi, fixed.wqf) == (3, 5, 2, 6, 1, 7)
    frames = _config("lstm+frames").model
    assert (frames.loss, frames.decision, frames.rnn_type) == ("frame", "last_speech", "LSTM")
    rows = _config("lstm+1x256+cbtd+rows64").model
    net = spartus.build(rows, (61, 16), 12)
    assert net.pruner is not None and {b.group for b in net.pruner.plan.values()} == {64}
    assert all(balance.kept(1024) == 1 and balance.local(1024) == 16 for balance in net.pruner.plan.values())


@pytest.mark.parametrize("variant", variants(ROOT, "spartus"))
def test_every_variant_builds_and_answers(variant: str) -> None:
    net = spartus.build(_config(variant).model, (9, 16), 12)
    net.set_phase("eval")
    assert net(torch.zeros(2, 9, 16)).shape == (2, 12)


def test_thresholds_may_be_given_by_layer() -> None:
    model = _config("2x256", "model.thx=0.1,0.2", "model.thh=0.05").model
    net = spartus.build(model, (9, 16), 12)
    net.set_phase("retrain")
    assert [(theta.x, theta.h) for theta in net.rnn.thresholds] == [(0.1, 0.05), (0.2, 0.05)]
