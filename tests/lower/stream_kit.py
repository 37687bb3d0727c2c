"""Integer graphs that run column by column, random and like those of tiny keyword spotters, for several test files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kestrel.lower import ops
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.ops import Window
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale

LIMITS = (-127, 127)
RELU = (0, 127)


def weights(rng: np.random.Generator, shape: tuple[int, ...], storage: str) -> Constant:
    """Bell-shaped weights, as trained ones are, with both ends of the storage."""
    low, high = Constant.range_of(storage)
    if storage.startswith("power"):
        values = rng.choice([-1, 1], shape) << rng.integers(0, 8, shape)
    elif storage == "binary":
        values = rng.choice([-1, 1], shape)
    else:
        values = np.rint(rng.standard_normal(shape) * high / 2.5).astype(np.int64).clip(low, high)
        if storage.startswith("odd"):
            values = (values | 1).clip(low, high)
    flat = values.reshape(-1)
    flat[0], flat[-1] = low, high
    return Constant(values, storage)


@dataclass
class Maker:
    """Adds layers to a graph of `frames` columns; every method returns the name of its result."""

    seed: int
    frames: int = 24
    width: int = 20
    storage: str = "int4"

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.graph = IntegerGraph()
        self.count = 0
        self.features = self.graph.input(
            "features", Tensor((self.frames, self.width), -(1 << 15), (1 << 15) - 1, 1 / 64)
        )

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def add(self, kind: type[ops.Op], *inputs: str, **fields) -> str:
        return self.graph.add(kind(inputs=inputs, outputs=(self.name(kind.__name__.lower()),), **fields))

    def scaled(self, spread: float, channels: int, limits: tuple[int, int] = RELU) -> Rescale:
        """Per channel, so that sums of this deviation fill the codes; some offsets, some negative multipliers."""
        ratios = (
            60 / spread * self.rng.uniform(0.5, 1.5, channels) * self.rng.choice([1, 1, 1, -1], channels)
        ).tolist()
        return Rescale.of(ratios, limits, self.rng.uniform(-20, 20, channels).tolist())

    def codes(self, image: bool = True) -> str:
        """Features as int8 codes, with an affine step per channel; an image [frames, 1, width]."""
        rescale = Rescale.of(
            (self.rng.uniform(0.5, 1.5, self.width) / 3).tolist(), LIMITS, self.rng.uniform(-9, 9, self.width).tolist()
        )
        made = self.add(ops.Requantise, self.features, rescale=rescale)
        return self.add(ops.Reshape, made, shape=(self.frames, 1, self.width)) if image else made

    def conv(
        self, x: str, outputs: int, window: Window, limits: tuple[int, int] = RELU, storage: str | None = None
    ) -> str:
        shape = (outputs, *window.size, self.graph.tensors[x].shape[2])
        weight = weights(self.rng, shape, storage or self.storage)
        spread = 40 * float(np.sqrt((weight.values.astype(float) ** 2).reshape(outputs, -1).sum(1).mean()))
        return self.add(ops.Conv2d, x, weight=weight, window=window, rescale=self.scaled(spread, outputs, limits))

    def pointwise(self, x: str, outputs: int, limits: tuple[int, int] = RELU, storage: str | None = None) -> str:
        return self.conv(x, outputs, Window((1, 1)), limits, storage)

    def depthwise(self, x: str, window: Window, limits: tuple[int, int] = LIMITS) -> str:
        channels = self.graph.tensors[x].shape[2]
        weight = weights(self.rng, (*window.size, channels), "int8")
        spread = 40.0 * 50 * window.size[0]
        return self.add(
            ops.DepthwiseConv2d, x, weight=weight, window=window, rescale=self.scaled(spread, channels, limits)
        )

    def residual(self, a: str, b: str) -> str:
        ratios = self.rng.uniform(0.4, 1.2, 2)
        multipliers = tuple(round(r * 2**28) for r in ratios)
        return self.add(ops.AddRequantise, a, b, multipliers=multipliers, shift=28, low=-127, high=127)

    def condenser(self, x: str, middle: int) -> str:
        """Pool over time, embed, expand, a hard gate, unpool, attend."""
        channels = self.graph.tensors[x].shape[2]
        pooled = self.add(ops.MaxPool, x, window=Window((2, 1), (2, 1)))
        expanded = self.pointwise(self.pointwise(pooled, middle), channels, (0, 64))
        gate = self.add(ops.Upsample, expanded, factor=(2, 1))
        attended = self.add(ops.Multiply, x, gate, rescale=Rescale.of(1 / 64, LIMITS))
        return self.residual(x, attended)

    def finish(self, x: str, classes: int = 12) -> IntegerGraph:
        """Global pool and linear layer."""
        height, width, channels = self.graph.tensors[x].shape
        window = Window((height, width), (height, width))
        mean = self.add(ops.SumPool, x, window=window, rescale=Rescale.of(1.7 / (height * width), LIMITS))
        flat = self.add(ops.Reshape, mean, shape=(channels,))
        weight = weights(self.rng, (classes, channels), self.storage)
        rescale = Rescale.of(3.3, (-32767, 32767), self.rng.uniform(-400, 400, classes).tolist())
        made = self.graph.add(ops.MatMul(inputs=(flat,), outputs=("logits",), weight=weight, rescale=rescale))
        self.graph.output(made)
        self.graph.output(self.graph.add(ops.ArgMax(inputs=("logits",), outputs=("class",))))
        return self.graph

    def features_of(self, clips: int) -> np.ndarray:
        """int16 features [clips, frames, width]: extremes, then smooth random ones."""
        shape = (clips, self.frames, self.width)
        found = np.cumsum(self.rng.integers(-60, 61, shape), axis=1)
        for clip, value in zip(found, (-32768, 32767, 0), strict=False):
            clip[:] = value
        if clips > 4:
            found[3] = np.where(np.indices(shape[1:]).sum(0) % 2, 32767, -32768)
            found[4] = np.where(np.arange(self.frames)[:, None] % 2, 600, -600)
        return found.astype(np.int16)


def spotter(
    seed: int = 0, storage: str = "int4", frames: int = 49, channels: int = 24, wide: int = 64, blocks: int = 3
) -> Maker:
    """Stem of stride 2, attention condenser, blocks of depthwise (causal), wide pointwise and residual; not finished."""
    maker = Maker(seed, frames=frames, storage=storage)
    x = maker.conv(maker.codes(), channels, Window((3, 1), (2, 1)))
    x = maker.condenser(x, channels // 2)
    for _ in range(blocks):
        y = maker.depthwise(x, Window((5, 1), before=(4, 0)))
        x = maker.residual(x, maker.pointwise(maker.pointwise(y, wide), channels, LIMITS))
    maker.finish(x)
    return maker


def picture(seed: int = 0) -> Maker:
    """Two-dimensional windows over time and bands, padding across, local pools, a gate shared by channels, 8-bit weights."""
    maker = Maker(seed, frames=26, width=10, storage="int8")
    x = maker.add(ops.Reshape, maker.codes(image=False), shape=(26, 10, 1))
    x = maker.conv(x, 4, Window((3, 3), (1, 2), before=(2, 1), after=(0, 1)))
    x = maker.depthwise(x, Window((2, 3), before=(1, 1), after=(0, 1)))
    gate = maker.pointwise(x, 1, (0, 100))
    x = maker.add(ops.Multiply, x, gate, rescale=Rescale.of(1 / 90, LIMITS))
    x = maker.add(ops.SumPool, x, window=Window((2, 1), (2, 1)), rescale=Rescale.of(0.6, LIMITS))
    x = maker.add(ops.Lookup, x, table=Constant.of(np.arange(-127, 128) // 2), first=-127)
    maker.finish(maker.residual(x, maker.conv(x, 4, Window((2, 3), before=(1, 1), after=(0, 1)), LIMITS, "odd3")), 5)
    return maker
