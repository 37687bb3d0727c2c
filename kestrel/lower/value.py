"""Real values as integer codes of a tensor, while a network is being lowered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kestrel.lower.graph import Program
from kestrel.lower.ops import Requantise
from kestrel.quant.integer import Rescale

ACTIVATION_BITS, WIDE_BITS = 8, 16
_FRACTION = 20  # bits below a code that rounding down resolves where steps are no powers of two


@dataclass(frozen=True)
class Value:
    """Tensor `name` of a program: real value = code * step, step > 0."""

    name: str
    step: float


@dataclass(frozen=True)
class Grid:
    """Codes `low` .. `high` of a step; what lies between two of them is rounded half to even, or `down`."""

    step: float
    low: int
    high: int
    down: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return self.low, self.high

    def rescale(self, steps: float | Sequence[float], offsets: Sequence[float] = (0.0,)) -> Rescale:
        """From codes of `steps` (one, or one per index of the last axis) plus real values `offsets`."""
        ratios = [step / self.step for step in (steps if isinstance(steps, Sequence) else [steps])]
        moved = [offset / self.step for offset in offsets]
        if self.down:
            # floor(y) = round(y - 1/2 + e) for y in steps of 2^-k, 0 < e < 2^-k
            finest = math.frexp(min(abs(ratio) for ratio in ratios))
            bits = 1 - finest[1] if finest[0] == 0.5 else _FRACTION
            if bits <= 0:
                return Rescale.of(ratios, self.limits, moved)
            moved = [offset - 0.5 + 2.0 ** -(bits + 1) for offset in moved]
        return Rescale.of(ratios, self.limits, moved)


def step_of(largest: float, bits: int) -> float:
    """The step of symmetric codes of `bits` that reach `largest` (1 where there is nothing to reach)."""
    return (largest or 1.0) / ((1 << (bits - 1)) - 1)


def requantised(program: Program, value: Value, step: float, limits: tuple[int, int], name: str) -> Value:
    """`value` in codes of another step; itself where it has that step and lies within the limits."""
    return on_grid(program, value, Grid(step, *limits), name)


def on_grid(program: Program, value: Value, grid: Grid, name: str) -> Value:
    """`value` in codes of `grid`; itself where it has its step and lies within its limits."""
    tensor = program.tensors[value.name]
    if value.step == grid.step and grid.low <= tensor.low and tensor.high <= grid.high:
        return value
    op = Requantise(inputs=(value.name,), outputs=(name,), rescale=grid.rescale(value.step), scale=grid.step)
    return Value(program.add(op), grid.step)
