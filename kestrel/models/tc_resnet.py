"""TC-ResNet8 (Choi et al., Interspeech 2019): the coefficients are channels, convolutions run over time alone.

A plain network of the size of small found ones, to measure these against under the same training.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from kestrel.models.quant_net import LowBitPlan, QuantNet
from kestrel.nn.channel_major import BatchNorm2d, global_mean
from kestrel.nn.low_bit import QuantActivation, QuantLinear
from kestrel.nn.mbconv import ConvUnit, Making, SmallMapConv2d

CHANNELS = (16, 24, 32, 48)
NAME = "tc-resnet8"


class _Block(nn.Module):
    """Two convolutions of 9 frames, the first of stride 2, beside a 1x1 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int, make: Making) -> None:
        super().__init__()
        self.first = ConvUnit(inputs, outputs, (9, 1), (2, 1), make=make)
        self.second = ConvUnit(outputs, outputs, (9, 1), linear=True, make=make)
        self.short = ConvUnit(inputs, outputs, (1, 1), (2, 1), make=make)
        self.act = QuantActivation(make.act_bits, "relu6", make.ranges)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, 1] -> [B, K, T / 2, 1]."""
        return self.act(self.second(self.first(x)) + self.short(x))


class TcResNet8(QuantNet):
    """Features [B, T, F] -> logits [B, C]; ReLU6 in place of ReLU."""

    def __init__(self, input_size: int, classes: int, make: Making, plan: LowBitPlan, dropout: float = 0.0) -> None:
        super().__init__(input_size)
        self.input = QuantActivation(8, "none", make.ranges)
        self.first = SmallMapConv2d(input_size, CHANNELS[0], (3, 1), padding=(1, 0), bias=False)
        self.norm = BatchNorm2d(CHANNELS[0], make.eps, make.momentum)
        self.act = QuantActivation(make.act_bits, "relu6", make.ranges)
        self.blocks = nn.ModuleList(_Block(inputs, outputs, make) for inputs, outputs in itertools.pairwise(CHANNELS))
        self.mean = QuantActivation(8, "none", make.ranges, signed=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classifier = QuantLinear(CHANNELS[-1], classes)
        self.plan_low_bits(plan)

    def scores(self, x: Tensor) -> Tensor:
        """[B, T, F] -> logits [B, C]."""
        x = self.input(x).transpose(1, 2).unsqueeze(1).transpose(1, 2).transpose(2, 3)  # [B, F, T, 1]
        x = self.act(self.norm(self.first(x)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.dropout(self.mean(global_mean(x))))
