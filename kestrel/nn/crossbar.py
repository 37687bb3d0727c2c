"""Matrix product of an analog in-memory-computing crossbar: clamped, optionally quantised, noisy weights.

N crossbars (blocks) are computed as one batched product. What the array adds to the weights in the forward pass is
invisible to the gradient, which sees the clamped weights alone (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.nn.chip import IDEAL, Converter, Part
from kestrel.quant.quantiser import check_bits, plain_ops, round_to_level

# Weight noise of one product: (added to the weights [N, I, O], added to the biases [N, O]).
Noise = tuple[Tensor, Tensor]
# Noise of each slice of a bit-serial product.
Noises = Sequence[Noise | None]
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
    """y is what the array computes from x; here it only gets its gradient. `seen` is x as the array sees it."""

    @staticmethod
    def forward(ctx, x, weight, bias, device, compute):
        y, seen = compute(x, weight, bias)
        ctx.save_for_backward(seen, device.clamped(weight, bias)[0])
        return y

    @staticmethod
    def backward(ctx, grad):
        seen, clamped = ctx.saved_tensors
        to_x = torch.bmm(grad, clamped.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        to_weight = torch.bmm(seen.transpose(1, 2), grad) if ctx.needs_input_grad[1] else None
        to_bias = grad.sum(1) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None, None


def crossbar(
    x: Tensor, weight: Tensor, bias: Tensor, device: Device, noise: Noise | None = None, program: Noise | None = None
) -> Tensor:
    """M(x, W, b): x [N, B, I], W [N, I, O], b [N, O] -> [N, B, O].

    Forward: weights and biases clamped, quantised, off by the chip's `program` and with `noise` added. Backward:
    dx = g W_c^T with the clamped, noise-free, unquantised weights; dW = x^T g and db = sum g, not masked by the clamp.
    """

    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = device.stored(weight, bias)
        for off in (program, noise):
            if off is not None:
                weight, bias = weight + off[0], bias + off[1]
        return torch.matmul(x, weight) + bias.unsqueeze(1), x

    if plain_ops():
        return compute(x, weight, bias)[0]
    return _Product.apply(x, weight, bias, device, compute)


def slice_codes(x: Tensor, bits: int, slices: int, limit: Tensor) -> tuple[list[Tensor], Tensor]:
    """`x` in `slices` conversions of `bits`, most significant first, and the value that they add up to.

    The input register holds x as code k of bits + slices - 1 bits over +-limit. Each slice takes y = round(k / 2^s),
    at most 2^(bits-1) - 1 in magnitude, and leaves k - y 2^s to the next, with s from slices - 1 to 0; nothing is left
    over. Slice i stands for y limit / 2^(bits-1+i).
    """
    full = 2 ** (bits + slices - 2)
    top = 2 ** (bits - 1) - 1
    step = limit * (1 / full)
    rest = (x / step).clamp(1 - full, full - 1).round()
    seen, codes = rest * step, []
    for shift in reversed(range(slices)):
        code = (rest * 2.0**-shift).round().clamp(-top, top)
        rest = rest - code * 2.0**shift
        codes.append(code)
    return codes, seen


@dataclass(frozen=True)
class Serial:
    """How inputs reach a crossbar bit by bit: in `slices` conversions of `bits`, each followed by an ADC of `mvm` bits."""

    bits: int
    slices: int
    mvm: int | None

    @property
    def weight(self) -> float:
        """Sum of the slices' weights 1, 1/2, 1/4, ..."""
        return 2 - 2.0 ** (1 - self.slices)

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor, limit: Tensor, converter: Converter | None, noises: Noises
    ) -> tuple[Tensor, Tensor]:
        """(p, x as the crossbar sees it) from weights and biases as the chip holds them; `noises` one per slice."""
        codes, seen = slice_codes(x, self.bits, self.slices, limit)
        total = torch.zeros_like(bias).unsqueeze(1)
        for place, (code, noise) in enumerate(zip(codes, noises, strict=True)):
            now, rows = (weight, bias) if noise is None else (weight + noise[0], bias + noise[1])
            # Each slice drives the bias rows by the same share of one, so that the sum holds the bias once.
            y = torch.matmul(code * 2.0 ** (1 - self.bits), now) + rows.unsqueeze(1) / (limit * self.weight)
            if converter is not None and self.mvm is not None:
                y = converter(y, torch.ones_like(limit.flatten()), self.mvm)
            total = total + round_to_level(y, self.mvm, 1.0) * 2.0**-place
        return total * limit, seen


def serial_crossbar(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    limit: Tensor,
    device: Device,
    serial: Serial,
    noises: Noises,
    part: Part = IDEAL,
) -> Tensor:
    """Bit-serial product: a sum_i Q(M(y_i, W, b'), MVM, 1) / 2^i with y_i the slices of x / a; x is clipped to +-a.

    Shapes as in `crossbar`; a = `limit` [N, 1, 1]. The gradient goes straight through slices and converters: dx = g W_c^T,
    and dW = sum_i (a y_i / 2^i)^T g, the gradients of all slices together.
    """

    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = device.stored(weight, bias)
        if part.program is not None:
            weight, bias = weight + part.program[0], bias + part.program[1]
        return serial.product(x, weight, bias, limit.detach(), part.converter, noises)

    if plain_ops():
        return compute(x, weight, bias)[0]
    return _Product.apply(x, weight, bias, device, compute)


def draw_noise(weight: Tensor, bias: Tensor, deviation: float) -> Noise:
    """Gaussian noise of standard deviation `deviation` for every weight and bias entry (torch's default generator)."""
    return torch.randn_like(weight).mul_(deviation), torch.randn_like(bias).mul_(deviation)


def uniform(shape: tuple[int, ...], limit: float) -> nn.Parameter:
    """A parameter drawn uniformly from +-limit."""
    return nn.Parameter(torch.empty(shape).uniform_(-limit, limit))
