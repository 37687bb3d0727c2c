from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kestrel.quant import integer
from kestrel.quant.integer import (
    Rescale,
    add_rescaled,
    argmax,
    few_digits,
    from_real,
    from_reals,
    interpolate,
    lookup,
    rounding_shift,
    saturate,
    segments_of,
    shift_add,
    signed_digits,
    symmetric,
    table_of,
    twos_complement,
)

int32s = st.integers(-(1 << 31), (1 << 31) - 1)
ratios = st.floats(2.0**-20, 2.0**20).flatmap(lambda value: st.sampled_from([value, -value]))


def exact(value: Fraction) -> int:
    """Half to even, on rational numbers."""
    return round(value)


def test_ranges() -> None:
    assert symmetric(8) == (-127, 127)
    assert twos_complement(8) == (-128, 127)
    assert saturate(np.array([-200, -5, 200]), *symmetric(8)).tolist() == [-127, -5, 127]


@given(st.lists(st.integers(-(1 << 61), 1 << 61), min_size=1), st.integers(0, 61))
def test_rounding_shift_is_half_to_even(values: list[int], shift: int) -> None:
    found = rounding_shift(np.array(values), shift)
    assert found.tolist() == [exact(Fraction(value, 1 << shift)) for value in values]


def test_rounding_shift_golden_values_and_leaves_its_input() -> None:
    x = np.array([-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7])
    kept = x.copy()
    assert rounding_shift(x, 1).tolist() == [-4, -3, -2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 3, 4]
    assert rounding_shift(x, 2).tolist() == [-2, -2, -1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert (x == kept).all()


@given(ratios)
def test_from_real_has_the_stated_error(ratio: float) -> None:
    multiplier, shift = from_real(ratio)
    assert abs(multiplier) < 1 << 31
    assert 0 <= shift <= 62
    assert abs(Fraction(multiplier, 1 << shift) - Fraction(ratio)) <= abs(Fraction(ratio)) / (1 << 31)


@given(st.lists(ratios, min_size=1, max_size=5))
def test_from_reals_share_a_shift(values: list[float]) -> None:
    multipliers, shift = from_reals(values)
    worst = max(abs(Fraction(value)) for value in values) / (1 << 31)
    for multiplier, value in zip(multipliers, values, strict=True):
        assert abs(Fraction(multiplier, 1 << shift) - Fraction(value)) <= worst


@pytest.mark.parametrize("exponent", range(-30, 30))
def test_powers_of_two_are_pure_shifts(exponent: int) -> None:
    assert from_real(2.0**exponent) == ((1 << exponent, 0) if exponent >= 0 else (1, -exponent))


def test_ratios_out_of_reach() -> None:
    with pytest.raises(ValueError, match="multiplier"):
        from_real(2.0**31 - 0.5)
    assert from_real(2.0**31 - 1) == ((1 << 31) - 1, 0)
    with pytest.raises(ValueError, match="multiplier"):
        from_real(2.0**31)
    with pytest.raises(ValueError, match="multiplier"):
        from_real(float("nan"))
    assert from_real(0.0) == (0, 0)
    multiplier, shift = from_real(2.0**-70)
    assert abs(multiplier / 2.0**shift - 2.0**-70) <= 2.0**-63
    assert from_real(1 - 2.0**-40) == (1, 0)  # rounded up to 2^31, then reduced


@given(ratios, st.integers(1, 24))
def test_shift_add_has_few_terms_and_the_stated_error(ratio: float, terms: int) -> None:
    multiplier, shift = shift_add(ratio, terms)
    assert len(signed_digits(multiplier)) <= terms
    allowed = abs(Fraction(ratio)) * (Fraction(1, 3**terms) + Fraction(1, 1 << 30))
    assert abs(Fraction(multiplier, 1 << shift) - Fraction(ratio)) <= allowed


@given(int32s, st.integers(1, 8))
def test_few_digits_have_the_stated_error(multiplier: int, terms: int) -> None:
    found = few_digits(multiplier, terms)
    assert len(signed_digits(found)) <= terms
    assert abs(found - multiplier) * 3**terms <= abs(multiplier)


@given(int32s)
def test_signed_digits_add_up_and_are_not_adjacent(multiplier: int) -> None:
    digits = signed_digits(multiplier)
    assert sum(sign << power if sign > 0 else -(1 << power) for sign, power in digits) == multiplier
    powers = [power for _, power in digits]
    assert all(high - low >= 2 for high, low in pairwise(powers))


@given(int32s, st.floats(2.0**-20, 1.0))
def test_rescale_rounds_once(x: int, ratio: float) -> None:
    multiplier, shift = from_real(ratio)
    found = Rescale((multiplier,), shift, -127, 127).apply(np.array([x]))
    assert found.item() == max(-127, min(127, exact(Fraction(x * multiplier, 1 << shift))))


@given(
    st.lists(st.tuples(st.floats(-4, 4), st.floats(-1000, 1000)), min_size=1, max_size=4),
    st.integers(-(1 << 20), 1 << 20),
)
def test_rescale_with_offsets_fits_32_bits_and_keeps_its_error(channels: list[tuple[float, float]], x: int) -> None:
    gains, offsets = [gain for gain, _ in channels], [offset for _, offset in channels]
    rescale = Rescale.of(gains, twos_complement(32), offsets)
    assert all(abs(value) < 1 << 31 for value in (*rescale.multipliers, *rescale.offsets))
    found = rescale.apply(np.full(len(channels), x))
    lost = (abs(x) + 1) / 2 ** (rescale.shift + 1) + 0.5
    for value, gain, offset in zip(found.tolist(), gains, offsets, strict=True):
        assert abs(value - (x * gain + offset)) <= lost + 1e-6


def test_offset_that_is_too_large() -> None:
    with pytest.raises(ValueError, match="offset"):
        Rescale.of(1.0, (0, 1), [2.0**32])


@given(st.lists(st.tuples(st.integers(-(1 << 15), 1 << 15), st.integers(-(1 << 20), 1 << 20)), min_size=1, max_size=5))
def test_sum_of_different_scales_rounds_once(parts: list[tuple[int, int]]) -> None:
    xs, multipliers = [np.array([x]) for x, _ in parts], [m for _, m in parts]
    total = exact(Fraction(sum(x * m for x, m in parts), 1 << 12))
    assert add_rescaled(xs, multipliers, 12, -32768, 32767).item() == max(-32768, min(32767, total))


@pytest.mark.parametrize("bits", [2, 4, 8, 10])
def test_table_of_a_fake_quant_function_is_exact(bits: int) -> None:
    from kestrel.quant.quantiser import quantise

    half = 1 << (bits - 1)

    def fake(codes: np.ndarray) -> np.ndarray:
        real = torch.tanh(torch.from_numpy(codes).float() / half * 4)
        return torch.round(quantise(real, bits, 1.0) * half).numpy()

    low, high = symmetric(bits)
    table = table_of(fake, low, high)
    codes = np.arange(low, high + 1)
    assert (lookup(codes, table, low) == fake(codes)).all()


@pytest.mark.parametrize("step_bits", [0, 3, 6])
def test_segments_have_the_stated_error(step_bits: int) -> None:
    def real(codes: np.ndarray) -> np.ndarray:
        return 32767 * np.tanh(codes / 2048)

    low, high = twos_complement(16)
    segments = segments_of(real, (low, high), (-20000, 30000), step_bits)
    codes = np.arange(low, high + 1)
    assert np.abs(segments.apply(codes) - np.clip(real(codes), -20000, 30000)).max() == segments.error
    # A straight line over h codes is off by at most h^2 / 8 max |f''|, and three roundings add less than 3/2.
    curvature = 32767 * 0.77 / 2048**2
    assert segments.error <= (1 << step_bits) ** 2 / 8 * curvature + 1.5


def test_interpolation_golden_values() -> None:
    nodes = np.array([0, 10, 13, 13])
    assert interpolate(np.arange(-4, 8), nodes, -4, 2).tolist() == [0, 2, 5, 8, 10, 11, 12, 12, 13, 13, 13, 13]


def test_first_largest() -> None:
    assert argmax(np.array([[1, 5, 5], [7, 7, 7], [-3, -2, -9]])).tolist() == [1, 0, 1]
    assert integer.MAX_SHIFT == 62
