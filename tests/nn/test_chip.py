"""Deviations of a chip: what its converters read, how chips are drawn, and every path with the same chip."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_quant_lstm import NAMES, make, run

from kestrel.errors import UsageError
from kestrel.nn import native
from kestrel.nn.cell import Bits, plain_lstm
from kestrel.nn.chip import Converter, Deviations, draw_chip
from kestrel.nn.fused import fused_lstm


def products(blocks: int = 3) -> dict:
    torch.manual_seed(0)
    return {
        name: (torch.randn(blocks, rows, 400), torch.randn(blocks, 400)) for name, rows in (("ih", 30), ("hh", 100))
    }


def curve(gain: float, offset: float, bow: float) -> Converter:
    return Converter(*(torch.full((1, 1), value, dtype=torch.float64) for value in (1 + gain, offset, bow)))


def read(converter: Converter, values: list[float], limit: float = 3.2, bits: int = 6) -> list[float]:
    """In steps of the converter."""
    v = torch.tensor(values, dtype=torch.float64).view(1, -1, 1)
    step = limit / 2 ** (bits - 1)
    return (converter(v * step, torch.tensor([limit], dtype=torch.float64), bits) / step).flatten().tolist()


def test_curve_in_steps_of_the_converter() -> None:
    assert read(curve(0, 0, 0), [-40, -3.3, 0, 7]) == pytest.approx([-40, -3.3, 0, 7])
    assert read(curve(0, 2, 0), [-5, 0, 5]) == pytest.approx([-3, 2, 7])
    assert read(curve(0.1, 0, 0), [-10, 0, 20]) == pytest.approx([-11, 0, 22])
    # The bow has its peak in the middle, is gone at both ends of the range and stays so outside.
    assert read(curve(0, 0, 1.5), [-50, -32, -16, 0, 16, 32, 50]) == pytest.approx(
        [-50, -32, -16 + 1.5 * 0.75, 1.5, 16 + 1.5 * 0.75, 32, 50]
    )


def test_curve_passes_the_gradient() -> None:
    v = torch.randn(1, 6, 1, dtype=torch.float64, requires_grad=True)
    curve(0.3, 2, 3).read(v, torch.tensor([1.0], dtype=torch.float64), 6).backward(torch.arange(6.0).view(1, 6, 1))
    assert v.grad.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_chip_depends_on_its_key_alone_and_strength_scales_it() -> None:
    weak, again, other = (draw_chip(Deviations(0.1, 0.5, 0.01, 2.0), products(), 0.2, key) for key in (1, 1, 2))
    strong = draw_chip(Deviations(0.2, 0.0, 0.02, 0.0), products(), 0.2, 1)
    for name in ("ih", "hh"):
        assert torch.equal(weak[name].program[0], again[name].program[0])
        assert not torch.equal(weak[name].program[0], other[name].program[0])
        torch.testing.assert_close(strong[name].program[0], 2 * weak[name].program[0])
        torch.testing.assert_close(strong[name].converter.factor - 1, 2 * (weak[name].converter.factor - 1))
        assert weak[name].program[0].std().item() == pytest.approx(0.1 * 0.2, rel=0.03)
        assert weak[name].converter.offset.std().item() == pytest.approx(0.5, rel=0.1)
        assert weak[name].converter.bow.std().item() == pytest.approx(2, rel=0.1)


def test_what_is_drawn() -> None:
    per_chip = draw_chip(Deviations(adc_offset=1.0, adc_draw="chip"), products(), 0.2, 1)
    values = torch.cat([per_chip[name].converter.offset.flatten() for name in ("ih", "hh")]).unique()
    assert len(values) == 1 and values[0] not in (0.0, 1.0)
    fixed = draw_chip(Deviations(adc_offset=-1.5, adc_draw="fixed"), products(), 0.2, 1)
    assert fixed["ih"].converter.offset.unique().tolist() == [-1.5]
    assert fixed["ih"].converter.factor.unique().tolist() == [1.0]
    assert fixed["ih"].program is None
    assert not Deviations(adc_draw="fixed").any
    assert Deviations(adc_gain=0.1).figures() == {"adc_gain": 0.1, "adc_draw": "column"}


def test_wrong_deviations() -> None:
    with pytest.raises(UsageError, match=r"^model\.noise_program: -1"):
        Deviations(noise_program=-1)
    with pytest.raises(UsageError, match=r"^model\.adc_draw: "):
        Deviations(adc_draw="row")  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [21, 5, 32])  # 5: blocks narrower than a vector are widened
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_paths_agree_about_a_chip(native_library, hidden: int, noise: float) -> None:
    x, cell, grad = make(hidden=hidden, mask=True, bits=Bits(4, 5, 8))
    parts = {"ih": (cell.w_ih.detach(), cell.b_ih.detach()), "hh": (cell.w_hh.detach(), cell.b_hh.detach())}
    cell.chip = draw_chip(Deviations(0.2, 1.0, 0.05, 1.5), parts, 0.25, 7)
    if noise:
        cell.noise = lambda name, step: native.native_noise(x, cell, noise, 77, name, step)
    expected, grads = run(plain_lstm, x, cell, grad)
    paths = {
        "fused": fused_lstm,
        "native": lambda x, cell: native.native_lstm(x, dataclasses.replace(cell, noise=None), noise, 77),
    }
    for path in paths.values():
        h, found = run(path, x, cell, grad)
        assert torch.equal(h, expected)
        for name in NAMES:
            torch.testing.assert_close(found[name], grads[name], rtol=1e-4, atol=3e-6 * float(grads[name].abs().max()))
    ideal, _ = run(plain_lstm, x, dataclasses.replace(cell, chip={}), grad)
    assert not torch.equal(ideal, expected)
