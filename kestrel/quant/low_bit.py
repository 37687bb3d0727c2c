"""Weight grids of few bits: which integers a weight may become, the step of a grid, and a straight-through gradient.

A weight is code * step; codes are integers, so that what was trained is what a device holds:

    <b>bit      -(2^(b-1) - 1) .. 2^(b-1) - 1, b = 2..8
    <b>bitsym   odd numbers -(2^b - 1) .. 2^b - 1 (half-integer levels at twice their value), b = 2..8
    ternary     -1, 0, 1
    binary      -1, 1
    fp130       +-2^e, e = 0..7: a product is one shift
    dorefa<b>   odd numbers over the fixed range [-1, 1], step 1 / (2^b - 1), b = 1..8 (DoReFa's quantize_k, Zhou et al. 2016)

The step of the others follows from the weights: by their largest magnitude (`max`), their mean magnitude (`mean`, with the
constants of BitNetMCU) or the clipping point of least squared error (`octav`: Sakr et al., ICML 2022), one for the tensor or
one for each output.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kestrel.errors import UsageError, unknown
from kestrel.quant.packing import WeightCodes, code_type

Scale = Literal["max", "mean", "octav"]
SCALES: tuple[Scale, ...] = ("max", "mean", "octav")
MEAN_SHARE = 0.25  # `mean`: where the mean magnitude lies in the range of a grid of several levels
OCTAV_ROUNDS = 10
_LARGEST_EXPONENT = 7  # of fp130
_TINY = 1e-12  # of a step: weights that are all zero keep finite codes

NAMES = (
    *(f"{bits}bit" for bits in range(2, 9)),
    *(f"{bits}bitsym" for bits in range(2, 9)),
    *("ternary", "binary", "fp130"),
    *(f"dorefa{bits}" for bits in range(1, 9)),
)


@dataclass(frozen=True)
class Grid:
    """The codes of a weight quantiser. `kind` int, odd, ternary, binary or power; `bits` of a stored code."""

    name: str
    kind: Literal["int", "odd", "ternary", "binary", "power"]
    bits: int
    fixed: bool = False  # range [-1, 1] whatever the weights are

    @classmethod
    def named(cls, name: str) -> Grid:
        """The grid of one of NAMES. Raises UsageError with the nearest name."""
        if name not in NAMES:
            raise unknown("weight quantiser", name, NAMES)
        if name == "ternary":
            return cls(name, "ternary", 2)
        if name in ("binary", "dorefa1"):
            return cls(name, "binary", 1, fixed=name != "binary")
        if name == "fp130":
            return cls(name, "power", 4)
        bits = int(re.sub(r"\D", "", name))
        odd = name.endswith("sym") or name.startswith("dorefa")
        return cls(name, "odd" if odd else "int", bits, fixed=name.startswith("dorefa"))

    @property
    def largest(self) -> int:
        """The largest code."""
        if self.kind == "odd":
            return (1 << self.bits) - 1
        if self.kind == "power":
            return 1 << _LARGEST_EXPONENT
        return 1 if self.kind in ("ternary", "binary") else (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> list[int]:
        """All codes, in order."""
        top = self.largest
        if self.kind == "power":
            powers = [1 << e for e in range(_LARGEST_EXPONENT + 1)]
            return [-p for p in reversed(powers)] + powers
        return list(range(-top, top + 1, 2 if self.kind in ("odd", "binary") else 1))

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a level; where it is not, pruned weights need another storage."""
        return self.kind in ("int", "ternary")

    def storage(self, pruned: bool) -> str:
        """How codes are stored (a key of kestrel.lower.tensor.STORAGE_BITS); `pruned`: zeros among codes without a level 0."""
        if self.kind in ("ternary", "binary"):
            return "ternary" if pruned or self.kind == "ternary" else "binary"
        if self.kind == "power":
            return "int16" if pruned else "power4"
        if self.kind == "odd" and pruned:
            return f"int{self.bits + 1}" if self.bits < 8 else "int16"
        return f"{self.kind}{self.bits}"

    # ------------------------------------------------------------------------------------------------------ arithmetic

    def codes(self, weight: Tensor, step: Tensor) -> Tensor:
        """Codes of `weight`, whole numbers of its type, half to even; `step` broadcasts to it. No gradient."""
        x = weight.detach() / step
        if self.kind == "binary":
            negative = x <= 0 if self.fixed else x < 0  # DoReFa rounds 1/2 to the even 0
            return torch.where(negative, -torch.ones_like(x), torch.ones_like(x))
        if self.kind == "power":
            exponent = x.abs().clamp(min=0.5).log2().round().clamp(0, _LARGEST_EXPONENT)
            return torch.where(x < 0, -exponent.exp2(), exponent.exp2())
        if self.kind == "odd":
            half = 1 << (self.bits - 1)
            return 2 * (x / 2 - 0.5).round().clamp(-half, half - 1) + 1
        return x.round().clamp(-self.largest, self.largest)

    def step(
        self, weight: Tensor, scale: Scale = "max", per_output: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """The step for `weight` [out, ...]: [1], or [out] where `per_output`; weights that `mask` drops do not count."""
        rows = weight.detach().flatten(1) if per_output else weight.detach().reshape(1, -1)  # [1 or out, n]
        if self.fixed:
            return torch.full_like(rows[:, 0], 1.0 / self.largest)
        magnitude = rows.abs()
        kept = torch.ones_like(magnitude)
        if mask is not None:
            kept = mask.expand_as(weight).reshape(rows.shape).to(magnitude.dtype)
            magnitude = magnitude * kept
        if scale == "max":
            return (magnitude.amax(1) / self.largest).clamp(min=_TINY)
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
        mean = magnitude.sum(1) / kept.sum(1).clamp(min=1)
        if self.largest == 1:
            # binary: the mean is the least squared error; ternary: levels at the mean, or at OCTAV's clipping point
            clip = mean if scale == "mean" or self.kind == "binary" else _octav(magnitude, kept, math.log2(3))
            return clip.clamp(min=_TINY)
        clip = mean / MEAN_SHARE if scale == "mean" else _octav(magnitude, kept, self.bits)
        whole = 1 << (self.bits if self.kind == "odd" else self.bits - 1)  # the range in steps
        return (clip / (self.largest if self.kind == "power" or scale == "octav" else whole)).clamp(min=_TINY)

    def weight_codes(self, weight: Tensor, step: Tensor, mask: Tensor | None = None) -> WeightCodes:
        """What a device stores of `weight` with its `step`."""
        codes = self.codes(weight, shaped(step, weight))
        pruned, kept = False, None
        if mask is not None:
            codes = codes * mask
            pruned = not self.has_zero and bool((codes == 0).any())
            kept = "binary" if self.kind == "ternary" else self.storage(False)
        array = codes.cpu().numpy()
        storage = self.storage(pruned)
        kind = code_type(8 if abs(array).max(initial=0) <= 127 else 16)
        return WeightCodes(array.astype(kind), step.detach().float().cpu().numpy(), self.bits, storage, kept)


def shaped(step: Tensor, weight: Tensor) -> Tensor:
    """`step` [1] or [out] for products with `weight` [out, ...]."""
    return step.view(-1, *(1 for _ in weight.shape[1:]))


def _octav(magnitude: Tensor, kept: Tensor, bits: float) -> Tensor:
    """The clipping point of least squared error of a uniform quantiser of `bits`, [rows], by Newton's iteration."""
    clip = magnitude.sum(1) / kept.sum(1).clamp(min=1)
    inner = 4.0**-bits / 3
    for _ in range(OCTAV_ROUNDS):
        outside = (magnitude > clip[:, None]).to(magnitude.dtype)
        count = outside.sum(1)
        clip = (magnitude * outside).sum(1) / (inner * (kept.sum(1) - count) + count).clamp(min=_TINY)
    return torch.where(clip > 0, clip, magnitude.amax(1))


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, value):
        return value

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def straight_through(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient that belongs to `weight` (both of one shape)."""
    return _Replaced.apply(weight, value)


def fake_quantise(grid: Grid, weight: Tensor, step: Tensor) -> Tensor:
    """Effective weights code * step with an identity gradient, also outside the range."""
    column = shaped(step, weight)
    return straight_through(weight, grid.codes(weight, column) * column)


def check_grid(name: str, where: str) -> Grid:
    """The grid of a setting. Raises UsageError that names the setting."""
    try:
        return Grid.named(name)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
