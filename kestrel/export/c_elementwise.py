"""C source of ops that work element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from kestrel.export.c_text import listed, literal
from kestrel.export.c_writer import Writer, narrow
from kestrel.lower import ops
from kestrel.lower.ops import Op
from kestrel.lower.tensor import Tensor, storage_of

MAX_RANK = 6  # KESTREL_RANK


def _requantise(w: Writer, op: ops.Requantise, tensors: dict[str, Tensor]) -> list[str]:
    x, y = tensors[op.inputs[0]], op.outputs[0]
    channels = x.shape[-1] if max(len(op.rescale.multipliers), len(op.rescale.offsets)) > 1 else x.size
    x_bits, y_bits = w.bits(op.inputs[0], y)
    fields = w.rescale(op.rescale, (x.low, x.high), y) + (
        f"    .rows = {x.size // channels}, .channels = {channels}, .x_bits = {x_bits}, .y_bits = {y_bits},\n"
    )
    return w.call("requantise", "requantise", op, fields, w.pointer(y), w.pointer(op.inputs[0]))


def _add(w: Writer, op: ops.AddRequantise, tensors: dict[str, Tensor]) -> list[str]:
    y = op.outputs[0]
    multipliers = w.array(np.array(op.multipliers, np.int32), f"{y}, multipliers", "scaling")
    bits = w.array(np.array(w.bits(*op.inputs), np.uint8), f"{y}, bits", "scaling")
    sizes = zip((tensors[name].magnitude for name in op.inputs), op.multipliers, strict=True)
    reached = sum(size * abs(m) for size, m in sizes) + (1 << op.shift)
    fields = (
        f"    .multipliers = {multipliers}, .x_bits = {bits}, .inputs = {len(op.inputs)},"
        f" .size = {tensors[y].size},\n    .low = {literal(op.low)}, .high = {literal(op.high)},"
        f" .shift = {op.shift}, .y_bits = {w.place(y).bits}, .narrow = {narrow(reached, op.shift)},\n"
    )
    inputs = ", ".join(w.pointer(name) for name in op.inputs)
    return w.call("add", "add", op, fields, w.pointer(y), f"(const void *const[]){{{inputs}}}")


def _multiply(w: Writer, op: ops.Multiply, tensors: dict[str, Tensor]) -> list[str]:
    a, b = (tensors[name] for name in op.inputs)
    y = op.outputs[0]
    per_channel = op.rescale is not None and max(len(op.rescale.multipliers), len(op.rescale.offsets)) > 1
    shape, strides = _broadcast(a.shape, b.shape, per_channel)
    if len(shape) > MAX_RANK:
        raise op.problem(f"C code takes at most {MAX_RANK} dimensions")
    corners = [p * q for p in (a.low, a.high) for q in (b.low, b.high)]
    a_bits, b_bits, y_bits = w.bits(*op.inputs, y)
    fields = w.rescale(op.rescale, (min(corners), max(corners)), y) + (
        f"    .rank = {len(shape)}, .shape = {{{listed(shape)}}}, .b_stride = {{{listed(strides)}}},\n"
        f"    .a_bits = {a_bits}, .b_bits = {b_bits}, .y_bits = {y_bits},\n"
    )
    pointers = (w.pointer(name) for name in (y, *op.inputs))
    return w.call("multiply", "multiply", op, fields, *pointers)


def _broadcast(a: Sequence[int], b: Sequence[int], keep_last: bool) -> tuple[list[int], list[int]]:
    """Shape of a and strides of b with as few axes as possible; the last axis stays by itself with `keep_last`."""
    strides = [math.prod(b[axis + 1 :]) if b[axis] > 1 else 0 for axis in range(len(b))]
    shape: list[int] = []
    steps: list[int] = []
    for axis, (size, stride) in enumerate(zip(a, strides, strict=True)):
        last = axis == len(a) - 1 and keep_last
        if size == 1 and not last:
            continue
        if shape and not last and steps[-1] == stride * size:
            shape[-1], steps[-1] = shape[-1] * size, stride
        else:
            shape.append(size)
            steps.append(stride)
    return shape or [1], steps or [0]


def _lookup(w: Writer, op: ops.Lookup, tensors: dict[str, Tensor]) -> list[str]:
    y, x = op.outputs[0], op.inputs[0]
    x_bits, y_bits = w.bits(x, y)
    table = w.array(op.table.values.astype(f"int{y_bits}"), f"{y}, table", "tables")
    fields = (
        f"    .table = {table}, .first = {literal(op.first)}, .size = {tensors[y].size}, .x_bits = {x_bits},"
        f" .y_bits = {y_bits},\n"
    )
    return w.call("lookup", "lookup", op, fields, w.pointer(y), w.pointer(x))


def _interpolate(w: Writer, op: ops.Interpolate, tensors: dict[str, Tensor]) -> list[str]:
    y, x = op.outputs[0], op.inputs[0]
    x_bits, y_bits = w.bits(x, y)
    values = op.nodes.values.astype(storage_of(op.nodes.values))
    nodes = w.array(values, f"{y}, nodes", "tables")
    fields = (
        f"    .nodes = {nodes}, .first = {literal(op.first)}, .size = {tensors[y].size}, .low = {literal(op.low)},"
        f" .high = {literal(op.high)},\n    .step_bits = {op.step_bits}, .node_bits = {8 * values.itemsize},"
        f" .x_bits = {x_bits}, .y_bits = {y_bits},\n"
    )
    return w.call("interpolate", "interpolate", op, fields, w.pointer(y), w.pointer(x))


def _delta(w: Writer, op: ops.DeltaUpdate, tensors: dict[str, Tensor]) -> list[str]:
    x, ref, delta, following = w.bits(*op.inputs, *op.outputs)
    fields = (
        f"    .threshold = {op.threshold}, .size = {tensors[op.inputs[0]].size}, .x_bits = {x}, .ref_bits = {ref},"
        f" .delta_bits = {delta}, .next_bits = {following},\n"
    )
    pointers = (w.pointer(name) for name in (*op.outputs, *op.inputs))
    return w.call("delta", "delta", op, fields, *pointers)


EMITTERS: dict[type[Op], Callable[..., list[str]]] = {
    ops.Requantise: _requantise,
    ops.AddRequantise: _add,
    ops.Multiply: _multiply,
    ops.Lookup: _lookup,
    ops.Interpolate: _interpolate,
    ops.DeltaUpdate: _delta,
}
