"""Delta cells: against torch.nn, against a naive loop, fast against plain, streams, formats, statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.nn.delta import DeltaGRU, DeltaLSTM, collecting
from kestrel.nn.delta_fixed import Fixed, Numerics, hard_sigmoid, hard_tanh

torch.set_num_threads(1)
CELLS = {"LSTM": (DeltaLSTM, nn.LSTM), "GRU": (DeltaGRU, nn.GRU)}
FORMATS = [
    Numerics(),
    Numerics(hard_sigmoid=True, hard_tanh=True),
    Numerics(Fixed(3, 5), Fixed(2, 6), Fixed(1, 7)),
    Numerics(Fixed(2, 5, "floor"), Fixed(1, 6, "floor"), Fixed(1, 7, "floor"), True, True),
]


def _features(clips: int = 4, frames: int = 12, width: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(clips, frames, width, generator=torch.Generator().manual_seed(seed)).double() * 1.2


def _cell(kind: str, layers: int = 2, thx=0.0, thh=0.0, numerics: Numerics | None = None, hidden: int = 6):
    torch.manual_seed(3)
    return CELLS[kind][0](5, hidden, layers, thx, thh, numerics).double()


def _gradients(rnn, x: Tensor, path: str, lengths: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    rnn.zero_grad()
    out = rnn(x, path=path, lengths=lengths)
    loss = (out.h * torch.linspace(-1, 1, out.h.numel()).double().cos().view_as(out.h)).sum()
    if path != "torch":
        loss = loss + 5 * out.change
    loss.backward()
    return out.h.detach(), [x.grad, *(parameter.grad.clone() for parameter in rnn.parameters())]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_thresholds_of_zero_are_the_layer_of_torch(kind: str, path: str) -> None:
    dense = CELLS[kind][1](16, 64, 2, batch_first=True)
    ours = CELLS[kind][0](16, 64, 2)
    ours.load_state_dict(dense.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(dense.state_dict())
    x = torch.randn(3, 61, 16)
    expected, state = dense(x)
    out = ours(x, path=path)
    torch.testing.assert_close(out.h, expected, rtol=0, atol=1e-6)
    last = torch.stack([layer.h for layer in out.state])
    torch.testing.assert_close(last, state if kind == "GRU" else state[0], rtol=0, atol=1e-6)
    if kind == "LSTM":
        torch.testing.assert_close(torch.stack([layer.c for layer in out.state]), state[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours(x).h, expected, rtol=0, atol=0)  # auto: PyTorch's own code


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_gradients_at_thresholds_of_zero_are_those_of_torch(kind: str, path: str) -> None:
    rnn, x = _cell(kind), _features()
    weight = torch.linspace(-1, 1, 4 * 12 * 6).double().cos().view(4, 12, 6)
    gradients = []
    for way in ("torch", path):
        rnn.zero_grad()
        (rnn(x, path=way).h * weight).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in rnn.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def naive(kind: str, rnn, x: np.ndarray, thx: float, thh: float) -> tuple[np.ndarray, int, int]:
    """One clip [T, I] through one layer, element by element of the update rule; h [T, H], zeros of dx and dh."""
    w_ih, w_hh, b_ih, b_hh = (getattr(rnn, f"{part}_l0").detach().numpy() for part in
                              ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip
    hidden = w_hh.shape[1]
    x_ref, h_ref, h, c = np.zeros(x.shape[1]), np.zeros(hidden), np.zeros(hidden), np.zeros(hidden)
    from_x, from_h = b_ih.copy(), b_hh.copy()
    zeros_x = zeros_h = 0
    made = []

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    for frame in x:
        for j, value in enumerate(frame):
            if abs(value - x_ref[j]) >= thx:
                from_x += w_ih[:, j] * (value - x_ref[j])
                x_ref[j] = value
            else:
                zeros_x += 1
        for j, value in enumerate(h):
            moved = abs(value - h_ref[j]) >= thh
            zeros_h += not moved or value == h_ref[j]
            if moved:
                from_h += w_hh[:, j] * (value - h_ref[j])
                h_ref[j] = value
        if kind == "LSTM":
            i, f, g, o = np.split(from_x + from_h, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(from_x, 3), np.split(from_h, 3)
            r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
            h = (1 - z) * np.tanh(n_x + r * n_h) + z * h
        made.append(h)
    return np.stack(made), zeros_x, zeros_h


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_against_a_naive_loop(kind: str, path: str) -> None:
    rnn, x = _cell(kind, 1, 0.4, 0.05), _features()
    with collecting(rnn) as statistics:
        out = rnn(x, path=path)
    counts = statistics.layers["rnn.l0"]
    for clip in range(4):
        h, zeros_x, zeros_h = naive(kind, rnn, x[clip].numpy(), 0.4, 0.05)
        np.testing.assert_allclose(out.h[clip].detach().numpy(), h, rtol=0, atol=1e-12)
        assert (counts.zeros_x[clip], counts.zeros_h[clip], counts.frames[clip]) == (zeros_x, zeros_h, 12)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("numerics", FORMATS)
@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.2, 0.1), ([0.0, 0.1], [0.2, 0.0])])
def test_fast_path_and_its_sparse_gradient_equal_autograd(kind: str, numerics: Numerics, thresholds) -> None:
    rnn, x = _cell(kind, 2, *thresholds, numerics), _features()
    (h, expected), (found_h, found) = _gradients(rnn, x, "plain"), _gradients(rnn, x, "fast")
    torch.testing.assert_close(found_h, h, rtol=0, atol=0 if numerics.activation else 1e-12)
    for name, one, other in zip(["x", *rnn.state_dict()], found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        assert numerics.gate is not None or other.abs().max() > 0


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("path", ["plain", "fast"])
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), max_size=4), thx=st.floats(0, 0.5), thh=st.floats(0, 0.2))
def test_a_stream_in_pieces_equals_one_pass(kind: str, path: str, cuts: list[int], thx: float, thh: float) -> None:
    rnn, x = _cell(kind, 2, thx, thh), _features()
    whole = rnn(x, path=path)
    edges = [0, *sorted(set(cuts)), 12]
    parts, state = [], None
    for start, stop in itertools.pairwise(edges):
        out = rnn(x[:, start:stop], state, path=path)
        parts.append(out.h)
        state = out.state
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.h, rtol=0, atol=1e-12)
    for one, other in zip(state, whole.state, strict=True):
        torch.testing.assert_close(one.h_ref, other.h_ref, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.x_ref, other.x_ref, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_a_continued_stream(kind: str) -> None:
    rnn, x = _cell(kind, 2, 0.2, 0.1), _features()
    state = rnn(x[:, :5]).state
    gradients = []
    for path in ("plain", "fast"):
        rnn.zero_grad()
        rnn(x[:, 5:], state, path=path).h.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in rnn.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_padding_counts_in_nothing(kind: str, path: str) -> None:
    rnn, x = _cell(kind, 2, 0.2, 0.1), _features()
    lengths = torch.tensor([12, 7, 1, 9])
    other = x.clone()
    for clip, length in enumerate(lengths):
        other[clip, length:] = 77.0
    found = []
    for padded in (x, other):
        with collecting(rnn, traces=True) as statistics:
            out = rnn(padded, lengths=lengths, path=path)
        found.append((out, statistics))
    (first, counted), (second, _) = found
    torch.testing.assert_close(first.change, second.change, rtol=1e-12, atol=0)
    for clip, length in enumerate(lengths.tolist()):
        with collecting(rnn, traces=True) as alone:
            single = rnn(x[clip : clip + 1, :length], path=path)
        torch.testing.assert_close(first.h[clip : clip + 1, :length], single.h, rtol=0, atol=1e-12)
        for state in (first.state, second.state):
            for layer, one in zip(state, single.state, strict=True):
                torch.testing.assert_close(layer.h[clip], one.h[0], rtol=0, atol=1e-12)
                torch.testing.assert_close(layer.h_ref[clip], one.h_ref[0], rtol=0, atol=1e-12)
        assert counted.sparsity(clip) == alone.sparsity()
        for one, other_trace in zip(counted.trace(clip), alone.trace(0), strict=True):
            assert np.array_equal(one.active, other_trace.active) and one.active.shape == (length, one.inputs + 6)


def test_statistics_and_traces_agree() -> None:
    rnn, x = _cell("GRU", 2, 0.3, 0.1), _features(clips=300)  # more than are computed at a time
    with torch.no_grad(), collecting(rnn, traces=True) as statistics:
        out = rnn(x)
    assert statistics.clips == 300 and rnn.statistics is None
    active = [np.stack([trace.active for trace in layer]) for layer in zip(*statistics.traces(), strict=True)]
    first, second = statistics.trace(7)
    assert (first.layer, first.inputs, first.hidden, first.gates) == ("rnn.l0", 5, 6, 3)
    assert (second.layer, second.inputs) == ("rnn.l1", 6)
    sparsity = statistics.layers["rnn.l0"].sparsity()
    assert sparsity.x == pytest.approx(1 - active[0][..., :5].mean())
    assert sparsity.h == pytest.approx(1 - active[0][..., 5:].mean())
    assert sparsity.pooled == pytest.approx(1 - active[0].mean())
    both = sum((a == 0).sum() for a in active) / sum(a.size for a in active)
    assert statistics.sparsity().pooled == pytest.approx(both)
    assert not active[0][:, 0, 5:].any(), "h is 0 before the first frame"
    with torch.no_grad():
        torch.testing.assert_close(rnn(x[:128]).h, out.h[:128], rtol=0, atol=0)
        pieces = [rnn(x[start : start + 100]) for start in (0, 100, 200)]
    assert out.change == pytest.approx(float(torch.stack([piece.change for piece in pieces]).mean()))
    with pytest.raises(ValueError, match="traces=True"):
        with collecting(rnn) as bare:
            rnn(x[:2])
        bare.trace(0)


@settings(max_examples=20, deadline=None)
@given(low=st.floats(0, 1), more=st.floats(0, 2))
def test_a_larger_threshold_never_lowers_the_sparsity_of_a_steady_rise(low: float, more: float) -> None:
    x = torch.linspace(0, 3, 40).view(1, 40, 1).double()
    shares = []
    for threshold in (low, low + more):
        rnn = DeltaGRU(1, 2, 1, thx=threshold).double()
        with collecting(rnn) as statistics:
            rnn(x)
        shares.append(statistics.sparsity().x)
    assert shares[1] >= shares[0]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_thresholds_above_all_deltas_leave_the_biases(kind: str, path: str) -> None:
    rnn, x = _cell(kind, 1, 1e3, 1e3), _features()
    with collecting(rnn) as statistics:
        out = rnn(x.requires_grad_(), path=path)
    assert statistics.sparsity().pooled == 1 and out.change == 0
    torch.testing.assert_close(out.h, rnn(torch.zeros_like(x), path=path).h, rtol=0, atol=0)
    out.h.sum().backward()
    assert not x.grad.any() and not rnn.weight_ih_l0.grad.any() and rnn.bias_ih_l0.grad.any()


def test_a_threshold_that_is_just_reached_transmits() -> None:
    rnn = DeltaGRU(1, 2, 1, thx=0.5).double()
    with collecting(rnn, traces=True) as statistics:
        rnn(torch.tensor([0.5, 0.75, 1.0, 0.5, 0.75]).view(1, 5, 1).double())
    assert statistics.trace(0)[0].active[:, 0].tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_one_threshold_decides_delta_and_reference(path: str) -> None:
    """A threshold between two levels: delta and reference follow its level, so memories stay the sum of references."""
    form = Fixed(3, 2)  # steps of 0.25
    rnn = _cell("LSTM", 1, 0.30, 0.30, Numerics(form, Fixed(2, 6), Fixed(1, 7)))
    assert form.scalar(0.30) == 0.25
    with collecting(rnn, traces=True) as statistics:
        out = rnn(torch.tensor([0.0, 0.25, 0.5]).view(1, 3, 1).expand(1, 3, 5).double(), path=path)
    assert statistics.trace(0)[0].active[:, :5].sum(1).tolist() == [0, 5, 5]
    assert (out.state[0].x_ref == 0.5).all()


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_one_frame_and_nan_and_wrong_shapes(kind: str, path: str) -> None:
    rnn, x = _cell(kind, 2, 0.2, 0.1), _features()
    assert _gradients(rnn, x[:, :1], path)[0].shape == (4, 1, 6)
    broken = x.clone()
    broken[2, 4, 1] = torch.nan
    h = rnn(broken, path=path).h
    assert h[2, 4:].isnan().all() and not h[[0, 1, 3]].isnan().any() and not h[2, :4].isnan().any()
    for bad in (x[:, :0], x[..., :4], x[0]):
        with pytest.raises(ValueError, match="wanted"):
            rnn(bad, path=path)


def test_thresholds_may_change_and_are_checked() -> None:
    rnn, x = _cell("GRU", 2), _features()
    before = rnn(x, path="fast").h
    rnn.set_thresholds([0.3, 0.1], 0.2)
    assert rnn.is_delta and [(theta.x, theta.h) for theta in rnn.thresholds] == [(0.3, 0.2), (0.1, 0.2)]
    assert (rnn(x).h - before).abs().max() > 1e-3
    rnn.set_thresholds(0, 0)
    torch.testing.assert_close(rnn(x).h, before, rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="3 thresholds for 2 layers"):
        rnn.set_thresholds([1, 2, 3], 0)
    with pytest.raises(UsageError, match="not negative"):
        rnn.set_thresholds(0, -0.1)


def test_second_backward_pass_is_refused_in_words() -> None:
    rnn = _cell("LSTM", 1, 0.1, 0.1)
    loss = rnn(_features()).h.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_float32_gradients_over_a_long_sequence() -> None:
    """The sums over time of the sparse form lose little."""
    torch.manual_seed(0)
    x = torch.randn(2, 400, 5)
    for kind in CELLS:
        rnn = CELLS[kind][0](5, 16, 1, 0.1, 0.1)
        gradients = []
        for path in ("plain", "fast"):
            rnn.zero_grad()
            rnn(x, path=path).h.square().mean().backward()
            gradients.append(rnn.weight_hh_l0.grad.clone())
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- formats


def test_levels_rounding_and_saturation() -> None:
    form = Fixed(3, 5)
    assert (form.bits, form.low, form.high, form.step) == (8, -4.0, 3.96875, 0.03125)
    half = 0.5 / 32
    x = torch.tensor([half, 3 * half, -half, -3 * half, 100.0, -100.0, 3.96875, 3.98, 3.99, -4.0, -4.01, -4.02])
    got = form.levels(x) * 32
    assert got.tolist() == [0, 2, 0, -2, 127, -128, 127, 127, 127, -128, -128, -128]
    assert form.inside(x).tolist() == [True] * 4 + [False, False, True, True, False, True, True, False]
    floor = Fixed(3, 5, "floor")
    assert (floor.levels(x[:4]) * 32).tolist() == [0, 1, -1, -2]
    assert floor.inside(torch.tensor([3.99, 4.0, -4.0, -4.001])).tolist() == [True, False, True, False]
    assert Fixed(1, 7).high == 127 / 128 and Fixed(1, 7).low == -1
    for qi, qf in ((0, 5), (3, -1), (1, 0), (20, 5)):
        with pytest.raises(UsageError, match="format Q"):
            Fixed(qi, qf)


@settings(max_examples=50, deadline=None)
@given(qi=st.integers(1, 8), qf=st.integers(1, 12), value=st.floats(-300, 300), floor=st.booleans())
def test_a_format_against_its_definition(qi: int, qf: int, value: float, floor: bool) -> None:
    form = Fixed(qi, qf, "floor" if floor else "round")
    code = np.floor(value * 2**qf) if floor else np.rint(value * 2**qf)
    low, high = -(2 ** (qi + qf - 1)), 2 ** (qi + qf - 1) - 1
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    y = form(x)
    assert y.item() == np.clip(code, low, high) / 2**qf
    y.backward()
    assert x.grad.item() == (low <= code <= high)
    assert form.scalar(value) == y.item()


def test_hard_non_linearities() -> None:
    x = torch.tensor([-3.0, -2.0, 0.0, 1.0, 2.0, 5.0])
    assert hard_sigmoid(x).tolist() == [0, 0, 0.5, 0.75, 1, 1]
    assert hard_tanh(x).tolist() == [-1, -1, 0, 1, 1, 1]
