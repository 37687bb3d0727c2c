"""Fixed point Q(qi.qf) with a straight-through gradient, and the non-linearities of delta networks.

Q(qi.qf) has qi + qf bits, the sign among the qi: values are k 2^-qf with -2^(qi+qf-1) <= k < 2^(qi+qf-1), so Q3.5 holds
-4 to 3.96875 in 8 bits. A value is rounded (half to even) or floored to a level and then saturates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kestrel.errors import UsageError
from kestrel.quant.quantiser import plain_ops

Rounding = Literal["round", "floor"]
MAX_BITS = 24  # codes of float32 are exact up to here


@dataclass(frozen=True)
class Fixed:
    """The number format Q(qi.qf). Raises UsageError for formats without a bit or beyond 24 bits."""

    qi: int
    qf: int
    rounding: Rounding = "round"

    def __post_init__(self) -> None:
        if self.qi < 1 or self.qf < 0 or not 2 <= self.bits <= MAX_BITS:
            raise UsageError(f"format Q{self.qi}.{self.qf}: choose qi >= 1, qf >= 0 and 2..{MAX_BITS} bits together")

    @property
    def bits(self) -> int:
        """All bits of a code, the sign included."""
        return self.qi + self.qf

    @property
    def step(self) -> float:
        """Distance of two levels."""
        return 2.0**-self.qf

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        half = 1 << (self.bits - 1)
        return -half, half - 1

    @property
    def low(self) -> float:
        """Smallest value."""
        return self.limits[0] * self.step

    @property
    def high(self) -> float:
        """Largest value."""
        return self.limits[1] * self.step

    def scalar(self, value: float) -> float:
        """The level of one number, as a threshold takes it."""
        return float(self.levels(torch.tensor(float(value), dtype=torch.float64)))

    def _rounded(self, x: Tensor) -> Tensor:
        codes = x * 2.0**self.qf  # exact
        return codes.round() if self.rounding == "round" else codes.floor()

    def levels(self, x: Tensor) -> Tensor:
        """The level of each element, without a gradient of its own."""
        return self._rounded(x).clamp(*self.limits) * self.step

    def inside(self, x: Tensor) -> Tensor:
        """Where `x` does not saturate (bool, the shape of x)."""
        codes = self._rounded(x)
        low, high = self.limits
        return (codes >= low) & (codes <= high)

    def __call__(self, x: Tensor) -> Tensor:
        """The level of each element; the gradient is 1 where nothing saturates and 0 elsewhere."""
        return self.levels(x) if plain_ops() else _Quantise.apply(x, self)


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, form):
        ctx.save_for_backward(form.inside(x))
        return form.levels(x)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def apply(form: Fixed | None, x: Tensor) -> Tensor:
    """`x` in the format, or unchanged where there is none."""
    return x if form is None else form(x)


def hard_sigmoid(x: Tensor) -> Tensor:
    """clip(0.25 x + 0.5, 0, 1)."""
    return (0.25 * x + 0.5).clamp(0.0, 1.0)


def hard_tanh(x: Tensor) -> Tensor:
    """clip(x, -1, 1)."""
    return x.clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Numerics:
    """How a delta cell computes: formats (None = floating point) and the kind of its non-linearities.

    `activation`: inputs, gate pre-activations, cell and hidden states, and thresholds. `gate`: results of sigmoid and
    tanh. `weight`: weights and biases of the recurrent layers.
    """

    activation: Fixed | None = None
    gate: Fixed | None = None
    weight: Fixed | None = None
    hard_sigmoid: bool = False
    hard_tanh: bool = False

    @property
    def plain(self) -> bool:
        """Whether this is what torch.nn.LSTM and GRU compute."""
        return self == Numerics()

    @property
    def soft_float(self) -> bool:
        """Whether states and gates are those of torch.nn.LSTM and GRU (weights may have a format)."""
        return not (self.activation or self.gate or self.hard_sigmoid or self.hard_tanh)

    def sigmoid(self, x: Tensor) -> Tensor:
        """The sigmoid in use, not quantised."""
        return hard_sigmoid(x) if self.hard_sigmoid else torch.sigmoid(x)

    def tanh(self, x: Tensor) -> Tensor:
        """The tanh in use, not quantised."""
        return hard_tanh(x) if self.hard_tanh else torch.tanh(x)

    def threshold(self, value: float) -> float:
        """The one threshold that decides both what is transmitted and what the reference becomes."""
        return self.activation.scalar(value) if self.activation is not None else float(value)
