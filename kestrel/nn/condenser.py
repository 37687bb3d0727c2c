"""Attention condensers (Wong et al., TinySpeech, arXiv 2008.04245) of layers that train with few bits.

Of activations V a condenser makes a condensation Q = C(V) (max pooling), an embedding K = E(Q), attention values A = X(K)
(expansion) and V' = V (1 + S A): selective attention with a learned strength S, and the skip.

The projection to A has 1 x 1 kernels, so it commutes with un-pooling and is computed on the condensed map; un-pooling is
left to the product. With the hard gate, 1 + S A is a gain, an offset and two limits of that projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kestrel.nn.channel_major import (
    BatchNorm2d,
    MaxPool2d,
    Pair,
    fast_layouts,
    is_batch_last,
    joined_channels,
)
from kestrel.nn.low_bit import QuantActivation, QuantConv2d, Ranges

GateName = Literal["hard", "sigmoid"]


class HardGate(nn.Module):
    """clip(x / 4 + 1 / 2, 0, 1): a sigmoid of one shift, one addition and a clamp."""

    slope, offset = 0.25, 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return (x * self.slope + self.offset).clamp(0, 1)


class Strength(nn.Module):
    """1 + S x: attention values x of strength S, and the skip. S starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return 1 + self.scale * x


class Attend(nn.Module):
    """V times factors of a map that is smaller by `factor` (height, width): un-pooling and selective attention."""

    def __init__(self, factor: Pair) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, v: Tensor, factors: Tensor) -> Tensor:
        """[B, C, H, W] and [B, C, H / fh, W / fw] -> [B, C, H, W]."""
        height, width = factors.shape[2], factors.shape[3]
        cut = v.unflatten(3, (width, self.factor[1])).unflatten(2, (height, self.factor[0]))
        return (cut * factors[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class Making:
    """How layers are made: `norm` batch normalisation or else biases; activations and gates."""

    norm: bool = True
    act_bits: int = 8
    ranges: Ranges = "ema"
    power_of_two: bool = False
    gate: GateName = "hard"

    def act(self, activation: Literal["none", "relu"] = "relu", signed: bool | None = None) -> QuantActivation:
        """A quantiser of activations."""
        return QuantActivation(self.act_bits, activation, self.ranges, self.power_of_two, signed=signed)


class Unit(nn.Module):
    """Convolution, batch normalisation or bias, and what follows: `act` None = nothing."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Pair,
        make: Making,
        stride: Pair = (1, 1),
        groups: int = 1,
        act: QuantActivation | None = None,
        padding: Pair | None = None,
        before: int = 0,
    ) -> None:
        super().__init__()
        around = (kernel[0] // 2, kernel[1] // 2) if padding is None else padding
        self.conv = QuantConv2d(
            inputs, outputs, kernel, stride, around, groups=groups, bias=not make.norm, before=before
        )
        self.norm = BatchNorm2d(outputs) if make.norm else nn.Identity()
        self.act = nn.Identity() if act is None else act
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        return self.act(self.norm(self.conv(x)))


class Shift(nn.Module):
    """The image as it is `frames` later (before, if negative), zero beyond its first and last frame."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, F] -> the same shape and layout."""
        by = max(-x.shape[2], min(self.frames, x.shape[2]))
        if by == 0:
            return x
        order, back = ((1, 2, 3, 0), (3, 0, 1, 2)) if fast_layouts(x) and is_batch_last(x) else ((0, 1, 2, 3),) * 2
        time = order.index(2)
        lines = x.permute(order)  # as they lie in memory
        kept = lines.narrow(time, max(by, 0), x.shape[2] - abs(by))
        shape = list(lines.shape)
        shape[time] = abs(by)
        zeros = lines.new_zeros(shape)
        return torch.cat([kept, zeros] if by > 0 else [zeros, kept], time).permute(back)


class Multiplied(nn.Module):
    """A depthwise 1 x 1 convolution with `times` outputs for each channel: copies, each with a gain and offset, and a ReLU.

    The copies are taken from the frames `looks`, in turn: 0 the present one, -1 the one before.
    """

    def __init__(self, channels: int, times: int, make: Making, looks: Sequence[int] = (0,)) -> None:
        super().__init__()
        self.looks = nn.ModuleList(Shift(looks[copy % len(looks)]) for copy in range(times))
        made = channels * times
        self.unit = Unit(made, made, (1, 1), make, groups=made, act=make.act())
        with torch.no_grad():  # a copy that rises and one that falls, as a ReLU of one input needs
            sign = torch.ones(times, channels, 1, 1, 1)
            sign[1::2] = -1
            self.unit.conv.weight.copy_(sign.view(made, 1, 1, 1))
            if self.unit.conv.bias is not None:
                self.unit.conv.bias.copy_((sign.view(made) < 0).float())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, times C, H, W]."""
        return self.unit(joined_channels([look(x) for look in self.looks]))


class Condenser(nn.Module):
    """An attention condenser of `channels`, whose condensation is smaller by `pool`.

    With `mid1`: embedding channels -> mid0 (depthwise) -> out0, expansion out0 -> mid1 (depthwise) -> channels, all kernels
    1 x 1, as the published parameter counts imply; depthwise layers see the condensed frames `looks`. Without: embedding
    channels -> mid0 -> out0, expansion out0 -> channels, without depthwise layers, as in QP-TinySpeech.
    """

    def __init__(
        self,
        channels: int,
        mid0: int,
        out0: int,
        mid1: int | None,
        pool: Pair,
        make: Making,
        looks: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        one = (1, 1)
        self.condense = MaxPool2d(pool)
        if mid1 is None:
            self.embed = nn.Sequential(
                Unit(channels, mid0, one, make, act=make.act()), Unit(mid0, out0, one, make, act=make.act())
            )
            self.expand = nn.Sequential(Unit(out0, channels, one, make))
        else:
            self.embed = nn.Sequential(
                Multiplied(channels, mid0 // channels, make, looks), Unit(mid0, out0, one, make, act=make.act())
            )
            self.expand = nn.Sequential(Multiplied(out0, mid1 // out0, make, looks), Unit(mid1, channels, one, make))
        table = nn.Sequential(make.act("none"), nn.Sigmoid())
        self.gate = HardGate() if make.gate == "hard" else table
        self.strength = Strength()
        self.factor_act = make.act("none", signed=False)
        self.attend = Attend(pool)
        self.act = make.act("none", signed=False)  # V and its factors are not negative

    def forward(self, v: Tensor) -> Tensor:
        """[B, C, H, W], not negative -> the same shape."""
        k = self.embed(self.condense(v))  # [B, out0, H / ph, W / pw]
        factors = self.factor_act(self.strength(self.gate(self.expand(k))))  # 1 + S A
        return self.act(self.attend(v, factors))
