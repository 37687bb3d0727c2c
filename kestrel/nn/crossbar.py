"""Matrix product of an analog in-memory-computing crossbar: clamped, optionally quantised, noisy weights.

N crossbars (blocks) are computed as one batched product. What the array adds to the weights in the forward pass is
invisible to the gradient, which sees the clamped weights alone (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.quant.quantiser import check_bits, plain_ops, round_to_level

# Weight noise of one product: (added to the weights [N, I, O], added to the biases [N, O]).
Noise = tuple[Tensor, Tensor]
# Draws fresh noise for time step `step` of the product `name`.
NoiseSource = Callable[[str, int], Noise]


@dataclass(frozen=True)
class Device:
    """What a crossbar can store.

    `max_w`: largest weight magnitude. `rows_bias`: rows that carry the bias, so biases reach rows_bias max_w.
    `bits`: levels of a weight (None = analog). `weight_range`: range of the weight quantiser; `real` is what the
    device can store (max_w, and rows_bias max_w for biases), `paper` is 1, which wastes log2(1 / max_w) bits.
    """

    max_w: float = 0.2
    rows_bias: float = 6
    bits: int | None = None
    weight_range: Literal["real", "paper"] = "real"

    def __post_init__(self) -> None:
        if not self.max_w > 0:
            raise UsageError(f"model.max_w: {self.max_w} is out of bounds (> 0)")
        if not self.rows_bias > 0:
            raise UsageError(f"model.rows_bias: {self.rows_bias} is out of bounds (> 0)")
        if self.weight_range not in ("real", "paper"):
            raise UsageError(f"model.weight_range: {self.weight_range!r}; choose real or paper")
        object.__setattr__(self, "bits", check_bits("model.quant_w", self.bits))

    @property
    def max_bias(self) -> float:
        """Largest bias magnitude."""
        return self.rows_bias * self.max_w

    def clamped(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases inside what the device can store."""
        return weight.clamp(-self.max_w, self.max_w), bias.clamp(-self.max_bias, self.max_bias)

    def quantiser_ranges(self) -> tuple[float, float]:
        """Range of the quantiser of weights and of biases."""
        return (self.max_w, self.max_bias) if self.weight_range == "real" else (1.0, 1.0)

    def stored(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases as the device stores them: clamped, then quantised."""
        weight_range, bias_range = self.quantiser_ranges()
        weight, bias = self.clamped(weight, bias)
        return round_to_level(weight, self.bits, weight_range), round_to_level(bias, self.bits, bias_range)

    @torch.no_grad()
    def project(self, weight: Tensor, bias: Tensor) -> None:
        """Clamp parameters in place, so that they cannot drift away from what the device can store."""
        weight.clamp_(-self.max_w, self.max_w)
        bias.clamp_(-self.max_bias, self.max_bias)

    def init_limit(self, limit: float) -> float:
        """Bound of a uniform initialisation: wide enough for 1.5 steps of a weight quantiser over 1 (paper)."""
        return limit if self.bits is None else max(limit, 1.5 / 2 ** (self.bits - 1))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, device, noise):
        ctx.save_for_backward(x, device.clamped(weight, bias)[0])
        weight, bias = device.stored(weight, bias)
        if noise is not None:
            weight, bias = weight + noise[0], bias + noise[1]
        return torch.bmm(x, weight) + bias.unsqueeze(1)

    @staticmethod
    def backward(ctx, grad):
        x, clamped = ctx.saved_tensors
        to_x = torch.bmm(grad, clamped.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        to_weight = torch.bmm(x.transpose(1, 2), grad) if ctx.needs_input_grad[1] else None
        to_bias = grad.sum(1) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None, None


def crossbar(x: Tensor, weight: Tensor, bias: Tensor, device: Device, noise: Noise | None = None) -> Tensor:
    """M(x, W, b): x [N, B, I], W [N, I, O], b [N, O] -> [N, B, O].

    Forward: weights and biases clamped, quantised and with `noise` added. Backward: dx = g W_c^T with the clamped,
    noise-free, unquantised weights; dW = x^T g and db = sum g, not masked by the clamp.
    """
    if plain_ops():
        weight, bias = device.stored(weight, bias)
        if noise is not None:
            weight, bias = weight + noise[0], bias + noise[1]
        return torch.matmul(x, weight) + bias.unsqueeze(1)
    return _Product.apply(x, weight, bias, device, noise)


def draw_noise(weight: Tensor, bias: Tensor, deviation: float) -> Noise:
    """Gaussian noise of standard deviation `deviation` for every weight and bias entry (torch's default generator)."""
    return torch.randn_like(weight).mul_(deviation), torch.randn_like(bias).mul_(deviation)


def uniform(shape: tuple[int, ...], limit: float) -> nn.Parameter:
    """A parameter drawn uniformly from +-limit."""
    return nn.Parameter(torch.empty(shape).uniform_(-limit, limit))
