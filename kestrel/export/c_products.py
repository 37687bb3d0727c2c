"""C source of products and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kestrel.export.c_writer import Writer
from kestrel.lower import ops
from kestrel.lower.columns import GROUPS, layout_of
from kestrel.lower.memory import unpack_rows
from kestrel.lower.ops import Op
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import twos_complement

PANEL = 16  # most lanes of a vector
INT8 = twos_complement(8)
ROWS = 4  # rows of inputs that a vector kernel takes at once


def _matmul(w: Writer, op: ops.MatMul, tensors: dict[str, Tensor]) -> list[str]:
    x, y = tensors[op.inputs[0]], op.outputs[0]
    outputs, width = op.weight.shape
    x_bits, y_bits = w.bits(op.inputs[0], y)
    fields = (
        w.weights(op.weight.values, op.weight, y)
        + w.bias(op.bias, y)
        + w.rescale(op.rescale, _sums(op, op.weight.values, op.bias, x), y)
        + f"    .rows = {x.size // width}, .width = {width}, .outputs = {outputs},"
        f" .unpack_rows = {unpack_rows(op.weight)}, .x_bits = {x_bits}, .y_bits = {y_bits},\n"
        + _panels(w, op, outputs, width, x)
    )
    return _product(w, "matmul", op, fields)


def _accumulate(w: Writer, op: ops.Accumulate, tensors: dict[str, Tensor]) -> list[str]:
    outputs, width = op.weight.shape
    d_bits, y_bits = w.bits(op.inputs[1], op.outputs[0])
    d = tensors[op.inputs[1]]
    whole = op.weight.storage != GROUPS or _many_groups(op)  # a vector kernel may unpack them
    padded = -(-outputs // (4 * PANEL)) * 4 * PANEL
    fields = (
        w.weights(ops.weight_rows(op), op.weight, op.outputs[0])
        + f"    .width = {width}, .outputs = {outputs}, .d_bits = {d_bits}, .y_bits = {y_bits},\n"
        + w.prepared(op, width * padded if whole else 1, 1, max(outputs, 8 * (2 * width + 20)))
        + f"    KESTREL_CHANGES({_change_bytes(d)})\n"
    )
    pointers = (w.pointer(name) for name in (op.outputs[0], *op.inputs))
    return w.call("accumulate", "accumulate", op, fields, *pointers, w.scratch(op))


def _many_groups(op: ops.Accumulate) -> bool:
    """Whether groups are so many that vector kernels may take columns as a whole (sparse_enough of kestrel_sparse.h)."""
    layout = layout_of(ops.weight_rows(op), GROUPS)
    return 6 * layout.kept * layout.lanes >= op.weight.shape[0]


def _change_bytes(d: Tensor) -> int:
    """Field `change_bytes` for changes d."""
    low, high = INT8
    if 2 * low <= d.low and d.high <= 2 * high:
        return 1
    return 2 if 257 * low <= d.low and d.high <= 257 * high and d.bits <= 16 else 0


def _conv(w: Writer, op: ops.Conv2d, tensors: dict[str, Tensor]) -> list[str]:
    x, y = tensors[op.inputs[0]], op.outputs[0]
    flat = ops.weight_rows(op)
    x_bits, y_bits = w.bits(op.inputs[0], y)
    fields = (
        w.weights(flat, op.weight, y)
        + w.bias(op.bias, y)
        + w.rescale(op.rescale, _sums(op, flat, op.bias, x), y)
        + w.window(op.window, x.shape, tensors[y].shape)
        + f"    .outputs = {len(flat)}, .unpack_rows = {unpack_rows(op.weight)}, .x_bits = {x_bits},"
        f" .y_bits = {y_bits},\n" + _panels(w, op, len(flat), flat.shape[1], x)
    )
    return _product(w, "conv", op, fields)


def _depthwise(w: Writer, op: ops.DepthwiseConv2d, tensors: dict[str, Tensor]) -> list[str]:
    x, y = tensors[op.inputs[0]], op.outputs[0]
    flat = ops.weight_rows(op)  # [place, channel]
    channels = -(-flat.shape[1] // (4 * PANEL)) * 4 * PANEL
    x_bits, y_bits = w.bits(op.inputs[0], y)
    fields = (
        w.weights(flat, op.weight, y)
        + w.bias(op.bias, y)
        + w.rescale(op.rescale, _sums(op, flat.T, op.bias, x), y)
        + w.window(op.window, x.shape, tensors[y].shape)
        + f"    .x_bits = {x_bits}, .y_bits = {y_bits},\n"
        + w.prepared(op, (len(flat) + 1) // 2 * 4 * channels, channels, 2 * channels)
    )
    return _product(w, "depthwise", op, fields)


def _pool(w: Writer, op: ops.MaxPool | ops.SumPool, tensors: dict[str, Tensor]) -> list[str]:
    x, y = tensors[op.inputs[0]], op.outputs[0]
    count = math.prod(op.window.size)
    kind = "sum_pool" if isinstance(op, ops.SumPool) else "max_pool"
    rescale = op.rescale if isinstance(op, ops.SumPool) else None
    x_bits, y_bits = w.bits(op.inputs[0], y)
    fields = (
        w.rescale(rescale, (count * min(x.low, 0), count * max(x.high, 0)), y)
        + w.window(op.window, x.shape, tensors[y].shape)
        + f"    .x_bits = {x_bits}, .y_bits = {y_bits},\n"
    )
    return w.call(kind, "pool", op, fields, w.pointer(y), w.pointer(op.inputs[0]))


def _panels(w: Writer, op: Op, outputs: int, length: int, x: Tensor) -> str:
    """`prepared` of products [outputs, length]: int16 weights in panels, rows of int16."""
    row = 2 * (length + length % 2)
    padded = -(-outputs // (2 * PANEL)) * 2 * PANEL  # sums are rescaled two vectors at a time
    positive = "    KESTREL_POSITIVE\n" if x.low >= 0 else ""
    return w.prepared(op, padded * row, padded, ROWS * row) + positive


def _product(w: Writer, kind: str, op: Op, fields: str) -> list[str]:
    pointers = w.pointer(op.outputs[0]), w.pointer(op.inputs[0]), w.scratch(op)
    return w.call(kind, kind, op, fields, *pointers)


def _sums(op: Op, flat: np.ndarray, bias: Constant | None, x: Tensor) -> tuple[int, int]:
    """Bounds of the accumulators of a linear op."""
    return ops.sum_range(flat, None if bias is None else bias.values, x.low, x.high)


EMITTERS: dict[type[Op], Callable[..., list[str]]] = {
    ops.MatMul: _matmul,
    ops.Accumulate: _accumulate,
    ops.Conv2d: _conv,
    ops.DepthwiseConv2d: _depthwise,
    ops.MaxPool: _pool,
    ops.SumPool: _pool,
}
