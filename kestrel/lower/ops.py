"""The op set of integer graphs. docs/integer.md states each op for an implementation in C.

An op is a frozen dataclass: names of its inputs and outputs, and constants. `infer` maps the tensors of the inputs to
those of the outputs, and refuses what does not fit or could overflow; `run` computes on int64 arrays [batch, *shape].
Images are [height, width, channels].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kestrel.errors import KestrelError
from kestrel.lower.tensor import COLUMN_STORAGES, Constant, Shape, Tensor
from kestrel.quant import integer
from kestrel.quant.integer import INT32, Rescale

Array = np.ndarray
_EXACT_FLOAT32, _EXACT_FLOAT64 = 1 << 24, 1 << 53
_INT64 = 1 << 63

OPS: dict[str, type[Op]] = {}


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """`inputs` and `outputs` are names of tensors."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    arity: ClassVar[int | None] = 1  # inputs; None = one or more

    def __init_subclass__(cls) -> None:
        OPS[cls.__name__] = cls

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors of the outputs. Raises KestrelError, one line."""
        raise NotImplementedError

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        """int64 [batch, ...] -> outputs, int64 [batch, ...]."""
        raise NotImplementedError

    def problem(self, text: str) -> KestrelError:
        """An error of this op."""
        return KestrelError(f"{type(self).__name__} {self.outputs[0]!r}: {text}")

    def check(self, condition: bool, text: str) -> None:
        """Raise the error `text` unless `condition`."""
        if not condition:
            raise self.problem(text)

    def _rescaled(self, rescale: Rescale, channels: int) -> tuple[int, int]:
        """Range after `rescale`, which is checked."""
        for name, values in (("multipliers", rescale.multipliers), ("offsets", rescale.offsets)):
            self.check(len(values) in (1, channels), f"{len(values)} {name} for {channels} channels")
        self._check_scaling(rescale.multipliers, rescale.shift, rescale.low, rescale.high)
        self.check(all(INT32[0] <= o <= INT32[1] for o in rescale.offsets), "an offset has more than 32 bits")
        return rescale.low, rescale.high

    def _check_scaling(self, multipliers: tuple[int, ...], shift: int, low: int, high: int) -> None:
        self.check(0 <= shift <= integer.MAX_SHIFT, f"shift {shift} is outside 0..{integer.MAX_SHIFT}")
        fits = all(abs(m) < 1 << integer.MULTIPLIER_BITS for m in multipliers)
        self.check(fits, f"a multiplier has more than {integer.MULTIPLIER_BITS} bits")
        self.check(INT32[0] <= low <= high <= INT32[1], f"limits {low}..{high} are not 32-bit")

    def _accumulated(self, low: int, high: int) -> None:
        """Prove that a sum, in whatever order it is taken, fits an int32 accumulator."""
        reached = max(high, -low)
        self.check(
            INT32[0] <= low and high <= INT32[1],
            f"an accumulator can reach {reached}, beyond 32 bits: use fewer weight bits or input bits",
        )


def sum_range(weight: Array, bias: Array | None, low: int, high: int) -> tuple[int, int]:
    """Bounds of bias + any partial sum of products of `weight` [out, in] with inputs low .. high, over all outputs."""
    least = np.minimum(np.minimum(weight * low, weight * high), 0).sum(axis=1)
    most = np.maximum(np.maximum(weight * low, weight * high), 0).sum(axis=1)
    if bias is not None:
        least, most = least + np.minimum(bias, 0), most + np.maximum(bias, 0)
    return int(least.min(initial=0)), int(most.max(initial=0))


# -------------------------------------------------------------------------------------------- element by element


@dataclass(frozen=True, eq=False, kw_only=True)
class Requantise(Op):
    """y = clamp(round((x * m + offset) / 2^shift)), m and offset one for all or per index of the last axis."""

    rescale: Rescale
    scale: float | None = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        return (Tensor(x.shape, *self._rescaled(self.rescale, x.shape[-1]), self.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (self.rescale.apply(arrays[0]),)


@dataclass(frozen=True, eq=False, kw_only=True)
class AddRequantise(Op):
    """y = clamp(round(sum of x_i * m_i / 2^shift)) of inputs of one shape; residuals, sums of blocks, state updates."""

    multipliers: tuple[int, ...]
    shift: int
    low: int
    high: int
    scale: float | None = None

    arity: ClassVar[int | None] = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        shapes = {x.shape for x in tensors}
        self.check(len(shapes) == 1, f"inputs have different shapes {sorted(shapes)}")
        self.check(
            len(self.multipliers) == len(tensors), f"{len(self.multipliers)} multipliers for {len(tensors)} inputs"
        )
        self._check_scaling(self.multipliers, self.shift, self.low, self.high)
        reached = sum(x.magnitude * abs(m) for x, m in zip(tensors, self.multipliers, strict=True)) + (1 << self.shift)
        self.check(reached < _INT64, "the sum can overflow 64 bits: use fewer bits")
        return (Tensor(tensors[0].shape, self.low, self.high, self.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (integer.add_rescaled(arrays, self.multipliers, self.shift, self.low, self.high),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Multiply(Op):
    """y = a * b, rescaled where `rescale` is given (gates, attention). A dimension of b may be 1 where a's is not."""

    rescale: Rescale | None = None
    scale: float | None = None

    arity: ClassVar[int | None] = 2

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        a, b = tensors
        fits = len(a.shape) == len(b.shape) and all(q in (1, p) for p, q in zip(a.shape, b.shape, strict=True))
        self.check(fits, f"cannot multiply {a.shape} by {b.shape}")
        corners = [p * q for p in (a.low, a.high) for q in (b.low, b.high)]
        low, high = min(corners), max(corners)
        self._accumulated(low, high)
        if self.rescale is not None:
            low, high = self._rescaled(self.rescale, a.shape[-1])
        return (Tensor(a.shape, low, high, self.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        product = arrays[0] * arrays[1]
        return (product if self.rescale is None else self.rescale.apply(product),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Lookup(Op):
    """y = table[x - first]: a function of few-bit codes, exact."""

    table: Constant
    first: int
    scale: float | None = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        last = self.first + len(self.table.values) - 1
        covered = self.table.values.ndim == 1 and self.first <= x.low and x.high <= last
        self.check(covered, f"the table covers {self.first}..{last}, its input is {x.low}..{x.high}")
        return (Tensor(x.shape, int(self.table.values.min()), int(self.table.values.max()), self.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (integer.lookup(arrays[0], self.table.values, self.first),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Interpolate(Op):
    """Piecewise linear function of codes of many bits: nodes 2^step_bits codes apart, one rounding, clamped to low..high."""

    nodes: Constant
    first: int
    step_bits: int
    low: int
    high: int
    scale: float | None = None
    error: float | None = None  # largest distance from the clamped function, in output codes

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(self.nodes.values.ndim == 1, "nodes are not a vector")
        last = self.first + ((len(self.nodes.values) - 1) << self.step_bits) - 1
        covered = self.first <= x.low and x.high <= last
        self.check(covered, f"the nodes cover {self.first}..{last}, its input is {x.low}..{x.high}")
        steepest = int(np.abs(np.diff(self.nodes.values)).max())
        self.check(steepest << self.step_bits < 1 << 30, "the rise of a segment can overflow 32 bits")
        return (Tensor(x.shape, self.low, self.high, self.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        y = integer.interpolate(arrays[0], self.nodes.values, self.first, self.step_bits)
        return (integer.saturate(y, self.low, self.high),)


# ------------------------------------------------------------------------------------------------------ products


@dataclass(frozen=True, eq=False, kw_only=True)
class MatMul(Op):
    """y = x W^T + b over the last axis, int32 accumulators; rescaled (per output) or left as int32.

    weight [out, in], bias [out].
    """

    weight: Constant
    bias: Constant | None = None
    rescale: Rescale | None = None
    scale: float | None = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(self.weight.values.ndim == 2, "weights are not [out, in]")
        outputs, width = self.weight.shape
        self.check(x.shape[-1] == width, f"weights take {width} inputs, there are {x.shape[-1]}")
        low, high = _linear_range(self, self.weight, self.bias, x)
        if self.rescale is not None:
            low, high = self._rescaled(self.rescale, outputs)
        return (Tensor((*x.shape[:-1], outputs), low, high, self.scale),)

    def accumulate(self, x: Array) -> Array:
        """The int32 accumulators."""
        return _plus(exact_product(x, self.weight), self.bias)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (_scaled(self.accumulate(arrays[0]), self.rescale),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Accumulate(Op):
    """y = m + d W^T: adds the effect of sparse changes d to int32 memories m (inputs: m, d). weight [out, in].

    The op alone cannot bound y. Inside a Scan the memories are a state and d comes from a DeltaUpdate; Scan proves the
    declared range of the state from m = initial + (transmitted values) W^T.
    """

    weight: Constant

    arity: ClassVar[int | None] = 2

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        memory, delta = tensors
        self.check(self.weight.values.ndim == 2, "weights are not [out, in]")
        self.check(not self.weight.storage.startswith("masked"), f"storage {self.weight.storage} has no columns")
        outputs, width = self.weight.shape
        self.check(delta.shape == (width,), f"weights take {width} inputs, there are {delta.shape}")
        self.check(memory.shape == (outputs,), f"weights make {outputs} outputs, the memories are {memory.shape}")
        return (memory,)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] + exact_product(arrays[1], self.weight),)


@dataclass(frozen=True, eq=False, kw_only=True)
class DeltaUpdate(Op):
    """(d, r') of x and r, the last transmitted values: where |x - r| >= threshold, d = x - r and r' = x; else 0, r."""

    threshold: int

    arity: ClassVar[int | None] = 2

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, reference = tensors
        self.check(x.shape == reference.shape, f"shapes {x.shape} and {reference.shape} differ")
        self.check(self.threshold >= 0, f"threshold {self.threshold} is negative")
        self.check(len(self.outputs) == 2, "needs two outputs, changes and references")
        low, high = min(x.low, reference.low), max(x.high, reference.high)
        return Tensor(x.shape, low - high, high - low, x.scale), Tensor(x.shape, low, high, x.scale)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        x, reference = arrays
        delta = x - reference
        sent = np.abs(delta) >= self.threshold
        return np.where(sent, delta, 0), np.where(sent, x, reference)


@dataclass(frozen=True)
class Window:
    """Where a kernel is applied to an image: size, stride and zero padding, each (height, width)."""

    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)  # padding above, left
    after: tuple[int, int] = (0, 0)  # padding below, right

    def output(self, op: Op, shape: Shape) -> tuple[int, int]:
        """Height and width of the result for an image [height, width, channels]."""
        op.check(len(shape) == 3, f"takes an image [height, width, channels], not {shape}")
        op.check(min(*self.size, *self.stride) >= 1 and min(*self.before, *self.after) >= 0, f"bad window {self}")
        padded = [shape[d] + self.before[d] + self.after[d] for d in (0, 1)]
        op.check(
            all(p >= k for p, k in zip(padded, self.size, strict=True)), f"kernel {self.size} is larger than {shape}"
        )
        height, width = ((p - k) // s + 1 for p, k, s in zip(padded, self.size, self.stride, strict=True))
        return height, width

    def views(self, x: Array) -> Array:
        """x [B, H, W, C] -> [B, h, w, C, kh, kw], without copying beyond the padding."""
        if any(self.before) or any(self.after):
            x = np.pad(x, ((0, 0), *zip(self.before, self.after, strict=True), (0, 0)))
        found = np.lib.stride_tricks.sliding_window_view(x, self.size, axis=(1, 2))
        return found[:, :: self.stride[0], :: self.stride[1]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv2d(Op):
    """Convolution of an image, padded with code 0. weight [out, kh, kw, in], bias [out]; 1 x 1 is pointwise."""

    weight: Constant
    window: Window
    bias: Constant | None = None
    rescale: Rescale | None = None
    scale: float | None = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(self.weight.values.ndim == 4, "weights are not [out, height, width, in]")
        outputs, *kernel, channels = self.weight.shape
        height, width = self.window.output(self, x.shape)
        self.check(tuple(kernel) == self.window.size, f"weights are {tuple(kernel)}, the window {self.window.size}")
        self.check(channels == x.shape[2], f"weights take {channels} channels, the image has {x.shape[2]}")
        low, high = _linear_range(self, self.weight, self.bias, x)
        if self.rescale is not None:
            low, high = self._rescaled(self.rescale, outputs)
        return (Tensor((height, width, outputs), low, high, self.scale),)

    def accumulate(self, x: Array) -> Array:
        """The int32 accumulators."""
        views = self.window.views(x).transpose(0, 1, 2, 4, 5, 3)  # [B, h, w, kh, kw, C]
        return _plus(exact_product(views.reshape(*views.shape[:3], -1), self.weight), self.bias)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (_scaled(self.accumulate(arrays[0]), self.rescale),)


@dataclass(frozen=True, eq=False, kw_only=True)
class DepthwiseConv2d(Op):
    """A kernel of its own for each channel, padded with code 0. weight [kh, kw, channels], bias [channels]."""

    weight: Constant
    window: Window
    bias: Constant | None = None
    rescale: Rescale | None = None
    scale: float | None = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(self.weight.values.ndim == 3, "weights are not [height, width, channels]")
        *kernel, channels = self.weight.shape
        height, width = self.window.output(self, x.shape)
        self.check(tuple(kernel) == self.window.size, f"weights are {tuple(kernel)}, the window {self.window.size}")
        self.check(channels == x.shape[2], f"weights have {channels} channels, the image {x.shape[2]}")
        low, high = _linear_range(
            self, Constant(self.weight.values.reshape(-1, channels).T, self.weight.storage), self.bias, x
        )
        if self.rescale is not None:
            low, high = self._rescaled(self.rescale, channels)
        return (Tensor((height, width, channels), low, high, self.scale),)

    def accumulate(self, x: Array) -> Array:
        """The int32 accumulators."""
        views = self.window.views(x)  # [B, h, w, C, kh, kw]
        height, width = self.window.size
        total = np.zeros(views.shape[:4], dtype=np.int64)
        for row in range(height):
            for column in range(width):
                total += views[..., row, column] * self.weight.values[row, column]
        return _plus(total, self.bias)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (_scaled(self.accumulate(arrays[0]), self.rescale),)


def exact_product(x: Array, weight: Constant) -> Array:
    """x [..., in] times weight [out, ...] (flattened to [out, in]), int64 [..., out].

    Floating-point products of integers are exact, in any order, while no partial sum leaves the mantissa; they are an
    order of magnitude faster.
    """
    outputs = weight.shape[0]
    reach = weight.reach * max(int(x.max(initial=0)), -int(x.min(initial=0)))
    rows = x.reshape(-1, x.shape[-1])
    if reach < _EXACT_FLOAT32 and torch.get_float32_matmul_precision() == "highest":
        total = _one_thread_product(rows.astype(np.float32), weight.float32.reshape(outputs, -1))
    elif reach < _EXACT_FLOAT64:
        total = _one_thread_product(rows.astype(np.float64), weight.float64.reshape(outputs, -1))
    else:
        total = rows @ weight.values.reshape(outputs, -1).T
    return total.reshape(*x.shape[:-1], outputs)


def _one_thread_product(x: Array, weight: Array) -> Array:
    """x [n, in] times weight [out, in], int64 [n, out].

    These products are too small to gain from threads, which on a busy machine mostly wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.mm(torch.from_numpy(x), torch.from_numpy(weight).T).numpy().astype(np.int64)
    finally:
        torch.set_num_threads(threads)


def _plus(total: Array, bias: Constant | None) -> Array:
    if bias is not None:
        total += bias.values
    return total


def _scaled(total: Array, rescale: Rescale | None) -> Array:
    return total if rescale is None else rescale.apply(total)


def _linear_range(op: Op, weight: Constant, bias: Constant | None, x: Tensor) -> tuple[int, int]:
    """Range of the accumulators of a linear op, proven to fit 32 bits. weight [out, ...], bias [out]."""
    flat = weight.values.reshape(weight.shape[0], -1)
    op.check(weight.storage not in COLUMN_STORAGES, f"storage {weight.storage} is for the columns of Accumulate")
    if bias is not None:
        op.check(bias.shape == (len(flat),), f"{len(flat)} outputs with a bias of shape {bias.shape}")
    low, high = sum_range(flat, None if bias is None else bias.values, x.low, x.high)
    op._accumulated(low, high)
    return low, high


# ------------------------------------------------------------------------------------------------------- pooling


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Op):
    """Largest value of each window of an image; no padding."""

    window: Window

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(not any((*self.window.before, *self.window.after)), "padding is not supported")
        return (Tensor((*self.window.output(self, x.shape), x.shape[2]), x.low, x.high, x.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (self.window.views(arrays[0]).max(axis=(4, 5)),)


@dataclass(frozen=True, eq=False, kw_only=True)
class SumPool(Op):
    """Sum of each window of an image, rescaled: with a ratio that holds 1 / (window size) the average. No padding.

    The window may be the whole image (global average).
    """

    window: Window
    rescale: Rescale | None = None
    scale: float | None = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(not any((*self.window.before, *self.window.after)), "padding is not supported")
        shape = (*self.window.output(self, x.shape), x.shape[2])
        count = math.prod(self.window.size)
        low, high = count * min(x.low, 0), count * max(x.high, 0)
        self._accumulated(low, high)
        if self.rescale is not None:
            low, high = self._rescaled(self.rescale, shape[-1])
        return (Tensor(shape, low, high, self.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (_scaled(self.window.views(arrays[0]).sum(axis=(4, 5)), self.rescale),)


# ---------------------------------------------------------------------------------------------- moving of values


@dataclass(frozen=True, eq=False, kw_only=True)
class Upsample(Op):
    """Every pixel of an image repeated `factor` (height, width) times."""

    factor: tuple[int, int]

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(len(x.shape) == 3, f"takes an image [height, width, channels], not {x.shape}")
        self.check(min(self.factor) >= 1, f"bad factor {self.factor}")
        shape = (x.shape[0] * self.factor[0], x.shape[1] * self.factor[1], x.shape[2])
        return (Tensor(shape, x.low, x.high, x.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0].repeat(self.factor[0], axis=1).repeat(self.factor[1], axis=2),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Op):
    """Inputs one after the other along `axis` (without the batch)."""

    axis: int = 0

    arity: ClassVar[int | None] = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        ranks = {len(x.shape) for x in tensors}
        self.check(len(ranks) == 1 and 0 <= self.axis < min(ranks), f"cannot join {[x.shape for x in tensors]}")
        rest = {x.shape[: self.axis] + x.shape[self.axis + 1 :] for x in tensors}
        self.check(len(rest) == 1, f"cannot join {[x.shape for x in tensors]} along axis {self.axis}")
        first = tensors[0].shape
        shape = (*first[: self.axis], sum(x.shape[self.axis] for x in tensors), *first[self.axis + 1 :])
        scales = {x.scale for x in tensors}
        scale = scales.pop() if len(scales) == 1 else None
        return (Tensor(shape, min(x.low for x in tensors), max(x.high for x in tensors), scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.concatenate(arrays, axis=self.axis + 1),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Slice(Op):
    """Indices start .. stop - 1 of `axis` (without the batch)."""

    start: int
    stop: int
    axis: int = 0

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(0 <= self.axis < len(x.shape), f"{x.shape} has no axis {self.axis}")
        length = x.shape[self.axis]
        self.check(0 <= self.start < self.stop <= length, f"{self.start}..{self.stop} is outside 0..{length}")
        shape = (*x.shape[: self.axis], self.stop - self.start, *x.shape[self.axis + 1 :])
        return (Tensor(shape, x.low, x.high, x.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0][(slice(None),) * (self.axis + 1) + (slice(self.start, self.stop),)],)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reshape(Op):
    """The same values in the same (row-major) order under another shape."""

    shape: Shape

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(math.prod(self.shape) == x.size, f"cannot shape {x.shape} as {self.shape}")
        return (Tensor(self.shape, x.low, x.high, x.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0].reshape(len(arrays[0]), *self.shape),)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transpose(Op):
    """Axes (without the batch) in another order: axis i of the output is axis `axes`[i] of the input."""

    axes: tuple[int, ...]

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(sorted(self.axes) == list(range(len(x.shape))), f"axes {self.axes} do not order {x.shape}")
        return (Tensor(tuple(x.shape[axis] for axis in self.axes), x.low, x.high, x.scale),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0].transpose(0, *(axis + 1 for axis in self.axes)),)


@dataclass(frozen=True, eq=False, kw_only=True)
class ArgMax(Op):
    """Index of the largest of a vector, the first one of equals: [C] -> [1]."""

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        self.check(len(x.shape) == 1, f"takes a vector, not {x.shape}")
        return (Tensor((1,), 0, x.shape[0] - 1),)

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return (integer.argmax(arrays[0])[..., None],)


PRODUCTS = (MatMul, Accumulate, Conv2d, DepthwiseConv2d)  # ops with weights


def weight_rows(op: MatMul | Accumulate | Conv2d | DepthwiseConv2d) -> Array:
    """The weights of a product as C stores them, [rows, length]."""
    if isinstance(op, Accumulate):
        return op.weight.values.T
    if isinstance(op, DepthwiseConv2d):
        return op.weight.values.reshape(-1, op.weight.shape[-1])  # [place, channel]
    return op.weight.values.reshape(op.weight.shape[0], -1)
