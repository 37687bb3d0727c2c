"""Symmetric uniform quantiser with a straight-through gradient, and clipping with a trainable range.

Numerics of the in-memory-computing LSTM (ISCAS 2021). A quantiser of b bits over the range r > 0 has the 2^b - 1
levels k r / 2^(b-1), |k| < 2^(b-1); it rounds half to even. Clipping is the symmetric form of PACT (Choi et al. 2018),
whose range learns from the values that it clips.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from kestrel.errors import UsageError

MIN_BITS, MAX_BITS = 2, 16

# Significant bits of a range that two quantisers of different bits share. Codes of up to 11 bits times such a range are
# exact in float32, so that a value half-way between two levels of the coarser one is so in float32 as in integers.
RANGE_BITS = 14

# Trainable ranges are kept at or above this bound: a range of zero or less would divide by zero or flip signs.
MIN_RANGE = 0.01


def check_bits(name: str, bits: int | None) -> int | None:
    """`bits` as the quantisers want it: None (analog, also written 0) or 2..16. Raises UsageError otherwise."""
    if bits is None or bits == 0:
        return None
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise UsageError(f"{name}: {bits} bits; choose {MIN_BITS}..{MAX_BITS}, or null (0) for analog")
    return bits


def round_to_level(x: Tensor, bits: int | None, limit: Tensor | float) -> Tensor:
    """The nearest level of `x` (any shape), without a gradient of its own; `limit` broadcasts to `x`."""
    if bits is None:
        return x
    half = 2 ** (bits - 1)
    # Scaling by a power of two is exact, so this is r round(clamp(x / r) 2^(b-1)) / 2^(b-1) bit for bit. Divide: a
    # multiplication by 1 / step would move ties, which are common where x lies on a finer grid of the same range.
    step = limit * (1 / half)
    return (x / step).clamp(1 - half, half - 1).round() * step


class _RoundRange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, limit):
        mantissa, exponent = torch.frexp(limit)
        return torch.ldexp((mantissa * 2**RANGE_BITS).round() / 2**RANGE_BITS, exponent)

    @staticmethod
    def backward(ctx, grad):
        return grad


def shared_range(limit: Tensor) -> Tensor:
    """`limit` (any shape) rounded to RANGE_BITS significant bits, for signals that are quantised twice over one range.

    The gradient goes straight through, and the parameter itself keeps all its bits, or small steps would be lost.
    """
    if plain_ops():  # a constant of the trace
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            mantissa, exponent = np.frexp(limit.detach().numpy())
        rounded = np.ldexp(np.rint(mantissa * 2**RANGE_BITS) / 2**RANGE_BITS, exponent)
        return torch.from_numpy(np.asarray(rounded))  # NumPy makes a number of an array without dimensions
    return _RoundRange.apply(limit)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits, limit):
        return round_to_level(x, bits, limit)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        ctx.save_for_backward(x, limit)
        return torch.clamp(x, -limit, limit)

    @staticmethod
    def backward(ctx, grad):
        x, limit = ctx.saved_tensors
        outside = x.abs() > limit
        to_x = grad.masked_fill(outside, 0) if ctx.needs_input_grad[0] else None
        to_limit = None
        if ctx.needs_input_grad[1]:
            to_limit = (grad * x.sign()).masked_fill(~outside, 0).sum_to_size(limit.shape)
        return to_x, to_limit


def plain_ops() -> bool:
    """Whether a trace is being recorded, which must see ordinary operators instead of custom gradients."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def quantise(x: Tensor, bits: int | None, limit: Tensor | float) -> Tensor:
    """Q(x, b, r): the nearest of the 2^b - 1 levels over +-`limit`; the identity for bits None (or 0).

    The gradient goes unchanged to `x`, also outside the range; `limit` gets none.
    """
    if not bits:
        return x
    if plain_ops():
        return round_to_level(x, bits, limit)
    return _StraightThrough.apply(x, bits, limit)


def pact(x: Tensor, limit: Tensor) -> Tensor:
    """P(x, a): `x` clipped to +-`limit` (broadcast to `x`).

    The gradient to `x` is 1 where |x| <= a and 0 outside; to a it is sign(x) where |x| > a, summed.
    """
    if plain_ops():
        return torch.minimum(torch.maximum(x, -limit), limit)
    return _Clip.apply(x, limit)


def clip_quantise(x: Tensor, bits: int | None, limit: Tensor) -> Tensor:
    """Q(P(x, a), b, a): clipping with a trainable range, then quantising over the same range."""
    return quantise(pact(x, limit), bits, limit)
