"""Sequences as images of one column: time-channel separable convolutions for streaming."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kestrel.nn.condenser import Making, Unit


class FramesAsColumns(nn.Module):
    """Features [B, T, F] -> images [B, F, T, 1]: bands become channels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, F, T, 1]."""
        return x.transpose(1, 2).unsqueeze(3)


class TimeChannel(nn.Module):
    """A depthwise convolution over `kernel` frames, then a pointwise one; with `skip` the input is added.

    `between`: what follows the depthwise convolution. `wide`: the pointwise convolution becomes two, with so many channels between them, which only live for a frame.

    Zeros stand before and after the clip, (kernel - 1) / 2 frames each; where `causal`, all kernel - 1 stand before it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        make: Making,
        stride: int = 1,
        skip: bool = False,
        causal: bool = False,
        wide: int = 0,
        between: Literal["relu", "none"] = "relu",
    ) -> None:
        super().__init__()
        before, around = (kernel - 1, 0) if causal else (0, kernel // 2)
        act, over = make.act(between), (kernel, 1)
        self.depthwise = Unit(inputs, inputs, over, make, (stride, 1), inputs, act, (around, 0), before)
        self.widen = Unit(inputs, wide, (1, 1), make, act=make.act()) if wide else nn.Identity()
        self.pointwise = Unit(wide or inputs, outputs, (1, 1), make, act=make.act("none") if skip else make.act())
        self.act = make.act() if skip else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, T, 1] -> [B, out, T / stride, 1], not negative."""
        y = self.pointwise(self.widen(self.depthwise(x)))
        return y if self.act is None else self.act(x + y)
