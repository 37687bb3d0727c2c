"""Integer arithmetic of lowered models: rounding, saturation, rescaling, tables. docs/integer.md states it for C.

Values are NumPy int64 arrays that hold what a device keeps in 8, 16 or 32 bits; the graph proves that they fit. There
is one rounding rule, half to even, which is also the rule of fake-quant training (torch.round).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kestrel.digits import signed_digits as signed_digits

MULTIPLIER_BITS = 31  # a multiplier is below 2^31 in magnitude: an int32
MAX_SHIFT = 62
INT32 = (-(1 << 31), (1 << 31) - 1)

Array = np.ndarray
Ints = Sequence[int]


def symmetric(bits: int) -> tuple[int, int]:
    """Codes of the fake-quant quantiser at `bits`: those of two's complement without the most negative one."""
    high = (1 << (bits - 1)) - 1
    return -high, high


def twos_complement(bits: int) -> tuple[int, int]:
    """All values of a two's complement field of `bits`."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def saturate(x: Array, low: int, high: int) -> Array:
    """`x` clamped to low .. high."""
    return np.clip(x, low, high)


def rounding_shift(x: Array, shift: int) -> Array:
    """x / 2^shift rounded half to even, int64 with |x| + 2^shift < 2^63 and shift 0..62.

    (x + 2^(shift-1) - 1 + (bit `shift` of x)) >> shift, the shift being arithmetic.
    """
    return _rounding_shift(np.array(x, dtype=np.int64), shift)


def _rounding_shift(x: Array, shift: int) -> Array:
    """The same, overwriting the int64 array `x`."""
    if shift == 0:
        return x
    odd = x >> shift
    odd &= 1
    x += odd
    x += (1 << (shift - 1)) - 1
    x >>= shift
    return x


def from_reals(ratios: Sequence[float]) -> tuple[list[int], int]:
    """Multipliers m and one shift s with m / 2^s = ratio: |error| <= max|ratio| 2^-31, or 2^-63 where that is larger.

    Powers of two, and every ratio of few bits, are exact. Common factors of two are taken out, so that a pure shift has
    multiplier 1. Raises ValueError for ratios that are not finite or have magnitude above 2^31 - 1.
    """
    largest = max((abs(ratio) for ratio in ratios), default=0.0)
    if not math.isfinite(sum(ratios)) or largest > (1 << MULTIPLIER_BITS) - 1:
        raise ValueError(f"ratio {largest:g} does not fit a multiplier of {MULTIPLIER_BITS} bits")
    if largest == 0:
        return [0] * len(ratios), 0
    shift = min(MULTIPLIER_BITS - math.frexp(largest)[1], MAX_SHIFT)  # largest * 2^shift in [2^30, 2^31)
    multipliers = [round(math.ldexp(ratio, shift)) for ratio in ratios]
    if max(abs(m) for m in multipliers) >= 1 << MULTIPLIER_BITS:  # rounded up to 2^31
        shift -= 1
        multipliers = [round(math.ldexp(ratio, shift)) for ratio in ratios]
    while shift > 0 and all(m % 2 == 0 for m in multipliers):
        multipliers = [m // 2 for m in multipliers]
        shift -= 1
    return multipliers, shift


def from_real(ratio: float) -> tuple[int, int]:
    """Multiplier and shift of one ratio, relative error <= 2^-31 (down to ratios of 2^-32)."""
    multipliers, shift = from_reals([ratio])
    return multipliers[0], shift


def few_digits(multiplier: int, terms: int) -> int:
    """The multiplier as a sum of at most `terms` signed powers of two, relative error <= 3^-terms.

    Each term is the power of two nearest to what is left, which leaves at most a third of it.
    """
    found, rest = 0, multiplier
    for _ in range(terms):
        if not rest:
            break
        below = 1 << (abs(rest).bit_length() - 1)
        power = 2 * below if 2 * abs(rest) > 3 * below else below
        found += power if rest > 0 else -power
        rest = multiplier - found
    return found


def shift_add(ratio: float, terms: int) -> tuple[int, int]:
    """Multiplier and shift like `from_real`, but the multiplier is a sum of at most `terms` signed powers of two.

    A product with it is `terms` shifts and additions. Relative error <= 3^-terms + 2^-30.
    """
    if terms < 1:
        raise ValueError("a shift-add multiplier has at least one term")
    multiplier, shift = from_real(ratio)
    multiplier = few_digits(multiplier, terms)
    while shift > 0 and multiplier % 2 == 0 and multiplier:
        multiplier, shift = multiplier // 2, shift - 1
    if abs(multiplier) >= 1 << MULTIPLIER_BITS:
        raise ValueError(f"ratio {ratio:g} does not fit a multiplier of {MULTIPLIER_BITS} bits")
    return multiplier, shift


@dataclass(frozen=True)
class Rescale:
    """y = clamp(round((x * multiplier + offset) / 2^shift), low, high): one 64-bit product, one rounding.

    `multipliers` and `offsets` hold one value for all, or one per index of the last axis of x. Offsets are in units of
    2^-shift of an output code. With x and offsets of 32 bits, multipliers below 2^31 and shifts up to 62, the sum with
    its rounding stays below 2^62 + 2^61 + 2^31: it cannot overflow.
    """

    multipliers: tuple[int, ...]
    shift: int
    low: int
    high: int
    offsets: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, ratios: float | Sequence[float], limits: tuple[int, int], offsets: Sequence[float] = (0.0,)) -> Rescale:
        """x * ratio + offset, both real and in output codes, with multipliers and offsets of 32 bits.

        The shift is the largest that they allow. What is lost: at most (|x| + 1) 2^-(shift+1) of an output code.
        """
        multipliers, shift = from_reals([float(r) for r in (ratios if isinstance(ratios, Sequence) else [ratios])])
        if any(offsets):
            largest = max(abs(float(offset)) for offset in offsets)
            if not math.isfinite(largest) or largest >= INT32[1]:
                raise ValueError(f"offset {largest:g} does not fit 32 bits")
            wanted = min(MULTIPLIER_BITS - math.frexp(largest)[1] - 1, MAX_SHIFT)
            # Up to where the multipliers fill 31 bits, or down to where the offsets fit.
            widest = MULTIPLIER_BITS - max(abs(m) for m in multipliers).bit_length() + shift
            shift = max(0, min(wanted, widest, MAX_SHIFT))
            found = ratios if isinstance(ratios, Sequence) else [ratios]
            multipliers = [round(math.ldexp(float(ratio), shift)) for ratio in found]
        return cls(tuple(multipliers), shift, *limits, tuple(round(math.ldexp(float(o), shift)) for o in offsets))

    def apply(self, x: Array) -> Array:
        """x int64 [..., C] -> int64 of the same shape."""
        product = x * np.array(self.multipliers, dtype=np.int64)
        if any(self.offsets):
            product += np.array(self.offsets, dtype=np.int64)
        return np.clip(_rounding_shift(product, self.shift), self.low, self.high, out=product)


def add_rescaled(xs: Sequence[Array], multipliers: Ints, shift: int, low: int, high: int) -> Array:
    """clamp(round(sum of x_i * m_i / 2^shift)): inputs of different scales added with a single rounding."""
    total = xs[0] * np.int64(multipliers[0])
    for x, multiplier in zip(xs[1:], multipliers[1:], strict=True):
        total += x * np.int64(multiplier)
    return np.clip(_rounding_shift(total, shift), low, high, out=total)


def table_of(function: Callable[[Array], Array], low: int, high: int) -> Array:
    """The table of `function` (int64 codes -> codes) for every input code low .. high, int64 [high - low + 1]."""
    return np.asarray(function(np.arange(low, high + 1, dtype=np.int64)), dtype=np.int64)


def lookup(x: Array, table: Array, first: int) -> Array:
    """table[x - first]."""
    return table[x - first]


@dataclass(frozen=True)
class Segments:
    """A function as straight lines between nodes 2^step_bits input codes apart, the first node at `first`; clamped.

    The lines follow the function itself, which is clamped afterwards, so that the corners of clamping are exact.
    """

    nodes: Array  # int64; one more than the segments that inputs fall into
    first: int
    step_bits: int
    low: int
    high: int
    error: float  # largest |value - clamped function| over all inputs, in output codes

    def apply(self, x: Array) -> Array:
        """int64 codes -> int64 codes of the same shape."""
        return saturate(interpolate(x, self.nodes, self.first, self.step_bits), self.low, self.high)


def interpolate(x: Array, nodes: Array, first: int, step_bits: int) -> Array:
    """n_i + round((n_(i+1) - n_i) * f / 2^step_bits), with i and f quotient and remainder of (x - first) / 2^step_bits."""
    position = x - first
    index = position >> step_bits
    start = nodes[index]
    rise = nodes[index + 1] - start
    rise *= position & ((1 << step_bits) - 1)
    return start + _rounding_shift(rise, step_bits)


def segments_of(
    function: Callable[[Array], Array], inputs: tuple[int, int], limits: tuple[int, int], step_bits: int
) -> Segments:
    """`function` maps int64 input codes to real output codes. The error is found by trying every input code."""
    low, high = inputs
    last = (high - low) >> step_bits  # the segment of the largest input
    places = low + (np.arange(last + 2, dtype=np.int64) << step_bits)
    nodes = np.rint(function(places)).astype(np.int64)
    every = np.arange(low, high + 1, dtype=np.int64)
    found = saturate(interpolate(every, nodes, low, step_bits), *limits)
    error = np.abs(found - np.clip(function(every), *limits)).max()
    return Segments(nodes, low, step_bits, *limits, float(error))


def argmax(x: Array) -> Array:
    """Index of the largest value along the last axis, the first one where several are equal."""
    return x.argmax(axis=-1)
