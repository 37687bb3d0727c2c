"""The quantised LSTM: its equations written out again, and every fast path against the plain loop."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from kestrel.errors import KestrelError
from kestrel.nn import build, native
from kestrel.nn.cell import RANGES, ROW, Bits, Cell, plain_lstm
from kestrel.nn.crossbar import Device, draw_noise
from kestrel.nn.fused import fused_lstm
from kestrel.nn.quant_lstm import QuantLSTM

NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "ranges")
# Ranges that clip a part of every signal, and leave enough for the others (not powers of two).
TIGHT = {
    **{"a1": 2.3, "a3": 0.57, "a4": 0.61, "a5": 0.71, "a6": 0.63, "a7": 0.19, "a8": 0.37, "a9": 0.47},
    **{"a10": 0.41, "a11": 0.23, "a12": 1.3, "a13": 0.57, "a14": 1.3},
}


def make(
    blocks=3, batch=11, steps=9, width=13, hidden=21, bits=None, tight=True, mask=False, device=None, seed=0,
    dtype=torch.float32,
) -> tuple[torch.Tensor, Cell, torch.Tensor]:  # fmt: skip
    """Input, cell with gradients wanted, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, limit: float) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1).mul(limit).to(dtype)

    start = torch.tensor([TIGHT[name] if tight else RANGES[name] for name in RANGES], dtype=torch.float64).view(-1, 1)
    spread = 1 + 0.1 * torch.rand(len(RANGES), blocks, generator=generator, dtype=torch.float64) * tight
    ranges = (start * spread).to(dtype)
    if not tight:
        ranges[0] = 4
    cell = Cell(
        uniform(blocks, width, 4 * hidden, limit=0.3),
        uniform(blocks, hidden, 4 * hidden, limit=0.6),
        uniform(blocks, 4 * hidden, limit=0.4),
        uniform(blocks, 4 * hidden, limit=0.2) + 0.2,
        ranges,
        bits or Bits(),
        device or Device(max_w=0.25),
    )
    for name in NAMES:
        getattr(cell, name).requires_grad_()
    if mask:
        cell.mask = (torch.rand(blocks, hidden, 4 * hidden, generator=generator) > 0.125).to(dtype)
    x = torch.randn(batch, steps, width, generator=generator, dtype=dtype) * 2
    return x, cell, torch.randn(blocks, batch, hidden, generator=generator, dtype=dtype)


def run(path, x: torch.Tensor, cell: Cell, grad: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for name in NAMES:
        getattr(cell, name).grad = None
    h = path(x, cell)
    h.backward(grad)
    return h.detach(), {name: getattr(cell, name).grad.clone() for name in NAMES}


def literal(x: torch.Tensor, cell: Cell) -> torch.Tensor:
    """The specification's equations, block by block and without shared code; autograd finds the derivatives."""

    def clip(v, a):
        return torch.where(v.abs() > a, v.sign() * a, v)

    def quant(v, bits, r):
        if bits is None:
            return v
        d = 2 ** (bits - 1)
        return (r * torch.round(torch.clamp(v / r, -1 + 1 / d, 1 - 1 / d) * d) / d).detach() + (v - v.detach())

    results = []
    for n in range(cell.w_ih.shape[0]):
        a = {name: cell.ranges[ROW[name], n] for name in RANGES}
        inp, mvm, nm = cell.bits.inp, cell.bits.mvm, cell.bits.nm

        def q(v, name, bits, a=a):
            return quant(clip(v, a[name]), bits, a[name].detach())

        def product(v, w, b):
            limit = cell.device.max_w
            w = w.clamp(-limit, limit).detach() + (w - w.detach())
            limit *= cell.device.rows_bias
            return v @ w + (b.clamp(-limit, limit).detach() + (b - b.detach()))

        hidden = cell.w_hh.shape[1]
        h = c = x.new_zeros(x.shape[0], hidden)
        w_hh = cell.w_hh[n] if cell.mask is None else cell.w_hh[n] * cell.mask[n]
        for t in range(x.shape[1]):
            p1 = q(product(q(x[:, t], "a1", inp), cell.w_ih[n], cell.b_ih[n]), "a12", mvm)
            p2 = q(product(q(h, "a11", inp), w_hh, cell.b_hh[n]), "a13", mvm)
            g = q(p1 + p2, "a14", nm)
            i, j, f, o = (g[:, k * hidden : (k + 1) * hidden] for k in range(4))
            forget, keep = q(torch.sigmoid(f), "a3", nm), q(torch.sigmoid(i), "a4", nm)
            new, out = q(torch.tanh(j), "a5", nm), q(torch.sigmoid(o), "a6", nm)
            c = q(q(c * forget, "a7", nm) + q(keep * new, "a8", nm), "a9", nm)
            h = q(q(torch.tanh(c), "a10", nm) * out, "a11", nm)
        results.append(h)
    return torch.stack(results)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bits", [Bits(), Bits(None, None, None), Bits(3, 5, 6)], ids=str)
def test_plain_loop_equals_the_specification(bits: Bits, mask: bool) -> None:
    # Double precision: rounding errors of the products do not reach the middle between levels.
    x, cell, grad = make(bits=bits, mask=mask, dtype=torch.float64)
    h, grads = run(plain_lstm, x, cell, grad)
    expected, expected_grads = run(literal, x, cell, grad)
    torch.testing.assert_close(h, expected)
    for name in NAMES:
        torch.testing.assert_close(grads[name], expected_grads[name], msg=lambda text, name=name: f"{name}: {text}")


def test_tight_ranges_clip_every_signal() -> None:
    _, grads = run(plain_lstm, *make())
    for name in RANGES:
        assert grads["ranges"][ROW[name]].abs().max() > 0, name


CASES = {
    "default": {},
    "paper ranges": {"tight": False},
    "dropconnect": {"mask": True},
    "one block": {"blocks": 1, "batch": 40},
    "many blocks": {"blocks": 7, "batch": 3},
    "single clip": {"batch": 1, "steps": 1},
    "narrow": {"hidden": 5, "mask": True},
    "one unit": {"hidden": 1, "width": 1},
    "whole vectors": {"hidden": 32, "width": 15},
    "large batch": {"blocks": 2, "batch": 150, "steps": 3},
    "larger batch": {"blocks": 2, "batch": 300, "steps": 2},
    "uneven slices": {"blocks": 3, "batch": 33},
    "five blocks": {"blocks": 5, "batch": 17, "steps": 4},
    "low bits": {"bits": Bits(2, 3, 4)},
    "many bits": {"bits": Bits(9, 12, 11)},
    "analog inputs": {"bits": Bits(None, 6, 8)},
    "analog outputs": {"bits": Bits(4, None, 8)},
    "quantised weights": {"device": Device(max_w=0.25, bits=4)},
    "paper's weight range": {"device": Device(max_w=0.25, bits=6, weight_range="paper")},
}
ANALOG = {"analog digital": Bits(4, 6, None), "analog": Bits(None, None, None)}


def compare(path, noise: float, settings: dict, exact: bool = True, **tolerance) -> None:
    x, cell, grad = make(**settings)
    cell.noise = None
    if noise:
        cell.noise = lambda name, step: native.native_noise(x, cell, noise, 77, name, step)
    h, grads = run(path, x, cell, grad)
    expected, expected_grads = run(plain_lstm, x, cell, grad)
    if exact:
        assert torch.equal(h, expected)
    else:
        torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-6)
    for name in NAMES:
        scale = expected_grads[name].abs().max().clamp_min(1e-6)
        torch.testing.assert_close(
            grads[name] / scale, expected_grads[name] / scale, rtol=1e-4, atol=3e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


def native_path(noise: float):
    return lambda x, cell: native.native_lstm(x, dataclasses.replace(cell, noise=None), noise, 77)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("case", CASES)
def test_native_equals_plain(native_library, case: str, noise: float) -> None:
    compare(native_path(noise), noise, CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_plain(case: str) -> None:
    compare(fused_lstm, 0.0, CASES[case])


def test_fused_takes_noise(native_library) -> None:
    compare(fused_lstm, 0.02, {"mask": True})


@pytest.mark.parametrize("path", ["fused", "native"])
@pytest.mark.parametrize("case", ANALOG)
def test_analog_equals_plain_to_rounding(native_library, path: str, case: str) -> None:
    # Without levels to snap to, the last digits of sigmoid and tanh may differ.
    settings = {"bits": ANALOG[case]} if case == "analog" else {"bits": ANALOG[case], "steps": 2}
    compare(fused_lstm if path == "fused" else native_path(0.0), 0.0, settings, exact=False)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_computes_the_same(native_library, monkeypatch, tmp_path, isa: str) -> None:
    copy = shutil.copy(native_library, tmp_path / f"{isa}.so")  # a library decides once
    monkeypatch.setenv("KESTREL_ISA", isa)
    library = native.open_library(copy)
    monkeypatch.setattr(native, "_load", lambda: library)
    for case in ("default", "narrow", "many bits", "analog outputs"):
        compare(native_path(0.02), 0.02, CASES[case])


def test_portable_code_computes_the_same(native_library, monkeypatch, tmp_path) -> None:
    """Without instruction sets of x86, oneDNN's kernels and an exported BLAS, as on other machines."""
    library = native.open_library(build.build(tmp_path, ("-DKESTREL_PORTABLE", "-O1")))
    monkeypatch.setattr(native, "_load", lambda: library)
    for case in ("default", "narrow", "many bits"):
        compare(native_path(0.02), 0.02, CASES[case])


def test_native_does_not_depend_on_threads(native_library) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(native_path(0.02), *make(blocks=5, batch=40)))
    finally:
        torch.set_num_threads(before)
    for h, grads in results[1:]:
        assert torch.equal(h, results[0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in NAMES)


@pytest.mark.parametrize("path", ["plain", "fused", "native"])
def test_gradient_of_the_input(native_library, path: str) -> None:
    x, cell, grad = make()
    paths = {"plain": plain_lstm, "fused": fused_lstm, "native": native_path(0.0)}
    x.requires_grad_()
    paths[path](x, cell).backward(grad)
    reference, cell, grad = make()
    reference.requires_grad_()
    plain_lstm(reference, cell).backward(grad)
    assert x.grad.abs().max() > 0
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-6 * reference.grad.abs().max().item())


@pytest.mark.parametrize("path", ["fused", "native"])
def test_results_without_gradients_agree(native_library, path: str) -> None:
    """Without a backward pass, two steps take turns in memory."""
    x, cell, _ = make(steps=20)
    compute = fused_lstm if path == "fused" else native_path(0.02)
    with torch.no_grad():
        quiet = compute(x, cell)
    assert not quiet.requires_grad
    assert torch.equal(quiet, compute(x, cell).detach())


def test_native_passes_may_overlap(native_library) -> None:
    """Several forward passes before their backward passes, in any order, and one backward pass repeated."""
    first, second = make(seed=1), make(seed=2)
    alone = [run(native_path(0.0), *problem) for problem in (first, second)]
    for _, cell, _ in (first, second):
        for name in NAMES:
            getattr(cell, name).grad = None
    h1, h2 = (native_path(0.0)(x, cell) for x, cell, _ in (first, second))
    h1.backward(first[2], retain_graph=True)
    h2.backward(second[2])
    for (_, cell, _), (_, grads) in zip((first, second), alone, strict=True):
        assert all(torch.equal(getattr(cell, name).grad, grads[name]) for name in NAMES)
    h1.backward(first[2])
    torch.testing.assert_close(first[1].w_hh.grad, 2 * alone[0][1]["w_hh"])


@pytest.mark.parametrize("place", ["x", "w_ih", "w_hh", "b_hh", "ranges"])
def test_native_carries_nan(native_library, place: str) -> None:
    """Codes have no NaN: the result must say it all the same, or a diverged run would go on unnoticed."""
    x, cell, _ = make()
    with torch.no_grad():
        (x if place == "x" else getattr(cell, place)).view(-1)[3] = float("nan")
    assert native_path(0.0)(x, cell).isnan().any()


def test_native_noise_is_normal_and_fresh(native_library) -> None:
    from scipy import stats

    x, cell, _ = make(blocks=2, width=60, hidden=64, steps=4)
    draws = {
        (product, step, seed): native.native_noise(x, cell, 0.5, seed, product, step)
        for product in ("ih", "hh")
        for step in range(4)
        for seed in (1, 2)
    }
    values = {key: torch.cat([weight.flatten(), bias.flatten()]).double() for key, (weight, bias) in draws.items()}
    for key, value in values.items():
        assert value.mean().abs() < 4 * 0.5 / len(value) ** 0.5, key
        assert stats.kstest((value / 0.5).numpy(), "norm").pvalue > 1e-4, key
    every = torch.cat(list(values.values())) / 0.5  # 500,000 numbers
    assert stats.kstest(every.numpy(), "norm").pvalue > 1e-3
    assert every.std().item() == pytest.approx(1, abs=0.005)
    assert (every**4).mean().item() == pytest.approx(3, abs=0.08)
    assert 4.2 < every.abs().max() < 6
    # Fresh at every step and product, for every block and seed; neighbours and halves do not go together.
    some = torch.stack([values["hh", step, seed][:16000] for step in range(4) for seed in (1, 2)])
    some = torch.cat([some, torch.stack([values["ih", 0, 1][:16000], values["hh", 0, 1][-16000:]])])
    assert (torch.corrcoef(some) - torch.eye(len(some))).abs().max() < 0.04
    one = values["hh", 0, 1]
    for lag in (1, 2, 64, 256, len(one) // 4):
        assert torch.corrcoef(torch.stack([one[lag:], one[:-lag]]))[0, 1].abs() < 0.03, lag


def module(**settings) -> QuantLSTM:
    torch.manual_seed(5)
    return QuantLSTM(13, 21, 2, Bits(), Device(), **{"input_range": 4.0, **settings})


@pytest.mark.parametrize("use_native", ["0", "1"])
def test_module_follows_the_default_generator(native_library, monkeypatch, use_native: str) -> None:
    monkeypatch.setenv("KESTREL_NATIVE", use_native)
    net, x = module(), torch.randn(6, 8, 13)
    for settings in ({"noise": 0.1}, {"drop_p": 0.125}):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first, other = net(x, **settings), net(x, **settings)
        torch.set_rng_state(state)
        assert torch.equal(net(x, **settings), first)
        assert not torch.equal(first, other)
    assert torch.equal(net(x), net(x))


def test_module_paths_agree(native_library, monkeypatch) -> None:
    net, x = module(), torch.randn(6, 8, 13)
    monkeypatch.setenv("KESTREL_NATIVE", "1")
    assert native.available()
    fast = net(x)
    assert "_Sequence" in type(fast.grad_fn).__name__
    monkeypatch.setenv("KESTREL_NATIVE", "0")
    assert not native.available()
    assert torch.equal(net(x), fast)


def test_module_input(native_library) -> None:
    net = module()
    assert net(torch.randn(0, 8, 13)).shape == (2, 0, 21)
    turned = torch.randn(8, 6, 13).transpose(0, 1)  # not contiguous
    assert torch.equal(net(turned), net(turned.contiguous()))
    with pytest.raises(KestrelError, match="12 values per frame, the network takes 13"):
        net(torch.randn(6, 8, 12))
    x, cell, _ = make()
    with pytest.raises(ValueError, match="wanted"):
        native.native_lstm(x[..., :-1], cell)


def test_module_projects() -> None:
    net = module()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 10)
    net.project()
    assert max(net.w_ih.abs().max(), net.w_hh.abs().max()) <= 0.2
    assert max(net.b_ih.abs().max(), net.b_hh.abs().max()) <= 1.2
    assert net.ranges.min() >= 0.01


def test_frozen_ranges_get_no_gradient() -> None:
    net = module(trainable_ranges=False)
    net(torch.randn(6, 8, 13)).sum().backward()
    assert net.ranges.grad is None
    assert net.w_hh.grad is not None


def test_drop_probability_masks_the_recurrent_weights(monkeypatch) -> None:
    """With all recurrent weights dropped, h takes part through its bias alone."""
    net, x = module(), torch.randn(6, 8, 13)
    everything_dropped = net(x, drop_p=1.0)
    with torch.no_grad():
        net.w_hh.zero_()
    assert torch.equal(net(x), everything_dropped)


def test_draw_noise_feeds_the_torch_path(monkeypatch) -> None:
    monkeypatch.setenv("KESTREL_NATIVE", "0")
    net, x = module(), torch.randn(4, 3, 13)
    torch.manual_seed(9)
    noisy = net(x, noise=0.1)
    torch.manual_seed(9)
    cell = Cell(net.w_ih, net.w_hh, net.b_ih, net.b_hh, net.ranges, net.bits, net.device)
    weights = {"ih": (net.w_ih, net.b_ih), "hh": (net.w_hh, net.b_hh)}
    cell.noise = lambda name, step: draw_noise(*weights[name], 0.1 * 0.2)
    assert torch.equal(plain_lstm(x, cell), noisy)
