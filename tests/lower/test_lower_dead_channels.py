"""Dead channels leave the graph and change no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kestrel.frontend.post import Post
from kestrel.lower import spotter as lowering
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.ops import PRODUCTS
from kestrel.lower.spotter import FEATURES, LOGITS, lower
from kestrel.models.quant_net import QuantNet
from kestrel.models.spotter import KeywordSpotter
from kestrel.recipe.tinyspeech import ModelSpec, build

SHAPE = (24, 9)


def pruned(grid: str, **settings: object) -> QuantNet:
    torch.manual_seed(0)
    model = {
        **{"net": "z", "first_stride": [2, 3], "first_padding": [1, 0], "last_padding": [0, 0], "pools": [2, 1]},
        **{"head_pool": [2, 1], "prune": 0.5, "prune_unit": "channel", "prune_epochs": 0, "weights": grid},
        "prune_not": ["first*", "classes", "*.expand.1.*"],
        **settings,
    }
    net = build(ModelSpec(**model), SHAPE, 12)  # type: ignore[arg-type]
    for stage in ("pretrain", "retrain"):
        net.set_phase(stage)  # type: ignore[arg-type]
        for seed in range(5):
            net(torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(seed)))
    for module in net.modules():  # offsets that make dead channels a constant other than 0
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.bias, 0.1, 0.6)
    net.set_phase("eval")
    return net


def size(graph: IntegerGraph) -> int:
    return sum(op.weight.values.size for op, _ in graph.all_ops() if isinstance(op, PRODUCTS))


@pytest.mark.parametrize("grid", ["8bit", "4bitsym", "ternary"])
@pytest.mark.parametrize("net", [{}, {"net": "qp", "qp_blocks": 2}, {"net": "m"}])
def test_answers_stay_and_weights_go(monkeypatch: pytest.MonkeyPatch, grid: str, net: dict) -> None:
    spotter = KeywordSpotter(Post([], SHAPE), pruned(grid, **net))
    small = lower(spotter, 2.0**-8)
    monkeypatch.setattr(lowering, "without_dead_channels", lambda graph: graph)
    whole = lower(spotter, 2.0**-8)
    rng = np.random.default_rng(0)
    codes = rng.integers(-1500, 1500, (40, *SHAPE))
    trace: dict = {}
    assert (small.run(codes, trace=trace)[LOGITS] == whole.run(codes)[LOGITS]).all()
    small.check_trace(trace)
    assert small.tensors[FEATURES].shape == SHAPE
    assert size(small) < 0.8 * size(whole)


def test_a_graph_without_dead_channels_stays_itself() -> None:
    net = pruned("8bit", prune=0.0)
    graph = lower(KeywordSpotter(Post([], SHAPE), net), 2.0**-8)
    assert lowering.without_dead_channels(graph) is graph
