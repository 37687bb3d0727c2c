"""The integer LSTM blocks against fake-quant training: the whole network in float64, every op in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lower_kit import CLASSES, FEATURE_SCALE, FRAMES, WIDTH, FlatNet, codes_of, features, settled, spotter_of
from torch import Tensor

from kestrel.errors import KestrelError
from kestrel.frontend.post import Post
from kestrel.lower.graph import IntegerGraph, Trace
from kestrel.lower.spotter import feature_scale_of, lower, predict_codes
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.inventory import decoded_weights, noise_off, weight_codes
from kestrel.models.network import Network, WeightGroup
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.cell import ROW
from kestrel.nn.crossbar import crossbar
from kestrel.quant.quantiser import clip_quantise

SETTINGS: dict[str, dict[str, Any]] = {
    "method 1": {},
    "method 0": {"method": 0},
    "method 0, every class a block": {"method": 0, "n_msb": 5},
    "method 2": {"method": 2, "n_msb": 4, "gain_blocks": 2},
    "one block": {"n_msb": 1},
    "4-bit weights": {"quant_w": 4},
    "8-bit weights over 1": {"quant_w": 8, "weight_range": "paper"},
    "few bits": {"quant_inp": 3, "quant_actMVM": 4, "quant_actNM": 4},
    "coarser digital values than inputs": {"quant_inp": 6, "quant_actMVM": 8, "quant_actNM": 4},
    "bit-serial inputs": {"quant_inp": 2, "input_coding": "bit_serial", "input_slices": 3},
    "bit-serial inputs of more bits": {"quant_inp": 3, "input_coding": "bit_serial", "method": 0},
    "10 bits": {"quant_inp": 8, "quant_actMVM": 10, "quant_actNM": 10},
}


def lowered(spotter: KeywordSpotter, weight_bits: int = 8) -> IntegerGraph:
    return lower(spotter, FEATURE_SCALE, weight_bits)


def fake_quant(spotter: KeywordSpotter, codes: np.ndarray, weight_bits: int = 8) -> np.ndarray:
    """Logits of the trained network in float64 with the weights that the codes stand for.

    In float64 the ranges times few-bit codes are exact, so that ties go to even; float32 misses some of them.
    """
    with decoded_weights(spotter.net, weight_codes(spotter.net, weight_bits)), noise_off(spotter.net), torch.no_grad():
        spotter.double()
        try:
            return spotter(torch.from_numpy(codes * FEATURE_SCALE)).numpy()
        finally:
            spotter.float()


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_fake_quant_training(name: str) -> None:
    spotter = spotter_of(**SETTINGS[name])
    graph = lowered(spotter)
    codes = codes_of(graph, features(7, 200))
    trace: Trace = {}
    out = graph.run(codes, trace=trace)
    graph.check_trace(trace)
    real = fake_quant(spotter, codes)
    scale = graph.tensors["logits"].scale
    assert scale is not None
    assert len(np.unique(real)) > 5  # the network does something
    # Methods 0 and 2 add scores of different scales without a quantiser: codes 2^16 times finer than those of the ADC.
    near = 1e-4 * np.abs(real).max() if "method" in SETTINGS[name] else 0.5 * scale
    assert (np.abs(out["logits"] * scale - real) > near).mean() <= 0.01
    same = real.argmax(1) == out["class"][:, 0]
    assert same.mean() >= 0.99


def test_feature_post_processing_is_part_of_the_graph() -> None:
    spotter = spotter_of([{"normalise": "channel"}, {"stack": 2}])
    graph = lowered(spotter)
    codes = codes_of(graph, features(7, 200))
    assert (fake_quant(spotter, codes).argmax(1) == graph.run(codes)["class"][:, 0]).mean() >= 0.99


def test_each_op_given_equal_inputs_differs_by_at_most_one_code() -> None:
    """The float32 operators of training on the values that the integer model saw, block by block and step by step."""
    spotter = spotter_of()
    net = spotter.net
    assert isinstance(net, BlockLSTM)
    graph = lowered(spotter)
    codes = codes_of(graph, features(8, 200))
    trace: Trace = {}
    graph.run(codes, trace=trace)
    with decoded_weights(net, weight_codes(net, 8)), torch.no_grad():
        shares = {}
        for block in range(net.blocks):
            for name, (codes_there, codes_here) in _ops_of_a_step(net, block, codes, trace).items():
                difference = np.abs(codes_there - codes_here)
                assert difference.max() <= 1, name
                shares[name] = max(shares.get(name, 0.0), float((difference > 0).mean()))
    assert len(shares) == 14
    # Every sixteenth h lies half-way between two codes of the DAC; both resolve these ties to even.
    assert shares.pop("h_in") == 0
    assert max(shares.values()) <= 0.001, shares


def _ops_of_a_step(
    net: BlockLSTM, block: int, codes: np.ndarray, trace: Trace
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{op: (codes by training's float32 operators, codes by the graph)}."""
    inp, mvm, nm = 4, 6, 8
    limit = {name: net.lstm.ranges_in_use()[row, block] for name, row in ROW.items()}

    def held(name: str) -> np.ndarray:
        return trace[f"block{block}.{name}"]

    def real(name: str, signal: str, bits: int) -> Tensor:
        return torch.from_numpy(held(name)).float() * (1 / 2 ** (bits - 1)) * limit[signal]

    def rounded(value: Tensor, signal: str, bits: int) -> np.ndarray:
        quantised = clip_quantise(value, bits, limit[signal])
        return np.rint((quantised / limit[signal]).double().numpy() * 2 ** (bits - 1))

    def product(x: Tensor, part: str) -> Tensor:
        weight, bias = getattr(net.lstm, f"w_{part}")[block], getattr(net.lstm, f"b_{part}")[block]
        flat = x.reshape(1, -1, x.shape[-1])
        return crossbar(flat, weight[None], bias[None], net.device).reshape(*x.shape[:-1], -1)

    x = torch.from_numpy(codes * np.float32(FEATURE_SCALE)).float()
    expected = {
        "x_in": rounded(x, "a1", inp),
        "h_in": rounded(real("h", "a11", nm), "a11", inp),
        "p1": rounded(product(real("x_in", "a1", inp), "ih"), "a12", mvm),
        "p2": rounded(product(real("h_in", "a11", inp), "hh"), "a13", mvm),
        "gates": rounded(real("p1", "a12", mvm) + real("p2", "a13", mvm), "a14", nm),
        "i": rounded(torch.sigmoid(real("i.in", "a14", nm)), "a4", nm),
        "j": rounded(torch.tanh(real("j.in", "a14", nm)), "a5", nm),
        "f": rounded(torch.sigmoid(real("f.in", "a14", nm)), "a3", nm),
        "o": rounded(torch.sigmoid(real("o.in", "a14", nm)), "a6", nm),
        "kept": rounded(real("c", "a9", nm) * real("f", "a3", nm), "a7", nm),
        "new": rounded(real("i", "a4", nm) * real("j", "a5", nm), "a8", nm),
        "c.next": rounded(real("kept", "a7", nm) + real("new", "a8", nm), "a9", nm),
        "shown": rounded(torch.tanh(real("c.next", "a9", nm)), "a10", nm),
        "h.next": rounded(real("shown", "a10", nm) * real("o", "a6", nm), "a11", nm),
    }
    return {name: (value, held(name)) for name, value in expected.items()}


@pytest.mark.parametrize("bits", [12, 16])
def test_wide_digital_values_use_interpolation(bits: int) -> None:
    spotter = spotter_of(quant_inp=8, quant_actMVM=bits, quant_actNM=bits)
    graph = lowered(spotter, 12)
    ops = [op for op, _ in graph.all_ops() if type(op).__name__ == "Interpolate"]
    assert len(ops) == 5 * 3
    assert all(op.error <= 1.5 for op in ops)
    codes = codes_of(graph, features(7, 100))
    trace: Trace = {}
    logits = graph.run(codes, trace=trace)["logits"]
    graph.check_trace(trace)
    real = fake_quant(spotter, codes, 12)
    scale = graph.tensors["logits"].scale
    assert np.abs(logits * scale - real).max() <= 0.02 * np.abs(real).max()


def test_extreme_inputs_stay_in_their_ranges() -> None:
    graph = lowered(spotter_of([{"normalise": "global"}]))
    low, high = np.full((2, FRAMES, WIDTH), -(1 << 15)), np.full((2, FRAMES, WIDTH), (1 << 15) - 1)
    mixed = np.random.default_rng(0).choice([-(1 << 15), 0, (1 << 15) - 1], (20, FRAMES, WIDTH))
    trace: Trace = {}
    graph.run(np.concatenate([low, high, mixed]), trace=trace)
    graph.check_trace(trace)


@pytest.mark.parametrize("name", ["quant_inp", "quant_actMVM", "quant_actNM"])
def test_analog_signals_are_refused_with_their_setting(name: str) -> None:
    with pytest.raises(KestrelError, match=f"set model.{name} to 2..16"):
        lowered(spotter_of(**{name: None}))


def test_an_overflow_is_refused() -> None:
    with pytest.raises(KestrelError, match="beyond 32 bits: use fewer weight bits"):
        lowered(spotter_of(quant_inp=16, hidden=40), 16)


class _Other(Network):
    """A network that lowering knows nothing about but its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FlatNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def weight_groups(self) -> list[WeightGroup]:
        return [WeightGroup("inner.hidden.weight", self.inner.hidden.weight, 0.25, 4)]


def test_other_networks_are_lowered_by_their_layers() -> None:
    spotter = spotter_of([{"normalise": "global"}])
    spotter.net = settled(_Other())  # type: ignore[assignment]
    graph = lower(spotter, FEATURE_SCALE, calibration=features(1, 256).numpy())
    hidden: Any = next(op for op in graph.ops if op.outputs == ("inner_hidden",))
    assert hidden.weight.storage == "int4"
    values = features(6, 300)
    with torch.no_grad():
        real = spotter(values).argmax(1).numpy()
        with decoded_weights(spotter.net, weight_codes(spotter.net, 8)):
            fake = spotter(values).argmax(1).numpy()
    answers = graph.run(codes_of(graph, values))["class"][:, 0]
    assert graph.outputs == ["logits", "class"]
    assert (answers == fake).mean() >= 0.95
    assert (real == fake).mean() < 1  # four bits of weights show


def test_numbers_that_fit_no_multiplier_are_refused() -> None:
    spotter = spotter_of()
    with torch.no_grad():
        spotter.net.lstm.ranges[ROW["a12"], 0] = 1e-12  # type: ignore[union-attr]
    with pytest.raises(KestrelError, match="BlockLSTM has no integer form: "):
        lower(spotter, 1e6)


def test_unknown_networks_and_missing_statistics_are_refused() -> None:
    spotter = spotter_of()
    spotter.net = _Other()
    with pytest.raises(KestrelError, match="_Other has no trained ranges of activations"):
        lowered(spotter)

    spotter = spotter_of()
    spotter.post = Post([{"normalise": "channel"}], (FRAMES, WIDTH))
    with pytest.raises(KestrelError, match="no training statistics"):
        lowered(spotter)


class _Rows:
    """Features in memory."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.shape = values.shape

    def rows(self, rows: np.ndarray, /) -> np.ndarray:
        return self.values[rows]


def test_whole_splits_are_predicted_in_order() -> None:
    graph = lowered(spotter_of())
    data = _Rows(features(9, 300).numpy())
    calls: list[tuple[int, int]] = []
    logits = predict_codes(graph, data, lambda done, total: calls.append((done, total)))
    assert logits.shape == (300, CLASSES)
    assert (logits == graph.run(codes_of(graph, features(9, 300)))["logits"]).all()
    assert calls[-1] == (300, 300)
    with pytest.raises(KestrelError, match="no clips"):
        predict_codes(graph, _Rows(np.zeros((0, FRAMES, WIDTH), np.float32)))


def test_feature_scale_covers_the_training_split() -> None:
    values = features(9, 300).numpy()
    scale = feature_scale_of(_Rows(values), batch=128)
    assert np.log2(scale).is_integer()
    assert 1.5 * np.abs(values).max() <= 32767 * scale < 3.01 * np.abs(values).max()
