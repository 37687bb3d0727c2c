"""TinySpeech networks: published sizes, exact counts, integers, and streams that need only what is in their kernels."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from kestrel.errors import UsageError
from kestrel.frontend.post import Post
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.spotter import FEATURES, LOGITS, lower
from kestrel.models.inventory import decoded_weights, layers, parameters, weight_codes
from kestrel.models.quant_net import QuantNet
from kestrel.models.spotter import KeywordSpotter
from kestrel.models.tinyspeech import PLANS, SeparableNet, published_parameters
from kestrel.nn import channel_major, condenser, depthwise, low_bit
from kestrel.nn.condenser import Condenser
from kestrel.nn.low_bit import LowBit
from kestrel.recipe.tinyspeech import ModelSpec, build
from kestrel.score.count import thop_check

SHAPE = (24, 8)
SCALE = 2.0**-12
NETS: dict[str, dict[str, Any]] = {
    "x": {"net": "x"},
    "y": {"net": "y"},
    "z": {"net": "z"},
    "m": {"net": "m"},
    "z sigmoid": {"net": "z", "gate": "sigmoid"},
    "z strided": {"net": "z", "first_stride": [2, 2], "pools": [2, 2, 4, 2, 6, 4]},
    "z looks": {"net": "z", "looks": [-1, 1], "pools": [2, 1, 4, 2, 12, 4, 24, 1]},
    "x looks far": {"net": "x", "looks": [3, -2]},
    "qp": {"net": "qp"},
    "qp4": {"net": "qp", "qp_blocks": 4},
    "sep": {"net": "sep", "width": 12},
    "sep linear": {"net": "sep", "width": 12, "between": "none"},
    "mcu": {
        **{"net": "sep", "width": 12, "stride": 2, "causal": True, "condense": [2], "head": 20},
        "power_of_two": True,
    },
}


def net_of(name: str, shape: tuple[int, int] = SHAPE, **settings: Any) -> QuantNet:
    torch.manual_seed(2)
    return build(ModelSpec(**{**NETS[name], **settings}), shape, 12)


def features(seed: int, clips: int = 32, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    x = torch.randn(clips, *shape, generator=torch.Generator().manual_seed(seed))
    return (x + x.roll(1, 1) + x.roll(1, 2)).div_(SCALE).round_().mul_(SCALE)


def trained(net: QuantNet, steps: int = 6) -> QuantNet:
    """A few updates of both stages."""
    net.updates_per_epoch = steps
    for stage in ("pretrain", "retrain"):
        net.set_phase(stage)  # type: ignore[arg-type]
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for step in range(steps):
            optimizer.zero_grad()
            labels = torch.arange(32) % 12
            torch.nn.functional.cross_entropy(net(features(step)), labels).backward()
            optimizer.step()
            net.project()
    net.set_phase("eval")
    return net


def graph_of(net: QuantNet) -> IntegerGraph:
    return lower(KeywordSpotter(Post([], SHAPE), net), SCALE)


@pytest.mark.parametrize(("name", "published", "twelve"), [("x", 10847, 10923), ("z", 2678, 2712), ("m", 4649, 4729)])
def test_weights_are_as_many_as_published(name: str, published: int, twelve: int) -> None:
    """10.8 K, 2.7 K and 4.7 K with 10 classes; Y (6.1 K) with the number of last filters that fits it."""
    assert published_parameters(PLANS[name], 10) == published
    assert published_parameters(PLANS[name], 12) == twelve
    net = net_of(name)
    weights = sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, LowBit))
    assert weights == twelve


def test_y_fits_the_published_count() -> None:
    assert published_parameters(PLANS["y"], 10) == 6070


def test_qp_has_two_condensers_in_a_block() -> None:
    """First and last convolution and condensers of the original: 2,755 weights of four blocks without biases, 6 classes."""
    torch.manual_seed(0)
    net = build(ModelSpec(net="qp", qp_blocks=4), SHAPE, 6)
    assert sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, LowBit)) == 2755
    assert sum(isinstance(module, Condenser) for module in net.modules()) == 8


@pytest.mark.parametrize("name", NETS)
def test_counts_add_up(name: str) -> None:
    net = net_of(name)
    rows = layers(net, SHAPE[0])
    assert sum(row["parameters"] for row in rows) == parameters(net)
    assert sum(row["macs"] for row in rows) == net.macs(SHAPE[0]) > 0


@pytest.mark.parametrize("name", ["z", "m", "qp4", "sep", "mcu"])
def test_thop_counts_the_same(name: str) -> None:
    net = net_of(name)
    check = thop_check(net, *SHAPE)
    assert check.skipped == []
    assert check.compared is not None
    biases = 0 if name != "m" else check.compared - net.macs(SHAPE[0])  # thop counts an operation for each bias
    assert check.compared - biases == net.macs(SHAPE[0])


def test_macs_of_the_first_and_last_convolution() -> None:
    rows = {row["name"]: row for row in net_of("z strided").layer_table(SHAPE[0])}
    assert rows["first.conv"]["macs"] == 9 * 7 * 12 * 4
    assert rows["last.conv"]["macs"] == 9 * 7 * 17 * 12 * 4
    assert rows["blocks.2.embed.1.conv"]["macs"] == 14 * 2 * 2 * 1  # condensed by 6 x 4


@pytest.mark.parametrize("name", NETS)
def test_integers_are_the_fake_quant_network(name: str) -> None:
    net = trained(net_of(name, weights="4bitsym"))
    graph = graph_of(net)
    x = features(40, 60)
    found = graph.run(input_codes(x.numpy(), graph.tensors[FEATURES]))[LOGITS]
    step = graph.tensors[LOGITS].scale or 0.0
    with torch.no_grad(), decoded_weights(net, weight_codes(net, 8)):
        real = net.double()(x.double()).numpy()
    assert np.abs(found * step - real).mean() <= 0.02 * real.std() + 2 * step
    assert (found.argmax(1) == real.argmax(1)).mean() >= 0.95
    stored = {op.weight.storage for op, _ in graph.all_ops() if hasattr(op, "weight")}
    assert stored == {"odd4"}


@pytest.mark.parametrize("part", ["first.conv", "blocks.1.expand.1.conv", "last.conv", "classes"])
def test_layers_can_have_grids_of_their_own(part: str) -> None:
    net = trained(net_of("z", weights="ternary", layer_weights={part: "8bit"}))
    for name, layer in net.low_bit_layers().items():
        assert layer.grid is not None
        assert layer.grid.name == ("8bit" if name == part else "ternary")


def test_pruning_leaves_the_first_layer_and_the_classes_whole() -> None:
    net = trained(net_of("z", prune=0.5, prune_epochs=1))
    sparsity = {n: float((x.effective_weight() == 0).float().mean()) for n, x in net.low_bit_layers().items()}
    assert sparsity["first.conv"] < 0.2
    assert sparsity["classes"] < 0.2
    assert sparsity["last.conv"] >= 0.49
    assert net.weight_sparsity() > 0.4


def test_a_separable_network_looks_at_a_window_of_frames() -> None:
    """Before the mean, a frame depends on no more frames than its kernels hold: state of a stream is bounded."""
    net = net_of("sep", (40, 8), kernels=[3, 5, 3]).eval()
    assert isinstance(net, SeparableNet)
    x = torch.randn(1, 40, 8, requires_grad=True)
    v = net.blocks(net.first(net.columns(x)))
    v[0, :, 20].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum(2)[0].nonzero().flatten()
    assert seen.min() >= 20 - 4
    assert seen.max() <= 20 + 4


def test_a_causal_network_does_not_look_ahead() -> None:
    net = net_of("mcu", (40, 8), kernels=[5, 7]).eval()
    assert isinstance(net, SeparableNet)
    x = torch.randn(1, 40, 8, requires_grad=True)
    v = net.blocks(net.first(net.columns(x)))
    v[0, :, 9].sum().backward()  # made when frames 0 .. 18 were there
    assert x.grad is not None
    seen = x.grad.abs().sum(2)[0].nonzero().flatten()
    assert seen.max() == 18
    assert seen.min() >= 18 - 4 - 2 * 6


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"net": "z", "pools": [5, 2]}, "model.pools: a map of 24 x 8"),
        ({"net": "z", "looks": []}, r"model.looks: \[\]; give at least one"),
        ({"net": "z", "pools": [2]}, r"model.pools: \[2\]; give pairs"),
        ({"net": "sep", "kernels": [4, 3]}, "model.kernels"),
        ({"net": "sep", "condense": [1], "stride": 8}, "model.condense"),
        ({"net": "z", "weights": "5bitt"}, "unknown weight quantiser"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        build(ModelSpec(**settings), SHAPE, 12)


@pytest.mark.parametrize("name", ["z", "m", "qp"])
def test_the_layout_of_memory_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images lie batch last in the condensers: the same logits and gradients as PyTorch's layout and functions give."""
    spec = ModelSpec(
        net=cast(Any, name), first_stride=[2, 3], first_padding=[1, 0], pools=[2, 1, 2, 3, 4, 3], looks=[1, -2]
    )
    net = build(spec, (48, 9), 12)
    net.train()
    x = torch.randn(6, 48, 9, generator=torch.Generator().manual_seed(3))

    def found() -> list[torch.Tensor]:
        net.zero_grad()
        logits = net(x)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    fast = found()
    for place in (channel_major, condenser, depthwise, low_bit):
        monkeypatch.setattr(place, "fast_layouts", lambda _: False)
    for mine, other in zip(fast, found(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_condenser_that_died_in_training_has_an_integer_form() -> None:
    """Its embedding was zero for every clip that was seen, so that its range is the smallest there is."""
    net = net_of("z", weights="4bitsym")
    dead = net.get_submodule("blocks.2.embed.1.norm")
    with torch.no_grad():
        dead.weight.fill_(1e-3)  # type: ignore[union-attr,operator]
        dead.bias.fill_(-3)  # type: ignore[union-attr,operator]
    trained(net)
    assert float(net.get_submodule("blocks.2.embed.1.act").largest) == 0  # type: ignore[arg-type]
    graph = graph_of(net)
    x = features(40, 60)
    found = graph.run(input_codes(x.numpy(), graph.tensors[FEATURES]))[LOGITS]
    with torch.no_grad():
        assert (found.argmax(1) == net(x).argmax(1).numpy()).mean() >= 0.95


def test_a_channel_that_became_constant_leaves_the_others_their_precision() -> None:
    """Pruned to one input that is constant itself: batch normalisation divides it by the root of its epsilon alone."""
    net = trained(net_of("z looks", weights="8bit"))
    depthwise, pointwise = (net.get_submodule(f"blocks.1.expand.{part}") for part in ("0.unit", "1"))
    sums: list[torch.Tensor] = []
    with torch.no_grad():
        depthwise.conv.weight[1] = 0  # type: ignore[union-attr,index,operator]
        depthwise.norm.running_mean[1], depthwise.norm.bias[1] = 0.0, 0.9  # type: ignore[union-attr,index,operator]
        pointwise.conv.weight[6] = 0  # type: ignore[union-attr,index,operator]
        pointwise.conv.weight[6, 1] = 200.0  # type: ignore[union-attr,index,operator]
        for part in (depthwise, pointwise):
            part.conv.find_step()  # type: ignore[union-attr,operator]
        hook = pointwise.conv.register_forward_hook(lambda *call: sums.append(call[2][:, 6]))  # type: ignore[union-attr,operator]
        x = features(40, 60)
        net(x)
        hook.remove()
        assert sums[0].unique().numel() == 1 and float(sums[0].mean()) > 10
        norm = pointwise.norm
        norm.running_mean[6], norm.running_var[6], norm.weight[6] = sums[0].mean(), 1e-18, 4.0  # type: ignore[union-attr,index,operator]
        graph = graph_of(net)
        found = graph.run(input_codes(x.numpy(), graph.tensors[FEATURES]))[LOGITS]
        assert (found.argmax(1) == net(x).argmax(1).numpy()).mean() >= 0.95
    (rescale,) = (op.rescale for op in graph.ops if op.outputs == ("blocks_1_expand_1_conv",))  # type: ignore[attr-defined]
    assert rescale.multipliers[6] == 0 and max(rescale.multipliers[:6]) >= 1 << 15
