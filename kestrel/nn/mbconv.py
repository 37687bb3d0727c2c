"""Inverted bottlenecks (MBConv, Sandler et al. 2018) of convolutions that are fast on small maps, with few bits.

Convolutions have no bias; behind each stand batch normalisation and, but for the last one of a block, ReLU6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from kestrel.nn.channel_major import BatchNorm2d, Pair
from kestrel.nn.depthwise import conv2d
from kestrel.nn.low_bit import QuantActivation, QuantConv2d, Ranges


@dataclass(frozen=True)
class Making:
    """How layers are made: batch normalisation, bits of activations (if a stage quantises them), initial weights."""

    momentum: float = 0.1
    eps: float = 1e-3
    act_bits: int = 8
    ranges: Ranges = "ema"
    init: Literal["he_fout", "he_fin"] = "he_fout"
    init_div_groups: bool = False


class SmallMapConv2d(QuantConv2d):
    """A quantised convolution that takes the fastest way for small maps (kestrel.nn.depthwise)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        stride, padding = cast(Pair, self.stride), cast(Pair, self.padding)
        return conv2d(x, self.effective_weight(), self.bias, stride, padding, self.groups)


class ConvUnit(nn.Module):
    """Convolution, batch normalisation, ReLU6 (or nothing), and the quantiser of its result."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Pair = (1, 1),
        stride: Pair = (1, 1),
        groups: int = 1,
        *,
        linear: bool = False,
        make: Making,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = SmallMapConv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = BatchNorm2d(outputs, make.eps, make.momentum)
        self.act = QuantActivation(make.act_bits, "none" if linear else "relu6", make.ranges)
        fan = kernel[0] * kernel[1] * (outputs if make.init == "he_fout" else inputs)
        nn.init.normal_(self.conv.weight, 0.0, math.sqrt(2 / (fan / groups if make.init_div_groups else fan)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        return self.act(self.norm(self.conv(x)))


class MBConv(nn.Module):
    """1x1 expansion (where it is above 1), depthwise convolution, 1x1 projection without a non-linearity."""

    def __init__(self, inputs: int, outputs: int, kernel: int, expansion: int, stride: int, make: Making) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = ConvUnit(inputs, middle, make=make) if expansion > 1 else nn.Identity()
        self.depthwise = ConvUnit(middle, middle, (kernel, kernel), (stride, stride), middle, make=make)
        self.project = ConvUnit(middle, outputs, linear=True, make=make)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        return self.project(self.depthwise(self.expand(x)))


class Residual(nn.Module):
    """Input plus branch, and the quantiser of the sum."""

    def __init__(self, branch: MBConv, make: Making) -> None:
        super().__init__()
        self.branch = branch
        self.act = QuantActivation(make.act_bits, "none", make.ranges)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.act(x + self.branch(x))
