"""Small networks that tests of the lowering (and of what is generated from it) share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kestrel.frontend.post import Post
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.network import lower_network
from kestrel.lower.ops import ArgMax
from kestrel.lower.post import lower_post
from kestrel.lower.tensor import Tensor as Codes
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.spotter import KeywordSpotter

FEATURE_SCALE = 2.0**-11
FRAMES, WIDTH, CLASSES = 12, 10, 5


class MixedNet(nn.Module):
    """Convolution, depthwise, pointwise, residual, pooling, upsampled sigmoid gate, folded and free batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, (5, 3), stride=(2, 1), padding=(2, 1), bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu6 = nn.ReLU6()
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.norm3 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.embed = nn.Conv2d(8, 4, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.expand = nn.Conv2d(4, 8, 1)
        self.strength = nn.Parameter(torch.tensor(-0.7))
        self.norm4 = nn.BatchNorm2d(8)
        self.squeeze = nn.Linear(8, 8)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x.unsqueeze(1))))  # [B, 8, 6, 10]
        x = x + self.norm3(self.pointwise(self.relu6(self.norm2(self.depthwise(x)))))
        gate = torch.sigmoid(self.expand(self.up(torch.relu(self.embed(self.pool(x))))))
        x = self.norm4(x * gate * self.strength + x)
        mean = x.mean((2, 3))
        return self.out(torch.cat([mean, torch.tanh(self.squeeze(mean))], 1))


class FlatNet(nn.Sequential):
    """Average pooling, a transposed image, flattening and 4-bit-friendly dense layers with one-dimensional norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.pool = nn.AvgPool2d(2)
        self.flat = nn.Flatten()
        self.hidden = nn.Linear(3 * 4 * 5, 16)
        self.norm = nn.BatchNorm1d(16)
        self.act = nn.ReLU()
        self.drop = nn.Dropout()
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv(x.transpose(1, 2).unsqueeze(1))))  # [B, 3, 4, 5]
        return self.out(self.drop(self.act(self.norm(self.hidden(self.flat(x))))))


class Recurrent(nn.Module):
    """An LSTM or GRU and a read-out of its last hidden state."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], hidden: int = 14, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, hidden, batch_first=True, **settings)
        self.out = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        sequence, _ = self.rnn(x)
        return self.out(sequence[:, -1])


def features(seed: int, clips: int = 64, frames: int = FRAMES, width: int = WIDTH) -> Tensor:
    """Features that move slowly in time, as those of speech do, [B, T, F], of mean square 1.5^2 in each clip."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.cumsum(torch.randn(clips, frames, width, generator=generator), 1)
    return 1.5 * walk / walk.square().mean((1, 2), keepdim=True).sqrt()


def settled(net: nn.Module) -> nn.Module:
    """`net` with running statistics, in evaluation mode."""
    net.train()
    with torch.no_grad():
        for seed in range(5):
            net(features(100 + seed))
    return net.eval()


def graph_of(net: nn.Module, **settings: Any) -> IntegerGraph:
    """`net` lowered with calibration on features of another seed; outputs: logits of whatever name, and class."""
    graph = IntegerGraph()
    name = graph.input("features", Codes((FRAMES, WIDTH), -(1 << 15), (1 << 15) - 1, FEATURE_SCALE))
    view = lower_post(graph, Post([], (FRAMES, WIDTH)), name)
    logits = lower_network(graph, view, net, features(1, 256), **settings)
    graph.output(logits)
    graph.output(graph.add(ArgMax(inputs=(logits,), outputs=("class",))))
    return graph


def spotter_of(post: list[dict[str, Any]] | None = None, seed: int = 0, **model: Any) -> KeywordSpotter:
    """An untrained spotter of quantised LSTM blocks whose weights and ranges make every signal move."""
    torch.manual_seed(seed)
    steps = Post(post or [], (FRAMES, WIDTH))
    steps.fit([features(2, 256)])
    settings = {"hidden": 9, "n_msb": 3, "max_w": 1.0, "noise_train": 0.0, "input_range": 4.0, **model}
    net = BlockLSTM(input_size=steps.output_shape[1], classes=CLASSES, **settings)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("range") or name.endswith("ranges"):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
            elif "b_" in name or "bias" in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
        net.readout.ranges[1] *= 0.2
        if net.method == 1:
            net.sum_range *= 0.2
    net.project()
    spotter = KeywordSpotter(steps, net)
    spotter.eval()
    net.set_phase("eval")
    return spotter


def delta_spotter(post: list[dict[str, Any]] | None = None, seed: int = 0, **model: Any) -> KeywordSpotter:
    """An untrained delta network with weights large enough for gates and logits to move."""
    torch.manual_seed(seed)
    steps = Post(post or [], (FRAMES, WIDTH))
    steps.fit([features(2, 256)])
    settings = {"rnn_size": 12, "delta_from": "pretrain", **model}
    net = DeltaNetwork(input_size=steps.output_shape[1], classes=CLASSES, **settings)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    net.set_phase("pretrain")
    net.project()
    net.set_phase("eval")
    return KeywordSpotter(steps, net).eval()


def codes_of(graph: IntegerGraph, values: Tensor) -> np.ndarray:
    """Input codes of real features."""
    return input_codes(values.numpy(), graph.tensors["features"])
