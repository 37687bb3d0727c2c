"""Quantiser and clip: levels, ties, gradients against their equations, bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kestrel.errors import UsageError
from kestrel.quant.quantiser import (
    RANGE_BITS,
    check_bits,
    clip_quantise,
    pact,
    quantise,
    shared_range,
)


def literal(x: float, bits: int, limit: float) -> float:
    """The definition, one number at a time (Python's round is half to even)."""
    half = 2 ** (bits - 1)
    y = min(max(x / limit, -1 + 1 / half), 1 - 1 / half)
    return limit * round(y * half) / half


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels(bits: int) -> None:
    limit = 0.7
    levels = quantise(torch.linspace(-2, 2, 20001, dtype=torch.float64), bits, limit).unique()
    assert len(levels) == 2**bits - 1
    step = limit / 2 ** (bits - 1)
    torch.testing.assert_close(levels.diff(), torch.full((2**bits - 2,), step, dtype=torch.float64))
    torch.testing.assert_close(levels, -levels.flip(0))
    assert levels.max() == pytest.approx(limit * (1 - 2 ** (1 - bits)))


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=30),
    st.integers(2, 16),
    st.floats(0.01, 20),
)
def test_equals_the_definition(values: list[float], bits: int, limit: float) -> None:
    # In double precision, away from ties, rounding errors cannot move a value to another level.
    half = 2 ** (bits - 1)
    values = [v for v in values if abs(abs(v / limit * half) % 1 - 0.5) > 1e-9]
    expected = torch.tensor([literal(v, bits, limit) for v in values], dtype=torch.float64)
    torch.testing.assert_close(quantise(torch.tensor(values, dtype=torch.float64), bits, limit), expected)


def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantise(x, 4, 8.0).tolist() == [0, 2, 2, 0, -2, -2]


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30), st.integers(2, 16), st.floats(0.01, 20))
def test_bit_for_bit_the_literal_formula(values: list[float], bits: int, limit: float) -> None:
    x, r, half = torch.tensor(values), torch.tensor(limit), 2 ** (bits - 1)
    expected = r * torch.round(torch.clamp(x / r, -1 + 1 / half, 1 - 1 / half) * half) / half
    assert torch.equal(quantise(x, bits, r), expected)


@pytest.mark.parametrize("limit", [0.5, 1.0, 4.0])
def test_levels_of_a_finer_grid_meet_exact_ties(limit: float) -> None:
    """A level of 8 bits requantised to 4 bits over the same range follows the codes."""
    codes = torch.arange(-127, 128)
    fine = quantise(codes / 128 * limit, 8, torch.tensor(limit))
    assert torch.equal(quantise(fine, 4, torch.tensor(limit)), (codes / 16).round().clamp(-7, 7) / 8 * limit)


@given(st.floats(0.01, 200))
def test_shared_range_keeps_ties_between_two_quantisers_exact(limit: float) -> None:
    """Codes of 8 bits requantised to 4 over one range: float32 agrees with integers, ties to even included."""
    shared = shared_range(torch.tensor([limit]))
    assert abs(float(shared) / limit - 1) <= 2.0**-RANGE_BITS
    assert torch.equal(shared_range(shared), shared)
    codes = torch.arange(-127, 128)
    fine = quantise(codes * (shared / 128), 8, shared)
    coarse = torch.round(quantise(fine, 4, shared) / (shared / 8))
    assert torch.equal(coarse.int(), torch.from_numpy(np.clip(np.rint(codes.numpy() / 16), -7, 7)).int())


def test_shared_range_learns_by_every_bit() -> None:
    limit = torch.tensor([3.7, 0.013], requires_grad=True)
    (shared_range(limit) * torch.tensor([2.0, 5.0])).sum().backward()
    assert limit.grad.tolist() == [2, 5]


@given(st.floats(0.01, 50), st.integers(2, 16), st.integers(0, 2**31 - 1))
def test_idempotent(limit: float, bits: int, seed: int) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * limit
    once = quantise(x, bits, torch.tensor(limit))
    assert torch.equal(quantise(once, bits, torch.tensor(limit)), once)


@pytest.mark.parametrize("bits", [None, 0])
def test_identity_for_analog(bits: int | None) -> None:
    x = torch.randn(20)
    assert quantise(x, bits, 1.0) is x


def test_gradient_is_straight_through_also_outside() -> None:
    x = torch.tensor([-9.0, -0.3, 0.0, 0.4, 9.0], requires_grad=True)
    limit = torch.tensor(1.0, requires_grad=True)
    grad = torch.randn(5)
    quantise(x, 4, limit).backward(grad)
    assert torch.equal(x.grad, grad)
    assert limit.grad is None


def test_clip_equals_its_equation() -> None:
    x, a = (
        torch.randn(3, 5, 7, dtype=torch.float64) * 2,
        torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1),
    )
    torch.testing.assert_close(pact(x, a), x.sign() * 0.5 * (x.abs() - (x.abs() - a).abs() + a))


def test_gradient_of_the_clip() -> None:
    x = (torch.randn(3, 5, 7, dtype=torch.float64) * 2).requires_grad_()
    a = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(pact, (x, a))
    grad = torch.randn(3, 5, 7, dtype=torch.float64)
    pact(x, a).backward(grad)
    outside = x.detach().abs() > a.detach()
    torch.testing.assert_close(x.grad, torch.where(outside, 0.0, grad))
    torch.testing.assert_close(a.grad, torch.where(outside, grad * x.detach().sign(), 0.0).sum((1, 2), keepdim=True))


def test_range_learns_through_the_clip_only() -> None:
    x, a = torch.tensor([0.2, 5.0]), torch.tensor(1.0, requires_grad=True)
    clip_quantise(x, 4, a).sum().backward()
    assert a.grad.item() == 1.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_operators_agree() -> None:
    x, a = torch.randn(40) * 3, torch.tensor(1.3)
    traced = torch.jit.trace(lambda v: clip_quantise(v, 5, a), (x,))
    assert torch.equal(traced(x), clip_quantise(x, 5, a))


@pytest.mark.parametrize("bits", [-1, 1, 17, True, 2.5])
def test_wrong_bits(bits) -> None:
    with pytest.raises(UsageError, match=r"^model.quant_inp: .*2\.\.16") as error:
        check_bits("model.quant_inp", bits)
    assert "\n" not in str(error.value)
