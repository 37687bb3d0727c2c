"""Images whose channels lie apart in memory: shape [B, C, H, W], order of the elements C, B, H, W.

On a CPU this is the best layout for small maps: a 1x1 convolution is one matrix product, batch normalisation works on
rows, and a depthwise convolution is one batch of matrix products (kestrel.nn.depthwise). Element-wise functions keep
it. Every function here takes any layout; results equal those of PyTorch's own modules to rounding.

Where a network pools and un-pools maps of a few places, the order C, H, W, B ("batch last") is better still: every place
is then one row of numbers over the clips, and windows of two or three places cost no more than large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kestrel.quant.quantiser import plain_ops

Pair = tuple[int, int]


def is_channel_major(x: Tensor) -> bool:
    """Whether the elements of [B, C, H, W] lie in the order C, B, H, W."""
    return x.transpose(0, 1).is_contiguous()


def is_batch_last(x: Tensor) -> bool:
    """Whether the elements of [B, C, H, W] lie in the order C, H, W, B."""
    return x.permute(1, 2, 3, 0).is_contiguous()


class _SteadyGradient(torch.autograd.Function):
    """x; its gradient in the layout of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.channels_last = not x.is_contiguous()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return channels_last(grad) if ctx.channels_last else grad.contiguous()


def batch_last(x: Tensor) -> Tensor:
    """[B, C, H, W] with its elements in the order C, H, W, B; the gradient comes back in the layout of `x`.

    Batch normalisation of PyTorch takes a gradient of another layout than its input several times slower.
    """
    if is_batch_last(x):
        return x
    steady: Tensor = _SteadyGradient.apply(x) if x.requires_grad else x
    return steady.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def channel_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [C, B, H W], a view where `x` is channel-major."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0], -1)


def from_rows(rows: Tensor, height: int, width: int) -> Tensor:
    """[C, B, H W] -> [B, C, H, W], a view."""
    return rows.view(rows.shape[0], rows.shape[1], height, width).transpose(0, 1)


def fast_layouts(x: Tensor) -> bool:
    """Whether layouts matter here: on the CPU, unless a trace is recorded (of torch.fx, too), which must see ordinary operators."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and not plain_ops()


def pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution of stride 1 without bias: [B, C, H, W] and [K, C, 1, 1] -> [B, K, H, W], channel-major or batch last.

    Channels-last images are read as they lie, the product turns them.
    """
    if is_batch_last(x):
        places = x.permute(1, 2, 3, 0)  # [C, H, W, B]
        return (weight.flatten(1) @ places.flatten(1)).view(-1, *places.shape[1:]).permute(3, 0, 1, 2)
    rows = channel_rows(x)
    made = weight.flatten(1) @ rows.flatten(1)  # [K, B H W]
    return from_rows(made.view(-1, *rows.shape[1:]), x.shape[2], x.shape[3])


def joined_channels(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat(parts, 1) of images [B, C, H, W] that keeps them batch last."""
    if fast_layouts(parts[0]) and all(map(is_batch_last, parts)):
        return torch.cat([part.permute(1, 2, 3, 0) for part in parts]).permute(3, 0, 1, 2)
    return torch.cat(list(parts), 1)


class BatchLast(nn.Identity):
    """Images as they are, batch last in memory where layouts matter."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return batch_last(x) if fast_layouts(x) else x


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d of windows that touch and do not overlap; where images are batch last, a maximum of whole rows.

    Where several places of a window are the largest, rows share the gradient, while PyTorch gives it to the first.
    """

    def __init__(self, window: Pair) -> None:
        super().__init__(window)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / h, W / w], rounded down."""
        if not (fast_layouts(x) and is_batch_last(x)):
            return super().forward(x)
        height, width = x.shape[2] // self.window[0], x.shape[3] // self.window[1]
        cut = x[:, :, : height * self.window[0], : width * self.window[1]].permute(1, 2, 3, 0)
        cut = cut.unflatten(2, (width, self.window[1])).unflatten(1, (height, self.window[0]))
        return cut.amax((2, 4)).permute(3, 0, 1, 2)


class _GlobalMean(torch.autograd.Function):
    """Mean over `axis` of three, [C, B, H W] or [C, H W, B] -> [B, C]; the gradient lies like the input, where that of `mean`
    has clips outside."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: int) -> Tensor:
        ctx.shape, ctx.axis = rows.shape, axis
        return rows.mean(axis).t().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad / ctx.shape[ctx.axis]).t().unsqueeze(ctx.axis).expand(ctx.shape).contiguous(), None


def global_mean(x: Tensor) -> Tensor:
    """Mean of each map: [B, C, H, W] -> [B, C]."""
    if fast_layouts(x) and is_channel_major(x):
        made: Tensor = _GlobalMean.apply(channel_rows(x), 2)
        return made
    if fast_layouts(x) and is_batch_last(x):
        made = _GlobalMean.apply(x.permute(1, 2, 3, 0).flatten(1, 2), 1)
        return made
    return x.mean((2, 3))


def _steady(x: Tensor) -> Tensor:
    """`x`, whose gradient then has its layout.

    For a single image PyTorch (2.13 at least) takes a gradient of another layout wrongly in batch normalisation.
    """
    made: Tensor = _SteadyGradient.apply(x) if x.shape[0] == 1 and x.requires_grad else x
    return made


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that works on channel-major and batch-last images without copying them."""

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
            if fast_layouts(x) and (is_channel_major(x) or is_batch_last(x)):
                return self._by_rows(x, self._of_batch)
            return self._of_batch(x)
        if fast_layouts(x) and (is_channel_major(x) or is_batch_last(x)) and x.shape[0] > 1:
            return self._by_rows(x, super().forward)
        return _steady(super().forward(x)) if fast_layouts(x) else super().forward(x)

    def _of_batch(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    @staticmethod
    def _by_rows(x: Tensor, apply) -> Tensor:  # type: ignore[no-untyped-def]
        batch, channels, height, width = x.shape
        if not is_channel_major(x):  # batch last: an image as wide as the batch
            image = x.permute(1, 2, 3, 0).view(1, channels, height * width, batch)
            return _steady(apply(image)).view(channels, height, width, batch).permute(3, 0, 1, 2)
        image = x.transpose(0, 1).view(1, channels, batch * height, width)  # one tall image
        return _steady(apply(image)).view(channels, batch, height, width).transpose(0, 1)


def hold_statistics(module: nn.Module, hold: bool) -> None:
    """Let the BatchNorm2d in `module` normalise by the batch without noting it (`hold`), or work as usual again."""
    for part in module.modules():
        if isinstance(part, BatchNorm2d):
            part.statistics = "batch" if hold else "own"


def channels_last(x: Tensor) -> Tensor:
    """`x` in PyTorch's channels-last layout."""
    return x.contiguous(memory_format=torch.channels_last)
