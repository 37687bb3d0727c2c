"""Delta networks in integers against the networks themselves, in floating and in fixed point."""

from __future__ import annotations

from typing import Any

import lower_kit
import numpy as np
import pytest
import torch

from kestrel.errors import KestrelError
from kestrel.frontend.post import Post
from kestrel.lower import delta_network
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.ops import Accumulate, DeltaUpdate, MatMul
from kestrel.lower.spotter import lower
from kestrel.lower.tensor import COLUMN_STORAGES
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.inventory import decoded_weights, weight_codes
from kestrel.models.spotter import KeywordSpotter

THRESHOLDS = {"thx": 0.3, "thh": 0.1}
FIXED = ("qa", "qw", "qc", "qcw")
CLIPS = 40


def both(spotter: KeywordSpotter, clips: int = CLIPS, bits: int = 8) -> tuple[IntegerGraph, np.ndarray, np.ndarray]:
    """The integer model, its logits as real numbers and those of the network with the same weight codes, in float64."""
    graph = lower(spotter, lower_kit.FEATURE_SCALE, bits)
    codes = lower_kit.codes_of(graph, lower_kit.features(5, clips))
    trace: dict[str, np.ndarray] = {}
    made = graph.run(codes, trace=trace)["logits"] * (graph.tensors["logits"].scale or 1.0)
    graph.check_trace(trace)
    exact = spotter.double()
    with torch.no_grad(), decoded_weights(exact.net, weight_codes(spotter.net, bits)):
        expected = exact(torch.from_numpy(codes * lower_kit.FEATURE_SCALE)).numpy()
    return graph, made, expected


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rnn_layers": 2, "fc_extra_size": 7},
        {"decision": "last_speech", "use_hardsigmoid": True, "use_hardtanh": True},
        {"aqi": 4, "aqf": 4, "nqi": 1, "nqf": 7, "wqi": 2, "wqf": 3},
    ],
)
@pytest.mark.parametrize("thresholds", [{}, THRESHOLDS])
def test_fixed_point_is_met_bit_by_bit(kind: str, mode: int, more: dict, thresholds: dict) -> None:
    model: dict[str, Any] = {"rnn_type": kind, **dict.fromkeys(FIXED, mode), **more, **thresholds}
    _, made, expected = both(lower_kit.delta_spotter(**model))
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-9)
    assert len(np.unique(made)) > 20


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("decision", ["mean_logits", "last_speech"])
def test_dense_floating_point_is_met_closely(kind: str, hard: bool, decision: str) -> None:
    model = {"rnn_type": kind, "use_hardsigmoid": hard, "use_hardtanh": hard, "decision": decision, "rnn_layers": 2}
    spotter = lower_kit.delta_spotter([{"normalise": "channel"}], **model)
    _, made, expected = both(spotter)
    near = np.abs(made - expected).max(axis=1) < 0.02 * np.abs(expected).max()
    assert near.mean() > (0.99 if decision == "mean_logits" else 0.9)  # the last frame may be another one


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_deltas_in_floating_point_follow_the_network(kind: str) -> None:
    """A change near a threshold may be sent a frame later, which is no error of more than a threshold."""
    spotter = lower_kit.delta_spotter([{"normalise": "channel"}], rnn_type=kind, fc_extra_size=7, **THRESHOLDS)
    graph, made, expected = both(spotter)
    assert np.abs(made - expected).mean() < 0.02 * np.abs(expected).max()
    assert sum(isinstance(op, DeltaUpdate) for op, _ in graph.all_ops()) == 2


@pytest.mark.parametrize("mode", [{"qa": 1}, {"qw": 1, "qcw": 1}, {"qa": 2, "qc": 1}, {"qw": 2}])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_formats_of_a_part_of_the_network(kind: str, mode: dict) -> None:
    _, made, expected = both(lower_kit.delta_spotter(rnn_type=kind, aqf=8, nqf=9, **mode))
    assert np.abs(made - expected).mean() < 0.02 * np.abs(expected).max()


def test_wide_formats_are_interpolated() -> None:
    wide = {"aqi": 4, "aqf": 8, "nqi": 2, "nqf": 12}
    _, made, expected = both(lower_kit.delta_spotter(**dict.fromkeys(FIXED, 1), **wide))
    assert np.abs(made - expected).max() < 0.02


def test_formats_beyond_32_bits_are_refused() -> None:
    wide = {"aqi": 6, "aqf": 16, "nqi": 2, "nqf": 16}
    with pytest.raises(KestrelError, match="bits"):
        lower(lower_kit.delta_spotter(rnn_type="LSTM", **dict.fromkeys(FIXED, 2), **wide), lower_kit.FEATURE_SCALE)


def test_thresholds_of_a_layer_choose_its_ops() -> None:
    """A layer multiplies anew what has no threshold."""
    graph = lower(lower_kit.delta_spotter(rnn_layers=2, thx=[0.3, 0.0], thh=[0.0, 0.1]), lower_kit.FEATURE_SCALE)
    made = {op.outputs[0]: type(op) for op, _ in graph.all_ops() if isinstance(op, (Accumulate, MatMul))}
    assert made == {
        "rnn.0.ih.memory.next": Accumulate,
        "rnn.0.p_hh": MatMul,
        "rnn.1.p_ih": MatMul,
        "rnn.1.hh.memory.next": Accumulate,
        "cl": MatMul,
    }


def test_pruned_weights_stay_zero() -> None:
    spotter = lower_kit.delta_spotter(cbtd_from="pretrain", gamma_rnn=0.75, num_array_pe=4, **THRESHOLDS)
    graph, made, expected = both(spotter)
    for op, _ in graph.all_ops():
        if isinstance(op, Accumulate):
            work = (op.weight.values != 0).reshape(-1, 4, op.weight.shape[1]).sum(0)  # [pes, columns]
            assert (work <= 3).all() and op.weight.storage == "sparse8"
    assert np.abs(made - expected).mean() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("fixed", [{}, dict.fromkeys(FIXED, 1)])
def test_pruned_columns_are_added_up_without_thresholds_too(
    kind: str, fixed: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as with thresholds, and the bits of the products row by row."""
    model = {"rnn_type": kind, "rnn_size": 64, "cbtd_from": "pretrain", "gamma_rnn": 0.9375, "num_array_pe": 4, **fixed}
    graph, made, _ = both(lower_kit.delta_spotter(**model))
    products = {op.outputs[0]: op for op, _ in graph.all_ops() if isinstance(op, (Accumulate, MatMul))}
    assert {name: type(op) for name, op in products.items()} == {
        "rnn.ih.memory.next": Accumulate,
        "rnn.hh.memory.next": Accumulate,
        "cl": MatMul,
    }
    assert all(op.weight.storage in COLUMN_STORAGES for op in products.values() if isinstance(op, Accumulate))
    assert [op.threshold for op, _ in graph.all_ops() if isinstance(op, DeltaUpdate)] == [0, 0]
    monkeypatch.setattr(delta_network, "_sent", lambda numerics, threshold, weight: None)
    rows, same, _ = both(lower_kit.delta_spotter(**model))
    assert not any(isinstance(op, Accumulate) for op, _ in rows.all_ops())
    np.testing.assert_array_equal(made, same)


@pytest.mark.parametrize("silence", [0, -1])
def test_the_last_frame_of_speech_decides(silence: int) -> None:
    """Clips that end in silence, and clips that are silent throughout, which their last frame decides."""
    spotter = lower_kit.delta_spotter(decision="last_speech", silence_class=silence, **dict.fromkeys(FIXED, 1))
    net = spotter.net
    with torch.no_grad():
        net.cl.bias.fill_(-0.5)  # type: ignore[operator, union-attr]
        net.cl.bias[silence] = 0.9  # type: ignore[operator, union-attr]
    _, made, expected = both(spotter)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-9)
    heard = made.argmax(1) != silence % lower_kit.CLASSES
    assert heard.any() and not heard.all()


@pytest.mark.parametrize("decision", ["mean_logits", "last_speech"])
def test_a_clip_of_one_frame(decision: str) -> None:
    torch.manual_seed(0)
    net = DeltaNetwork(
        input_size=lower_kit.WIDTH, classes=5, rnn_size=8, delta_from="pretrain", thx=0.3, thh=0.1, decision=decision,
        **dict.fromkeys(FIXED, 1),
    )  # fmt: skip
    net.set_phase("eval")
    spotter = KeywordSpotter(Post([], (1, lower_kit.WIDTH)), net)
    graph = lower(spotter, lower_kit.FEATURE_SCALE)
    codes = lower_kit.codes_of(graph, lower_kit.features(5, 20, frames=1))
    made = graph.run(codes)["logits"] * (graph.tensors["logits"].scale or 1.0)
    with torch.no_grad():
        expected = spotter.double()(torch.from_numpy(codes * lower_kit.FEATURE_SCALE)).numpy()
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-9)
