"""Networks of torch modules: how close their integers are, and what has no integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lower_kit import (
    CLASSES,
    FEATURE_SCALE,
    FRAMES,
    WIDTH,
    FlatNet,
    MixedNet,
    Recurrent,
    codes_of,
    features,
    graph_of,
    settled,
)
from torch import Tensor, nn

from kestrel.errors import KestrelError
from kestrel.lower.graph import IntegerGraph, Trace
from kestrel.lower.rnn import Thresholds
from kestrel.quant.packing import encode

NETS: dict[str, Any] = {
    "mixed": MixedNet,
    "flat": FlatNet,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "two layers without bias": lambda: Recurrent(nn.LSTM, num_layers=2, bias=False),
    "two layers of gru": lambda: Recurrent(nn.GRU, num_layers=2),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(4)
    return settled(NETS[name]())


def run(graph: IntegerGraph, values: Tensor) -> tuple[np.ndarray, Trace]:
    """Real logits, and the trace."""
    trace: Trace = {}
    codes = graph.run(codes_of(graph, values), trace=trace)[graph.outputs[0]]
    graph.check_trace(trace)
    scale = graph.tensors[graph.outputs[0]].scale
    assert scale is not None
    return codes * scale, trace


@pytest.mark.parametrize("name", NETS)
def test_logits_are_close_to_float(name: str) -> None:
    net = made(name)
    with torch.no_grad():
        real = net(features(6, 300)).numpy()
    found, _ = run(graph_of(net), features(6, 300))
    # A clip with larger activations than any of the calibration saturates: the largest error says nothing.
    assert np.quantile(np.abs(found - real), 0.99) <= 0.15 * real.std()
    assert np.abs(found - real).mean() <= 0.04 * real.std()
    assert (found.argmax(1) == real.argmax(1)).mean() >= 0.95


def test_the_mixed_net_uses_every_kind_of_op() -> None:
    kinds = {type(op).__name__ for op, _ in graph_of(made("mixed")).all_ops()}
    wanted = (
        "Conv2d DepthwiseConv2d MatMul MaxPool SumPool Upsample Lookup Multiply AddRequantise Requantise Concat Reshape"
    )
    assert set(wanted.split()) <= kinds


def test_batch_norm_and_relu_join_the_product() -> None:
    graph = graph_of(made("mixed"))
    by_output = {op.outputs[0]: op for op in graph.ops}
    first: Any = by_output["first"]
    assert first.rescale.low == 0
    assert len(first.rescale.multipliers) == 8
    assert len(first.rescale.offsets) == 8
    assert not any(name.startswith(("norm1", "norm2", "norm3", "relu")) for name in by_output)


def test_one_layer_with_calibrated_codes_is_within_one_code() -> None:
    """Given the codes of its input, a layer's result is the real one rounded to its grid."""
    net = made("mixed")
    graph = graph_of(net)
    _, trace = run(graph, features(6, 50))
    x, y = graph.tensors["x.codes"], graph.tensors["first"]
    assert x.scale is not None
    assert y.scale is not None
    image = torch.from_numpy(trace["x.codes"] * x.scale).double().unsqueeze(1)  # [B, 1, T, F]
    weight = encode(net.first.weight.detach().double().numpy(), 8).decode()  # type: ignore[union-attr]
    with torch.no_grad():
        sums = nn.functional.conv2d(image, torch.from_numpy(weight).double(), stride=(2, 1), padding=(2, 1))
        real = torch.relu(net.norm1.double()(sums)).permute(0, 2, 3, 1).numpy()  # type: ignore[operator, union-attr]
    assert np.abs(trace["first"] - np.clip(real / y.scale, 0, 127)).max() <= 0.51


@pytest.mark.parametrize("bits", [4, 2])
def test_trained_weight_codes_are_kept(bits: int) -> None:
    net = made("flat")
    codes = {"hidden.weight": encode(net.hidden.weight.detach().numpy(), bits)}  # type: ignore[union-attr]
    graph = graph_of(net, codes=codes)
    layer: Any = next(op for op in graph.ops if op.outputs == ("hidden",))
    assert (layer.weight.values == codes["hidden.weight"].codes).all()
    assert layer.weight.storage == f"int{bits}"
    assert next(op for op in graph.ops if op.outputs == ("out",)).weight.storage == "int8"  # type: ignore[attr-defined]


def test_binary_weights() -> None:
    net = made("flat")
    codes = {"hidden.weight": encode(net.hidden.weight.detach().numpy(), 1)}  # type: ignore[union-attr]
    layer: Any = next(op for op in graph_of(net, codes=codes).ops if op.outputs == ("hidden",))
    assert layer.weight.storage == "binary"


@pytest.mark.parametrize("name", ["lstm", "gru", "two layers of gru"])
def test_delta_updates_with_threshold_zero_give_the_same_bits(name: str) -> None:
    net = made(name)
    dense, _ = run(graph_of(net), features(6, 100))
    sparse, trace = run(graph_of(net, thresholds=Thresholds(0.0, 0.0)), features(6, 100))
    assert (dense == sparse).all()
    assert any(key.endswith("delta") for key in trace)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_thresholds_make_changes_sparse(name: str) -> None:
    net = made(name)
    dense, _ = run(graph_of(net), features(6, 200))
    sparse, trace = run(graph_of(net, thresholds=Thresholds(0.5, 0.05)), features(6, 200))
    zeros = {key: float((trace[key] == 0).mean()) for key in ("rnn.ih.delta", "rnn.hh.delta")}
    assert min(zeros.values()) > 0.2
    step = FEATURE_SCALE  # references stay within the threshold of what they stand for
    x = trace["rnn.x"]
    threshold = round(0.5 / float(graph_of(net).tensors["x.codes"].scale or step))
    assert np.abs(x - trace["rnn.ih.sent.next"]).max() < threshold
    assert np.abs(sparse - dense).max() < 2 * dense.std()
    assert (sparse != dense).any()


def test_memories_are_products_with_what_was_transmitted() -> None:
    graph = graph_of(made("lstm"), thresholds=Thresholds(0.5, 0.05))
    _, trace = run(graph, features(6, 50))
    weight = next(op for op, _ in graph.all_ops() if op.outputs == ("rnn.hh.memory.next",)).weight  # type: ignore[attr-defined]
    assert (trace["rnn.hh.memory.next"] == trace["rnn.hh.sent.next"] @ weight.values.T).all()


def test_extreme_inputs_stay_in_their_ranges() -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice([-(1 << 15), 0, (1 << 15) - 1], (20, FRAMES, WIDTH))
    for name in ("mixed", "gru"):
        for thresholds in (None, Thresholds(0.5, 0.05)):
            graph = graph_of(made(name), thresholds=thresholds)
            trace: Trace = {}
            graph.run(codes, trace=trace)
            graph.check_trace(trace)


class _Odd(nn.Module):
    def __init__(self, layer: nn.Module | None = None, function: Any = None, image: bool = True) -> None:
        super().__init__()
        self.layer, self.function, self.image = layer, function, image
        self.out = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.image:
            x = x.unsqueeze(1)
        x = self.function(x) if self.function is not None else self.layer(x)  # type: ignore[misc]
        return self.out(x[0][:, -1] if isinstance(self.layer, nn.RNNBase) else torch.flatten(x, 1))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("net", "text"),
    [
        (_Odd(nn.Conv2d(1, 2, 3, dilation=2)), "dilation 1"),
        (_Odd(nn.Conv2d(1, 2, 3, padding="same")), "given as numbers"),
        (_Odd(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2))), "groups 2"),
        (_Odd(nn.MaxPool2d(2, padding=1)), "set padding to 0"),
        (_Odd(nn.AdaptiveAvgPool2d(2)), "only output size 1"),
        (_Odd(nn.Upsample(scale_factor=2, mode="bilinear")), "only mode nearest"),
        (_Odd(nn.Softmax(dim=-1)), "'layer' (Softmax) has no integer form"),
        (_Odd(function=torch.exp), "(exp) has no integer form"),
        (_Odd(function=lambda x: x + 1.5), "only tensors are added"),
        (_Odd(nn.LSTM(WIDTH, 5, bidirectional=True, batch_first=True), image=False), "use one direction"),
        (_Odd(nn.LSTM(WIDTH, 5, proj_size=3, batch_first=True), image=False), "set proj_size=0"),
        (_Odd(nn.GRU(WIDTH, 5), image=False), "set batch_first=True"),
        (_Odd(nn.BatchNorm2d(1, track_running_stats=False)), "set track_running_stats"),
    ],
)
def test_what_has_no_integers_is_named_in_one_line(net: nn.Module, text: str) -> None:
    with torch.no_grad():
        net(features(1, 4))
    with pytest.raises(KestrelError) as caught:
        graph_of(net)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_control_flow_is_refused_in_one_line() -> None:
    class Choosing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(KestrelError, match="Choosing cannot be traced, so it has no integer form"):
        graph_of(Choosing())
