"""TinySpeech networks (arXiv 2008.04245), their QP variant, and separable ones of the same size.

The paper names its networks X, Y, Z and M by their accuracy, parameters and operations, and prints no layers. PLANS holds
the reconstruction whose parameters match (recipes/tinyspeech/README.md says how sure each is).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.models.quant_net import LowBitPlan, QuantNet
from kestrel.nn.channel_major import BatchLast, MaxPool2d
from kestrel.nn.condenser import Condenser, Making, Unit
from kestrel.nn.low_bit import QuantConv2d, QuantLinear
from kestrel.nn.sequence import FramesAsColumns, TimeChannel

Family = Literal["x", "y", "z", "m", "qp", "sep"]


@dataclass(frozen=True)
class Plan:
    """Channels of the first convolution, (mid0, out0, mid1) of each condenser, filters of the last convolution."""

    first: int
    blocks: tuple[tuple[int, int, int], ...]
    last: int
    norm: bool = True


PLANS: dict[str, Plan] = {
    "x": Plan(15, ((30, 6, 12),) * 3 + ((30, 18, 36), (30, 27, 54), (30, 18, 36)), 38),
    "y": Plan(10, ((20, 6, 12),) * 3 + ((20, 18, 36), (20, 26, 52), (20, 18, 36)), 25),
    "z": Plan(7, ((14, 3, 6),) * 2 + ((14, 2, 4), (14, 11, 22), (14, 14, 28), (14, 10, 20)), 17),
    "m": Plan(9, ((18, 6, 12), (18, 9, 18), (18, 8, 16)), 40, norm=False),
}
QP = PLANS["z"]  # the QP variant has the channels of Z, and two condensers in each block


def published_parameters(plan: Plan, classes: int) -> int:
    """Weights of a plan as the paper counts them: no biases, no normalisation, no strengths."""
    total = 9 * plan.first + 9 * plan.first * plan.last + plan.last * classes
    for mid0, out0, mid1 in plan.blocks:
        total += mid0 + mid0 * out0 + mid1 + mid1 * plan.first
    return total


class _Image(QuantNet):
    """What both families have around them: quantised features, mean over the map, classes."""

    def __init__(self, input_shape: tuple[int, int], make: Making) -> None:
        super().__init__(input_shape[1])
        self.features = make.act("none")

    def _finish(self, channels: int, classes: int, make: Making) -> None:
        self.mean_act = make.act("none", signed=False)
        self.classes = QuantLinear(channels, classes)

    def _scores_of(self, v: Tensor) -> Tensor:
        return self.classes(self.mean_act(v.mean((2, 3))))


class TinySpeech(_Image):
    """3 x 3 convolution, attention condensers, 3 x 3 convolution, mean, classes: features [B, T, F] -> [B, C].

    `pools`: condensation (frames, bands) of each condenser, the last one for those that follow; `looks`: the condensed frames
    that depthwise layers see, which costs no weight and makes convolutions over time of kernels of 1 x 1. `head_pool`: max pooling
    before the last convolution, `last_padding` zeros around it. Where three bands are left and nothing is padded, its kernels
    see all of them, each at its own place; with padding the mean forgets where in frequency something was.
    """

    def __init__(
        self,
        input_shape: tuple[int, int],
        classes: int,
        plan: Plan,
        low_bit: LowBitPlan,
        make: Making,
        first_stride: tuple[int, int] = (1, 1),
        first_padding: tuple[int, int] = (1, 1),
        pools: Sequence[tuple[int, int]] = ((2, 2),),
        head_pool: tuple[int, int] = (1, 1),
        last_padding: tuple[int, int] = (1, 1),
        qp_blocks: int = 0,
        looks: Sequence[int] = (0,),
    ) -> None:
        super().__init__(input_shape, make)
        channels = plan.first
        self.first = Unit(1, channels, (3, 3), make, first_stride, act=make.act(), padding=first_padding)
        self.laid = BatchLast()
        sides = zip(input_shape, first_padding, first_stride, strict=True)
        size = tuple((have + 2 * more - 3) // step + 1 for have, more, step in sides)
        count = qp_blocks or len(plan.blocks)
        blocks: list[nn.Module] = []
        for place, (mid0, out0, mid1) in enumerate(plan.blocks[:count]):
            pool = pools[min(place, len(pools) - 1)]
            _check_pool("model.pools", size, pool)
            if qp_blocks:
                blocks.append(_QPBlock(channels, (mid0, out0, mid1), pool, make))
            else:
                blocks.append(Condenser(channels, mid0, out0, mid1, pool, make, looks))
        self.blocks = nn.Sequential(*blocks)
        self.pool = MaxPool2d(head_pool) if head_pool != (1, 1) else nn.Identity()
        left = tuple(have // step + 2 * more for have, step, more in zip(size, head_pool, last_padding, strict=True))
        if min(left) < 3:
            raise UsageError(f"model.head_pool: {left[0]} x {left[1]} are left for kernels of 3 x 3: pool less")
        self.last = Unit(channels, plan.last, (3, 3), make, act=make.act(), padding=last_padding)
        self._finish(plan.last, classes, make)
        self.plan_low_bits(low_bit)

    def scores(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, C]."""
        v = self.laid(self.first(self.features(x).unsqueeze(1)))  # [B, first, T, F]
        return self._scores_of(self.last(self.pool(self.blocks(v))))


def _check_pool(key: str, size: Sequence[int], pool: tuple[int, int]) -> None:
    if any(have % step for have, step in zip(size, pool, strict=True)):
        raise UsageError(
            f"{key}: a map of {size[0]} x {size[1]} (frames x bands) cannot be pooled by {pool[0]} x {pool[1]}: "
            "crop the features (feature.post) or choose divisors"
        )


class _QPBlock(nn.Module):
    """Two condensers and the input: what QP-TinySpeech means its block to be."""

    def __init__(self, channels: int, plan: tuple[int, int, int], pool: tuple[int, int], make: Making) -> None:
        super().__init__()
        mid0, out0, mid1 = plan
        self.condenser0 = Condenser(channels, mid0, out0, None, pool, make)
        self.condenser1 = Condenser(channels, mid1, channels, None, pool, make)
        self.act = make.act("none", signed=False)

    def forward(self, v: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return self.act(v + self.condenser1(self.condenser0(v)))


class SeparableNet(_Image):
    """Bands as channels, time-channel separable convolutions, mean over time, classes: features [B, T, F] -> [B, C].

    It takes features frame by frame: only kernels look at more than one frame. `kernels`: frames of the first layer
    (bands -> width) and of each block; `causal` ones do not look ahead. `condense`: blocks (from 1) that an attention condenser over pairs of frames follows.
    """

    def __init__(
        self,
        input_shape: tuple[int, int],
        classes: int,
        width: int,
        kernels: Sequence[int],
        low_bit: LowBitPlan,
        make: Making,
        stride: int = 1,
        condense: Sequence[int] = (),
        head: int = 0,
        causal: bool = False,
        wide: int = 0,
        between: Literal["relu", "none"] = "relu",
    ) -> None:
        super().__init__(input_shape, make)
        if not kernels or any(kernel % 2 == 0 for kernel in kernels):
            raise UsageError(f"model.kernels: {list(kernels)}; choose odd numbers, the first for the features")
        self.columns = FramesAsColumns()
        self.first = TimeChannel(input_shape[1], width, kernels[0], make, stride, causal=causal, between=between)
        frames = (input_shape[0] - 1) // stride + 1
        blocks: list[nn.Module] = []
        for place, kernel in enumerate(kernels[1:], 1):
            block = TimeChannel(width, width, kernel, make, skip=True, causal=causal, wide=wide, between=between)
            blocks.append(block)
            if place in condense:
                _check_pool("model.condense", (frames, 1), (2, 1))
                blocks.append(Condenser(width, width, width // 2, None, (2, 1), make))
        self.blocks = nn.Sequential(*blocks)
        self.head = Unit(width, head, (1, 1), make, act=make.act()) if head else nn.Identity()
        self._finish(head or width, classes, make)
        self.plan_low_bits(low_bit)

    def scores(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, C]."""
        v = self.first(self.columns(self.features(x)))  # [B, width, T / stride, 1]
        return self._scores_of(self.head(self.blocks(v)))


def convolutions(net: nn.Module) -> list[QuantConv2d]:
    """The convolutions of a network, in order."""
    return [module for module in net.modules() if isinstance(module, QuantConv2d)]
