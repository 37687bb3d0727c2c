"""Layers of convolutional and dense networks in integers: 8-bit activations, weights with a scale per output.

Batch normalisation is folded into the rescaling of the product before it (multiplier and offset per channel), never
into the weights, so weights keep the codes that they were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kestrel.errors import KestrelError
from kestrel.lower.graph import Program
from kestrel.lower.ops import (
    AddRequantise,
    Conv2d,
    DepthwiseConv2d,
    Lookup,
    MatMul,
    Multiply,
    Requantise,
    SumPool,
    Window,
)
from kestrel.lower.tensor import Constant
from kestrel.lower.value import ACTIVATION_BITS, Value, step_of
from kestrel.quant.integer import Rescale, from_reals, symmetric, table_of
from kestrel.quant.packing import WeightCodes


@dataclass(frozen=True)
class Target:
    """What a layer's result becomes: codes of `step` within low .. high (ReLU: low = 0)."""

    step: float
    low: int
    high: int

    @classmethod
    def of(cls, largest: float, bits: int = ACTIVATION_BITS, activation: nn.Module | None = None) -> Target:
        """Codes of `bits` that reach the calibrated magnitude `largest` behind `activation` (ReLU, ReLU6, Hardtanh)."""
        step = step_of(largest, bits)
        low, high = symmetric(bits)
        if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
            return cls(step, max(low, round(activation.min_val / step)), min(high, round(activation.max_val / step)))
        return cls(step, 0 if isinstance(activation, nn.ReLU) else low, high)

    @property
    def limits(self) -> tuple[int, int]:
        return self.low, self.high


@dataclass(frozen=True)
class Affine:
    """y = gain x + shift per channel, float64 [C] each."""

    gain: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, norm: nn.BatchNorm2d | nn.BatchNorm1d | None, channels: int) -> Affine:
        """Batch normalisation with its running statistics; the identity for None."""
        if norm is None:
            return cls(np.ones(channels), np.zeros(channels))
        if norm.running_mean is None or norm.running_var is None:
            raise KestrelError(
                "batch normalisation without running statistics has no integer form: set track_running_stats"
            )
        mean, variance = norm.running_mean.double().cpu().numpy(), norm.running_var.double().cpu().numpy()
        gain = 1 / np.sqrt(variance + norm.eps)
        if norm.affine:
            gain = gain * norm.weight.detach().double().cpu().numpy()
            return cls(gain, norm.bias.detach().double().cpu().numpy() - mean * gain)
        return cls(gain, -mean * gain)

    def with_constants(self, sums: Mapping[int, int], steps: np.ndarray, bias: torch.Tensor | None) -> Affine:
        """The same for channels whose sums of products are known, in `steps` ([1] or [C]): nothing but a shift.

        Batch normalisation divides such a channel by a deviation of nearly 0. A rescaling that had to hold its gain would
        leave few bits for the gains of the others.
        """
        gain, shift = self.gain.copy(), self.shift.copy()
        steps = np.broadcast_to(steps, gain.shape)
        for channel, total in sums.items():
            offset = 0.0 if bias is None else float(bias[channel].detach())
            shift[channel] += gain[channel] * (total * steps[channel] + offset)
            gain[channel] = 0
        return Affine(gain, shift)


def _linear_rescale(x: Value, codes: WeightCodes, bias: torch.Tensor | None, norm: Affine, target: Target) -> Rescale:
    """Accumulators of step x.step * weight scale -> norm(acc + bias) in codes of `target`."""
    gains = codes.scale.astype(np.float64) * x.step * norm.gain / target.step
    plain = np.zeros_like(norm.shift) if bias is None else bias.detach().double().cpu().numpy()
    offsets = (plain * norm.gain + norm.shift) / target.step
    gains = np.broadcast_to(gains, offsets.shape)
    return Rescale.of(gains.tolist(), target.limits, offsets.tolist() if offsets.any() else [0.0])


def linear(
    program: Program, x: Value, layer: nn.Linear, codes: WeightCodes, norm: Affine, target: Target, name: str
) -> Value:
    """x [..., in] -> [..., out]."""
    op = MatMul(
        inputs=(x.name,),
        outputs=(name,),
        weight=Constant(codes.codes, storage(codes)),
        rescale=_linear_rescale(x, codes, layer.bias, norm, target),
        scale=target.step,
    )
    return Value(program.add(op), target.step)


def conv2d(
    program: Program, x: Value, layer: nn.Conv2d, codes: WeightCodes, norm: Affine, target: Target, name: str
) -> Value:
    """Image [H, W, in] -> [h, w, out]; groups 1, or one per channel (depthwise)."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.dilation != (1, 1):
        raise KestrelError(
            f"convolution {name!r}: only zero padding given as numbers, and dilation 1, have an integer form"
        )
    padding = (layer.padding[0], layer.padding[1])
    stride, size = (layer.stride[0], layer.stride[1]), (layer.kernel_size[0], layer.kernel_size[1])
    window = Window(size, stride, (padding[0] + getattr(layer, "before", 0), padding[1]), padding)
    rescale = _linear_rescale(x, codes, layer.bias, norm, target)
    if layer.groups == 1:
        weight = Constant(codes.codes.transpose(0, 2, 3, 1), storage(codes))  # [out, kh, kw, in]
        dense = Conv2d(
            inputs=(x.name,), outputs=(name,), weight=weight, window=window, rescale=rescale, scale=target.step
        )
        return Value(program.add(dense), target.step)
    if layer.groups != layer.in_channels or layer.out_channels != layer.in_channels:
        raise KestrelError(
            f"convolution {name!r}: groups {layer.groups} has no integer form, only 1 or one per channel"
        )
    weight = Constant(codes.codes[:, 0].transpose(1, 2, 0), storage(codes))  # [kh, kw, channels]
    depthwise = DepthwiseConv2d(
        inputs=(x.name,), outputs=(name,), weight=weight, window=window, rescale=rescale, scale=target.step
    )
    return Value(program.add(depthwise), target.step)


def normalised(program: Program, x: Value, norm: Affine, target: Target, name: str) -> Value:
    """Batch normalisation by itself, over the last axis."""
    gains, offsets = norm.gain * x.step / target.step, norm.shift / target.step
    rescale = Rescale.of(gains.tolist(), target.limits, offsets.tolist())
    op = Requantise(inputs=(x.name,), outputs=(name,), rescale=rescale, scale=target.step)
    return Value(program.add(op), target.step)


def added(program: Program, values: list[Value], target: Target, name: str) -> Value:
    """Sum of values, one rounding."""
    multipliers, shift = from_reals([value.step / target.step for value in values])
    op = AddRequantise(
        inputs=tuple(value.name for value in values),
        outputs=(name,),
        multipliers=tuple(multipliers),
        shift=shift,
        low=target.low,
        high=target.high,
        scale=target.step,
    )
    return Value(program.add(op), target.step)


def multiplied(program: Program, a: Value, b: Value, target: Target, name: str) -> Value:
    """a times b; the one that is repeated along an axis may come first or second."""
    if program.tensors[a.name].size < program.tensors[b.name].size:
        a, b = b, a
    rescale = Rescale.of(a.step * b.step / target.step, target.limits)
    op = Multiply(inputs=(a.name, b.name), outputs=(name,), rescale=rescale, scale=target.step)
    return Value(program.add(op), target.step)


def averaged(program: Program, x: Value, window: Window, target: Target, name: str) -> Value:
    """Mean of each window of an image."""
    rescale = Rescale.of(x.step / (target.step * window.size[0] * window.size[1]), target.limits)
    op = SumPool(inputs=(x.name,), outputs=(name,), window=window, rescale=rescale, scale=target.step)
    return Value(program.add(op), target.step)


def tabulated(program: Program, x: Value, function: nn.Module, target: Target, name: str) -> Value:
    """An element-wise function of few-bit codes, computed by PyTorch for every code."""
    tensor = program.tensors[x.name]

    def codes(inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            real = function(torch.from_numpy(inputs * x.step)).double().numpy()
        return np.clip(np.rint(real / target.step), *target.limits).astype(np.int64)

    table = Constant.of(table_of(codes, tensor.low, tensor.high))
    op = Lookup(inputs=(x.name,), outputs=(name,), table=table, first=tensor.low, scale=target.step)
    return Value(program.add(op), target.step)


def storage(codes: WeightCodes) -> str:
    """How weight codes are stored (a key of STORAGE_BITS)."""
    return codes.stored_as
