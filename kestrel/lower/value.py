"""Real values as integer codes of a tensor, while a network is being lowered."""

from __future__ import annotations

from dataclasses import dataclass

from kestrel.lower.graph import Program
from kestrel.lower.ops import Requantise
from kestrel.quant.integer import Rescale

ACTIVATION_BITS, WIDE_BITS = 8, 16


@dataclass(frozen=True)
class Value:
    """Tensor `name` of a program: real value = code * step, step > 0."""

    name: str
    step: float


def step_of(largest: float, bits: int) -> float:
    """The step of symmetric codes of `bits` that reach `largest` (1 where there is nothing to reach)."""
    return (largest or 1.0) / ((1 << (bits - 1)) - 1)


def requantised(program: Program, value: Value, step: float, limits: tuple[int, int], name: str) -> Value:
    """`value` in codes of another step; itself where it has that step and lies within the limits."""
    tensor = program.tensors[value.name]
    if value.step == step and limits[0] <= tensor.low and tensor.high <= limits[1]:
        return value
    rescale = Rescale.of(value.step / step, limits)
    return Value(program.add(Requantise(inputs=(value.name,), outputs=(name,), rescale=rescale, scale=step)), step)
