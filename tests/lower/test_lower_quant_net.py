"""Networks trained with few bits: integers are the fake-quant network, code for code, and keep the trained weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lower_kit import FEATURE_SCALE, FRAMES, WIDTH, codes_of, features
from quant_kit import LowBitNet, trained

from kestrel.errors import KestrelError
from kestrel.export.c_pack import pack_rows
from kestrel.frontend.post import Post
from kestrel.lower.graph import IntegerGraph, Trace
from kestrel.lower.ops import PRODUCTS, Op, weight_rows
from kestrel.lower.spotter import LOGITS, lower
from kestrel.models.inventory import decoded_weights, weight_codes
from kestrel.models.quant_net import LowBitPlan
from kestrel.models.spotter import KeywordSpotter

GRIDS = ("8bit", "4bit", "4bitsym", "2bitsym", "ternary", "binary", "fp130", "dorefa4", "dorefa1")


def lowered(net: LowBitNet) -> IntegerGraph:
    return lower(KeywordSpotter(Post([], (FRAMES, WIDTH)), net), FEATURE_SCALE)


def traced(graph: IntegerGraph, seed: int, clips: int) -> tuple[np.ndarray, Trace]:
    trace: Trace = {}
    logits = graph.run(codes_of(graph, features(seed, clips)), trace=trace)[LOGITS]
    graph.check_trace(trace)
    return logits * (graph.tensors[LOGITS].scale or 0.0), trace


def on_grid(seed: int, clips: int) -> torch.Tensor:
    """Features as the integer model reads them."""
    return (features(seed, clips) / FEATURE_SCALE).round() * FEATURE_SCALE


@pytest.mark.parametrize("grid", GRIDS)
def test_logits_are_those_of_the_fake_quant_network(grid: str) -> None:
    torch.manual_seed(1)
    net = trained(LowBitNet(LowBitPlan(grid, per_output=grid != "ternary")))
    graph = lowered(net)
    found, trace = traced(graph, 6, 400)
    with torch.no_grad():
        real = net.double()(on_grid(6, 400).double()).numpy()
    step = graph.tensors[LOGITS].scale
    assert step is not None
    different = np.abs(found - real).max(1) > 4 * step
    assert different.mean() <= 0.02, np.abs(found - real).max() / step
    assert (found.argmax(1) == real.argmax(1)).mean() >= 0.995
    assert trace["first"].max() > 20  # the codes are in use


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_arrive_as_they_were_trained(grid: str) -> None:
    torch.manual_seed(1)
    net = trained(LowBitNet(LowBitPlan(grid)))
    codes = weight_codes(net, 8)
    graph = lowered(net)
    ops: dict[str, Any] = {op.outputs[0]: op for op, _ in graph.all_ops()}
    for name in ("first", "depthwise", "embed", "expand", "out"):
        group, op = codes[f"{name}.weight"], ops[name]
        assert set(np.unique(group.codes)) <= set(net.low_bit_layers()[name].grid.levels)  # type: ignore[union-attr]
        assert op.weight.storage == group.stored_as
        held = op.weight.values
        want = group.codes[:, 0].transpose(1, 2, 0) if name == "depthwise" else np.moveaxis(group.codes, 1, -1)
        assert (held == want).all()
        effective = net.low_bit_layers()[name].effective_weight().detach().numpy()
        assert (group.decode() == effective).all()
        packed = pack_rows(weight_rows(op), op.weight.storage)  # as C holds them
        if grid in ("4bitsym", "4bit", "dorefa4"):
            assert packed.row_bytes == -(-weight_rows(op).shape[1] // 2)
        if grid == "ternary":
            assert packed.row_bytes == -(-weight_rows(op).shape[1] // 5)


def test_decoded_weights_are_a_fixed_point() -> None:
    torch.manual_seed(1)
    for grid in GRIDS:
        net = trained(LowBitNet(LowBitPlan(grid)))
        x = features(6, 20)
        with torch.no_grad():
            before = net(x)
            with decoded_weights(net, weight_codes(net, 8)):
                assert (net(x) == before).all()


def test_float_training_leaves_ranges_for_static_quantisation() -> None:
    torch.manual_seed(1)
    net = trained(LowBitNet(LowBitPlan(start="never")), "pretrain", 20)
    graph = lowered(net)
    found, _ = traced(graph, 6, 300)
    with torch.no_grad():
        real = net(on_grid(6, 300)).numpy()
        with decoded_weights(net, weight_codes(net, 8)):
            static = net(on_grid(6, 300)).numpy()
    step = graph.tensors[LOGITS].scale or 0.0
    assert (np.abs(found - static).max(1) > 4 * step).mean() <= 0.02
    assert np.abs(static - real).max() > 4 * step  # quantisation does something
    assert np.abs(found - real).mean() <= 0.1 * real.std()


@pytest.mark.parametrize("ranges", ["learned", "ema", "max"])
def test_power_of_two_steps_rescale_by_shifts(ranges: str) -> None:
    torch.manual_seed(1)
    net = trained(LowBitNet(LowBitPlan("4bitsym"), ranges=ranges, power_of_two=True))
    graph = lowered(net)
    for name in ("act1", "act3", "act6", "act7"):
        step = float(net.get_submodule(name).step().detach())  # type: ignore[operator]
        assert np.log2(step) == round(np.log2(step))
    add: Any = next(op for op in graph.ops if type(op).__name__ == "AddRequantise")
    assert (add.multipliers[0] & (add.multipliers[0] - 1)) == 0


def test_pruned_weights_stay_zero_in_integers_and_save_bytes() -> None:
    torch.manual_seed(1)
    dense = trained(LowBitNet(LowBitPlan("8bit")))
    sparse = trained(LowBitNet(LowBitPlan("8bit", prune=0.6, prune_not=("first",))))
    sizes = []
    for net in (dense, sparse):
        graph = lowered(net)
        ops: list[Op] = [op for op, _ in graph.all_ops() if isinstance(op, PRODUCTS)]
        sizes.append(sum(pack_rows(weight_rows(op), op.weight.storage).array.nbytes for op in ops))  # type: ignore[attr-defined, arg-type]
    out: Any = next(op for op, _ in lowered(sparse).all_ops() if op.outputs == ("out",))
    assert (out.weight.values == 0).mean() >= 0.6
    assert (sparse.get_buffer("out.mask").numpy() == (out.weight.values != 0)).mean() > 0.95
    assert sizes[1] < sizes[0]


def test_an_op_without_a_range_is_named() -> None:
    class Bare(LowBitNet):
        def scores(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(self.input(x).unsqueeze(1)) + 0 * self.strength
            return self.out(self.act7(x.mean((2, 3))))

    with pytest.raises(KestrelError, match="'first'.*no QuantActivation follows it"):
        lowered(trained(Bare()))
