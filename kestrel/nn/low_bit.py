"""Layers that train with few bits: weights on a grid, activations on a static scale, and masks of pruned weights.

Both are switched on and off by the network (kestrel.models.quant_net): full precision first, then quantised with
straight-through gradients. Off, they are the plain layers, while activations already note the ranges they will need.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kestrel.errors import UsageError
from kestrel.nn.channel_major import Pair, fast_layouts, is_batch_last, pointwise_conv2d
from kestrel.nn.depthwise import conv2d, depthwise_conv2d, unfolded_conv2d
from kestrel.quant.integer import symmetric
from kestrel.quant.low_bit import Grid, Scale, fake_quantise, shaped
from kestrel.quant.packing import WeightCodes
from kestrel.quant.quantiser import plain_ops, shared_range

Ranges = Literal["learned", "ema", "max"]
FEW_TAPS = 16  # inputs x kernel elements up to which a convolution is one product with shifted copies of the image
EMA = 0.02  # weight of a new batch in the running mean of largest magnitudes
SMALLEST = 2.0**-20  # of a step: activations that are all zero; offsets of a few units in such steps still fit 32 bits


class LowBit:
    """What quantised layers have in common; a mix-in for modules with a `weight` [out, ...].

    `grid` None = full precision for ever. `quantised` switches the grid on. `weight_step` (a buffer) is found anew in each
    forward pass of training and stays as it is in evaluation, so that evaluation and export see the same codes.
    """

    weight: Tensor
    weight_step: Tensor
    mask: Tensor | None
    training: bool

    def _begin(self) -> None:
        self.grid: Grid | None = None
        self.scale: Scale = "max"
        self.per_output = False
        self.quantised = False
        self.previewed: Tensor | None = None  # a mask for evaluation alone, while a pruning schedule runs
        self.register_buffer("weight_step", torch.ones(1))  # type: ignore[attr-defined]
        self.register_buffer("mask", None)  # type: ignore[attr-defined]

    def set_grid(self, grid: Grid | str | None, scale: Scale = "max", per_output: bool = False) -> None:
        """Choose the grid (a name of kestrel.quant.low_bit.NAMES; None = none) and how its step is found."""
        self.grid = Grid.named(grid) if isinstance(grid, str) else grid
        self.scale, self.per_output = scale, per_output
        if self.grid is not None:
            self.weight_step = self.grid.step(self.weight, scale, per_output, self.mask_in_force())

    def add_mask(self) -> None:
        """Give the layer a mask that keeps everything."""
        self.mask = torch.ones_like(self.weight, dtype=torch.bool)

    def set_mask(self, mask: Tensor) -> None:
        """Keep the weights where `mask` (broadcast to them) is true, zero the others."""
        assert self.mask is not None
        self.mask.copy_(mask.expand_as(self.mask))

    def mask_in_force(self) -> Tensor | None:
        """The mask that a forward pass uses, bool, the shape of the weights; None = nothing is pruned."""
        return self.mask if self.previewed is None else self.previewed.expand_as(self.weight)

    @torch.no_grad()
    def find_step(self) -> None:
        """Set `weight_step` from the weights as they are."""
        if self.grid is not None:
            self.weight_step.copy_(self.grid.step(self.weight, self.scale, self.per_output, self.mask_in_force()))

    def effective_weight(self) -> Tensor:
        """The weights that the layer computes with."""
        weight: Tensor = self.weight
        if self.quantised and self.grid is not None:
            if self.training:
                self.find_step()
            if plain_ops():  # a constant of the trace
                with torch.no_grad():
                    column = shaped(self.weight_step, weight)
                    weight = torch.from_numpy((self.grid.codes(weight, column) * column).numpy())
            else:
                weight = fake_quantise(self.grid, weight, self.weight_step)
        mask = self.mask_in_force()
        return weight if mask is None else weight * mask

    def weight_codes(self) -> WeightCodes | None:
        """The trained codes; None where the weights are not quantised."""
        if not self.quantised or self.grid is None:
            return None
        return self.grid.weight_codes(self.weight.detach(), self.weight_step, self.mask_in_force())


class QuantConv2d(LowBit, nn.Conv2d):
    """nn.Conv2d whose weights may be on a grid and masked: [B, in, H, W] -> [B, out, h, w].

    `before`: further zeros above the image and none below it, so that over time no output looks ahead.
    """

    def __init__(self, *args: Any, before: int = 0, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self.before = before
        self._begin()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]; on a CPU by what is fastest for small maps and few channels."""
        weight = self.effective_weight()
        if self.before:
            x = functional.pad(x, (0, 0, self.before, 0))
        if not fast_layouts(x) or isinstance(self.padding, str) or self.dilation != (1, 1):
            return self._conv_forward(x, weight, self.bias)
        stride, padding = cast(Pair, self.stride), cast(Pair, self.padding)
        depthwise = self.groups == self.in_channels == self.out_channels > 1
        if depthwise and self.kernel_size == stride == (1, 1) and padding == (0, 0):
            made = x * weight.view(1, -1, 1, 1)
        elif depthwise and x.shape[3] == 1:
            made = depthwise_conv2d(x, weight, stride, padding)
        elif self.groups == 1 and self.kernel_size == stride == (1, 1) and padding == (0, 0) and is_batch_last(x):
            made = pointwise_conv2d(x, weight)
        elif (self.groups == 1 and self.in_channels * weight[0, 0].numel() <= FEW_TAPS) or x.shape[3] == 1:
            made = unfolded_conv2d(x, weight, stride, padding)
        else:
            return conv2d(x, weight, self.bias, stride, padding, self.groups)
        return made if self.bias is None else made + self.bias.view(-1, 1, 1)


class QuantLinear(LowBit, nn.Linear):
    """nn.Linear whose weights may be on a grid and masked: [..., in] -> [..., out]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._begin()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, self.effective_weight(), self.bias)


class _RoundToStep(torch.autograd.Function):
    """clamp(round(x / step), low, high) * step; the gradient of the step is that of LSQ (Esser et al. 2020)."""

    @staticmethod
    def forward(ctx, x, step, low, high):
        scaled = x / step
        codes = scaled.clamp(low, high).round_()
        ctx.save_for_backward(scaled, codes)
        ctx.low, ctx.high, ctx.shape = low, high, step.shape
        return codes * step

    @staticmethod
    def backward(ctx, grad):
        scaled, codes = ctx.saved_tensors
        inside = (scaled >= ctx.low) & (scaled <= ctx.high)
        to_step = None
        if ctx.needs_input_grad[1]:
            to_step = (grad * torch.where(inside, codes - scaled, codes)).sum().reshape(ctx.shape)
        return grad * inside, to_step, None, None


class _RoundStatic(torch.autograd.Function):
    """clamp(round(x / step), low, high) * step for a step without a gradient; x gets one where `bounds` enclose it.

    Works in place on one copy, and keeps no more than x: behind a ReLU nothing has to be clipped before it.
    """

    @staticmethod
    def forward(ctx, x, step, low, high, bounds):
        ctx.save_for_backward(x)
        ctx.bounds = bounds
        return (x / step).clamp_(low, high).round_().mul_(step)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.bounds), None, None, None, None


class _Up(torch.autograd.Function):
    """Rounded up to a whole number, with an identity gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.ceil()

    @staticmethod
    def backward(ctx, grad):
        return grad


class QuantActivation(nn.Module):
    """ReLU, ReLU6 or nothing, then codes of a static step: y = clamp(round(x / step), low, high) * step, half to even.

    Signed codes are -(2^(b-1) - 1) .. 2^(b-1) - 1; behind a ReLU 0 .. 2^b - 1, at 8 bits 0 .. 127, since a device stores
    int8. One step for the tensor, never from the clip at hand:

        learned   its logarithm is a parameter with the gradient of LSQ, in the logarithmic domain as in TQT
        ema, max  the running mean, or the maximum, of the largest magnitudes of training batches / high

    `power_of_two` rounds the step up to a power of two. `fixed` sets the step for ever. Off, only the ReLU acts, and
    training notes ranges.
    """

    largest: Tensor
    log2_step: Tensor
    begun: Tensor

    def __init__(
        self,
        bits: int = 8,
        activation: Literal["none", "relu", "relu6"] = "none",
        ranges: Ranges = "ema",
        power_of_two: bool = False,
        fixed: float | None = None,
        signed: bool | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise UsageError(f"activations of {bits} bits; choose 2..8")
        self.bits, self.activation, self.power_of_two, self.fixed = bits, activation, power_of_two, fixed
        self.signed = activation == "none" if signed is None else signed
        self.quantised = False
        self.ranges: Ranges = ranges
        self.register_buffer("largest", torch.zeros(()))  # of the values behind the activation; 0 = none seen
        if ranges == "learned" and fixed is None:
            self.log2_step = nn.Parameter(torch.zeros(()))
            self.register_buffer(
                "begun", torch.zeros((), dtype=torch.bool)
            )  # log2_step comes from a range that was seen

    @property
    def low(self) -> int:
        """The smallest code."""
        return symmetric(self.bits)[0] if self.signed else 0

    @property
    def high(self) -> int:
        """The largest code, the bound of ReLU6 left aside."""
        return symmetric(self.bits)[1] if self.signed or self.bits == 8 else (1 << self.bits) - 1

    def step(self) -> Tensor:
        """The step, a scalar of few significant bits (gradients reach `log2_step`)."""
        if self.fixed is not None:
            return self.largest.new_tensor(self.fixed)
        if self.ranges == "learned" and bool(self.begun):
            exponent = self.log2_step
        else:
            exponent = (self.largest / self.high).clamp(min=SMALLEST).log2()
        if self.power_of_two:
            return (exponent.ceil() if plain_ops() else _Up.apply(exponent)).exp2()
        return shared_range(exponent.exp2())

    def limits(self, step: float) -> tuple[int, int]:
        """Codes that a result may have at `step`."""
        high = min(self.high, round(6 / step)) if self.activation == "relu6" else self.high
        return self.low, high

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if self.signed:
            low, high = torch.aminmax(x)
            found = torch.maximum(-low, high)
        else:
            found = x.amax().clamp(min=0, max=6 if self.activation == "relu6" else None)
        if self.ranges == "max" or not bool(self.largest):
            self.largest.copy_(torch.maximum(self.largest, found))
        else:
            self.largest.lerp_(found, EMA)

    @torch.no_grad()
    def begin(self) -> None:
        """Take the learned step from the range that was seen; later calls change nothing."""
        if self.ranges == "learned" and self.fixed is None and not bool(self.begun) and bool(self.largest):
            self.log2_step.copy_((self.largest / self.high).clamp(min=SMALLEST).log2())
            self.begun.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        static = self.quantised and not plain_ops() and (self.fixed is not None or self.ranges != "learned")
        if self.activation == "relu6" and not static:
            x = functional.relu6(x)
        elif self.activation == "relu" and not static:
            x = functional.relu(x)
        if self.training and self.fixed is None:
            learned = self.ranges == "learned" and bool(self.begun)
            if not (self.quantised and learned):
                self._observe(x)
            if self.quantised:
                self.begin()
        if not self.quantised:
            return x
        step = self.step()
        if plain_ops():  # the step is a constant of the trace
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                constant = float(step.detach())
            low, high = self.limits(constant)
            return (x / constant).clamp(low, high).round() * constant
        size = float(step.detach())
        low, high = self.limits(size)
        if static:
            top = min(high * size, 6.0) if self.activation == "relu6" else high * size
            return _RoundStatic.apply(x, step, low, high, (low * size, top))
        if step.requires_grad:  # the gradient of a step is a sum over all values: as large as one value's
            step = _ScaledGradient.apply(step, 1 / math.sqrt(x.numel() / max(len(x), 1) * max(high, 1)))
        return _RoundToStep.apply(x, step, low, high)

    def extra_repr(self) -> str:
        kind = "signed" if self.signed else "unsigned"
        return f"bits={self.bits}, {self.activation}, {kind}, {self.ranges if self.fixed is None else self.fixed}"


class _ScaledGradient(torch.autograd.Function):
    """x, with its gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None
