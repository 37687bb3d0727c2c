"""A small network of quantised layers that uses every way in which they are lowered."""

from __future__ import annotations

from typing import Any

import torch
from lower_kit import CLASSES, WIDTH, features
from torch import Tensor, nn

from kestrel.models.quant_net import LowBitPlan, QuantNet
from kestrel.nn.condenser import HardGate
from kestrel.nn.low_bit import QuantActivation, QuantConv2d, QuantLinear


class LowBitNet(QuantNet):
    """Features [B, T, F] -> logits: padded, depthwise and pointwise convolutions, gate, residual, mean, dense layer."""

    def __init__(self, plan: LowBitPlan | None = None, **activation: Any) -> None:
        super().__init__(WIDTH)
        self.input = QuantActivation(8, **activation)
        self.first = QuantConv2d(1, 6, 3, stride=(2, 1), padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.act1 = QuantActivation(8, "relu", **activation)
        self.depthwise = QuantConv2d(12, 12, 3, padding=1, groups=12)
        self.act2 = QuantActivation(8, "relu6", **activation)
        self.pool = nn.MaxPool2d(2)
        self.embed = QuantConv2d(12, 4, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.act3 = QuantActivation(8, **activation)
        self.up = nn.Upsample(scale_factor=2)
        self.expand = QuantConv2d(4, 6, 1)
        self.gate = HardGate()
        self.act4 = QuantActivation(8, fixed=2.0**-7, signed=False)
        self.act5 = QuantActivation(8, **activation)
        self.strength = nn.Parameter(torch.tensor(-0.7))
        self.act6 = QuantActivation(8, **activation)
        self.act7 = QuantActivation(8, **activation)
        self.out = QuantLinear(6, CLASSES)
        self.plan_low_bits(plan or LowBitPlan())

    def scores(self, x: Tensor) -> Tensor:
        x = self.input(x).unsqueeze(1)
        v = self.act1(self.norm1(self.first(x)))  # [B, 6, 6, 10]
        k = self.act2(self.depthwise(torch.cat([v, v], 1)))
        k = self.act3(self.norm2(self.embed(self.pool(k))))
        gate = self.act4(self.gate(self.expand(self.up(k))))
        v = self.act6(v + self.strength * self.act5(v * gate))
        return self.out(self.act7(v.mean((2, 3))))


def trained(net: QuantNet, stage: str = "retrain", steps: int = 12) -> QuantNet:
    """`net` after a few steps of a stage (and of the one before it), in evaluation."""
    generator = torch.Generator().manual_seed(3)
    stages = ["pretrain"] if stage == "pretrain" else ["pretrain", "retrain"]
    net.updates_per_epoch = steps
    for name in stages:
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        net.set_phase(name)  # type: ignore[arg-type]
        for step in range(steps):
            x = features(50 + step, 32)
            labels = torch.randint(CLASSES, (32,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), labels).backward()
            optimizer.step()
            net.project()
    net.set_phase("eval")
    return net
