"""Bit-serial crossbar inputs: slices against a literal reading, gradients, the paths, and settings that do not fit."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import UsageError
from kestrel.nn import native, quant_lstm
from kestrel.nn.cell import RANGES, Bits, Cell, plain_lstm
from kestrel.nn.chip import Deviations, draw_chip
from kestrel.nn.crossbar import Device, Serial, crossbar, serial_crossbar, slice_codes
from kestrel.nn.fused import fused_lstm
from kestrel.nn.quant_lstm import QuantLSTM
from kestrel.quant.quantiser import clip_quantise

NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "ranges")


@settings(deadline=None)
@given(bits=st.integers(2, 6), slices=st.integers(1, 5), limit=st.floats(0.1, 200), share=st.floats(-1.5, 1.5))
def test_slices_add_up_to_the_quantised_input(bits: int, slices: int, limit: float, share: float) -> None:
    x, a = torch.tensor([share * limit], dtype=torch.float64), torch.tensor(limit, dtype=torch.float64)
    codes, seen = slice_codes(x.clamp(-limit, limit), bits, slices, a)
    torch.testing.assert_close(seen, clip_quantise(x, bits + slices - 1, a))
    top = 2 ** (bits - 1)
    assert all(code == code.round() and abs(code) < top for code in codes)
    torch.testing.assert_close(sum(code * limit / top / 2**i for i, code in enumerate(codes)), seen)


def test_two_bit_slices_are_signs_of_three_levels() -> None:
    codes, _ = slice_codes(torch.tensor([7.0, 5.0, -3.0, 0.0]) / 8, 2, 3, torch.tensor(1.0))
    assert torch.stack(codes, 1).tolist() == [[1, 1, 1], [1, 0, 1], [-1, 0, 1], [0, 0, 0]]


def problem(slices: int, dtype=torch.float64, mvm: int | None = 6):
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((2, 4, 5), (2, 5, 3), (2, 3))
    )
    limit = torch.tensor([1.5, 2.5], dtype=dtype).view(2, 1, 1)
    return x.clamp(-limit, limit), weight * 0.3, bias * 0.5, limit, Device(0.2, 6), Serial(2, slices, mvm)


def literal(x, weight, bias, limit, device, serial) -> torch.Tensor:
    """a sum_i Q(y_i W + b', MVM, 1) / 2^i entry by entry, from the residual of the input itself."""
    weight, bias = weight.clamp(-0.2, 0.2), bias.clamp(-1.2, 1.2)
    full, half = 2 ** (serial.bits + serial.slices - 2), 2 ** (serial.mvm - 1)
    d = 2 ** (serial.bits - 1)
    out = torch.zeros(x.shape[0], x.shape[1], weight.shape[2], dtype=x.dtype)
    betas = [0.5**i for i in range(serial.slices)]
    for n in range(x.shape[0]):
        a = limit[n].item()
        for row in range(x.shape[1]):
            rest = [max(1 - full, min(full - 1, round(v.item() / a * full))) / full for v in x[n, row]]
            for beta in betas:
                y = [max(1 - d, min(d - 1, round(v / beta * d))) / d for v in rest]
                rest = [v - beta * part for v, part in zip(rest, y, strict=True)]
                for o in range(out.shape[2]):
                    total = sum(part * weight[n, i, o].item() for i, part in enumerate(y))
                    total += bias[n, o].item() / a / sum(betas)
                    out[n, row, o] += a * beta * max(1 - half, min(half - 1, round(total * half))) / half
    return out


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_product_equals_the_literal_reading(slices: int) -> None:
    settings = problem(slices)
    torch.testing.assert_close(serial_crossbar(*settings, [None] * slices), literal(*settings))


def test_analog_converters_give_the_parallel_product() -> None:
    x, weight, bias, limit, device, serial = problem(3, mvm=None)
    expected = crossbar(clip_quantise(x, 4, limit), weight, bias, device)
    torch.testing.assert_close(serial_crossbar(x, weight, bias, limit, device, serial, [None] * 3), expected)


def test_gradients_are_the_sums_over_slices() -> None:
    x, weight, bias, limit, device, serial = problem(3)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    grad = torch.randn(2, 4, 3, dtype=torch.float64)
    serial_crossbar(x, weight, bias, limit, device, serial, [None] * 3).backward(grad)
    codes, _ = slice_codes(x.detach(), 2, 3, limit)
    over_slices = sum((code * limit / 2 / 2**i).transpose(1, 2) @ grad for i, code in enumerate(codes))
    torch.testing.assert_close(weight.grad, over_slices)
    torch.testing.assert_close(x.grad, grad @ weight.detach().clamp(-0.2, 0.2).transpose(1, 2))
    torch.testing.assert_close(bias.grad, grad.sum(1))


def cell_of(slices: int, noise: bool = False, chip: bool = False) -> tuple[torch.Tensor, Cell, torch.Tensor]:
    torch.manual_seed(4)
    ranges = torch.tensor(list(RANGES.values())).view(-1, 1).repeat(1, 3) * (0.3 + torch.rand(len(RANGES), 3))
    ranges[0] = 3
    tensors = [
        torch.randn(3, 7, 20) * 0.2, torch.randn(3, 5, 20) * 0.4, torch.randn(3, 20) * 0.2, torch.randn(3, 20), ranges
    ]  # fmt: skip
    cell = Cell(*(tensor.requires_grad_() for tensor in tensors), Bits(2, 5, 7, slices), Device(0.3))
    if noise:
        cell.noise = lambda name, step: tuple(
            torch.randn(part.shape, generator=torch.Generator().manual_seed(step * 2 + (name == "hh"))) * 0.02
            for part in ((cell.w_ih, cell.b_ih) if name == "ih" else (cell.w_hh, cell.b_hh))
        )
    if chip:
        products = {"ih": (cell.w_ih.detach(), cell.b_ih.detach()), "hh": (cell.w_hh.detach(), cell.b_hh.detach())}
        cell.chip = draw_chip(Deviations(0.1, 1.0, 0.02, 1.0), products, 0.3, 5)
    return torch.randn(6, 8, 7) * 2, cell, torch.randn(3, 6, 5)


@pytest.mark.parametrize(("noise", "chip"), [(False, False), (True, False), (True, True)])
def test_fused_equals_plain(noise: bool, chip: bool) -> None:
    results = []
    for path in (plain_lstm, fused_lstm):
        x, cell, grad = cell_of(3, noise, chip)
        h = path(x.requires_grad_(), cell)
        h.backward(grad)
        results.append([h.detach(), x.grad, *(getattr(cell, name).grad for name in NAMES)])
        assert results[-1][0].unique().numel() > 10
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_module_says_once_that_it_takes_the_pytorch_path(caplog, monkeypatch) -> None:
    quant_lstm._say_serial.cache_clear()
    net, x = QuantLSTM(7, 5, 2, Bits(2, 6, 8, 3), Device(), input_range=4.0), torch.randn(3, 4, 7)
    with caplog.at_level(logging.INFO, "kestrel"):
        for _ in range(2):
            assert net(x).shape == (2, 3, 5)
    assert sum("bit-serial inputs have no native LSTM" in record.message for record in caplog.records) == 1
    with pytest.raises(ValueError, match="bit-serial"):
        native.native_lstm(x, cell_of(3)[1])


@pytest.mark.parametrize(
    ("bits", "field"),
    [((None, 6, 8, 2), "model.input_coding: "), ((4, 6, 8, 14), r"model.input_slices: 14 .*1\.\.13 with quant_inp 4")],
)
def test_slices_need_codes_to_split(bits, field: str) -> None:
    with pytest.raises(UsageError, match=field):
        Bits(*bits)
