"""Images whose channels lie apart in memory: shape [B, C, H, W], order of the elements C, B, H, W.

On a CPU this is the best layout for small maps: a 1x1 convolution is one matrix product, batch normalisation works on
rows, and a depthwise convolution is one batch of matrix products (kestrel.nn.depthwise). Element-wise functions keep
it. Every function here takes any layout; results equal those of PyTorch's own modules to rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kestrel.quant.quantiser import plain_ops

Pair = tuple[int, int]


def is_channel_major(x: Tensor) -> bool:
    """Whether the elements of [B, C, H, W] lie in the order C, B, H, W."""
    return x.transpose(0, 1).is_contiguous()


def channel_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [C, B, H W], a view where `x` is channel-major."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0], -1)


def from_rows(rows: Tensor, height: int, width: int) -> Tensor:
    """[C, B, H W] -> [B, C, H, W], a view."""
    return rows.view(rows.shape[0], rows.shape[1], height, width).transpose(0, 1)


def fast_layouts(x: Tensor) -> bool:
    """Whether layouts matter here: on the CPU, unless a trace is recorded, which must see ordinary operators."""
    return x.device.type == "cpu" and not plain_ops()


def pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution of stride 1 without bias: [B, C, H, W] and [K, C, 1, 1] -> [B, K, H, W], channel-major."""
    rows = channel_rows(x)
    made = weight.flatten(1) @ rows.flatten(1)  # [K, B H W]
    return from_rows(made.view(-1, *rows.shape[1:]), x.shape[2], x.shape[3])


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that works on channel-major images without copying them."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.statistics: Literal["own", "batch"] = "own"

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; with `statistics` "batch" those of the batch, and nothing is noted."""
        if self.statistics == "batch":
            if fast_layouts(x) and is_channel_major(x):
                return self._by_rows(x, self._of_batch)
            return self._of_batch(x)
        if fast_layouts(x) and is_channel_major(x) and x.shape[0] > 1:
            return self._by_rows(x, super().forward)
        return super().forward(x)

    def _of_batch(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    @staticmethod
    def _by_rows(x: Tensor, apply) -> Tensor:  # type: ignore[no-untyped-def]
        batch, channels, height, width = x.shape
        image = x.transpose(0, 1).view(1, channels, batch * height, width)  # one tall image
        return apply(image).view(channels, batch, height, width).transpose(0, 1)


def hold_statistics(module: nn.Module, hold: bool) -> None:
    """Let the BatchNorm2d in `module` normalise by the batch without noting it (`hold`), or work as usual again."""
    for part in module.modules():
        if isinstance(part, BatchNorm2d):
            part.statistics = "batch" if hold else "own"


def channels_last(x: Tensor) -> Tensor:
    """`x` in PyTorch's channels-last layout."""
    return x.contiguous(memory_format=torch.channels_last)
