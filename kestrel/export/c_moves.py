"""C source of ops that move values or find one."""

from __future__ import annotations

import math
from collections.abc import Callable

from kestrel.export.c_elementwise import MAX_RANK
from kestrel.export.c_text import c_type, listed
from kestrel.export.c_writer import Writer
from kestrel.lower import ops
from kestrel.lower.ops import Op
from kestrel.lower.tensor import Tensor


def _upsample(w: Writer, op: ops.Upsample, tensors: dict[str, Tensor]) -> list[str]:
    height, width, channels = tensors[op.inputs[0]].shape
    fields = (
        f"    .height = {height}, .width = {width}, .channels = {channels}, .factor_y = {op.factor[0]},"
        f" .factor_x = {op.factor[1]}, .bits = {w.place(op.inputs[0]).bits},\n"
    )
    _same_bits(w, op)
    return w.call("upsample", "upsample", op, fields, w.pointer(op.outputs[0]), w.pointer(op.inputs[0]))


def _concat(w: Writer, op: ops.Concat, tensors: dict[str, Tensor]) -> list[str]:
    y = op.outputs[0]
    shape = tensors[y].shape
    outer, row, at = math.prod(shape[: op.axis]), math.prod(shape[op.axis :]), 0
    lines = []
    for place, name in enumerate(op.inputs):
        inner = tensors[name].size // outer
        x_bits, y_bits = w.bits(name, y)
        fields = w.copy(outer, inner, inner, row, x_bits, y_bits)
        descriptor = w.constant(f"{y}, part {place}", "kestrel_copy_op", fields)
        target = f"AT({w.place(y).offset + at * y_bits // 8})"
        lines.append(f"kestrel_copy(&{descriptor}, {target}, {w.pointer(name)});")
        at += inner
    return lines


def _slice(w: Writer, op: ops.Slice, tensors: dict[str, Tensor]) -> list[str]:
    shape, y = tensors[op.inputs[0]].shape, op.outputs[0]
    outer, rest = math.prod(shape[: op.axis]), math.prod(shape[op.axis + 1 :])
    x_bits, y_bits = w.bits(op.inputs[0], y)
    fields = w.copy(outer, (op.stop - op.start) * rest, shape[op.axis] * rest, (op.stop - op.start) * rest,
                        x_bits, y_bits)  # fmt: skip
    source = f"PART({w.pointer(op.inputs[0])}, {op.start * rest * x_bits // 8})"
    return w.call("copy", "copy", op, fields, w.pointer(y), source)


def _transpose(w: Writer, op: ops.Transpose, tensors: dict[str, Tensor]) -> list[str]:
    shape = tensors[op.inputs[0]].shape
    if len(shape) > MAX_RANK:
        raise op.problem(f"C code takes at most {MAX_RANK} dimensions")
    _same_bits(w, op)
    strides = [math.prod(shape[axis + 1 :]) for axis in op.axes]
    fields = (
        f"    .rank = {len(shape)}, .shape = {{{listed(tensors[op.outputs[0]].shape)}}},"
        f" .x_stride = {{{listed(strides)}}}, .bits = {w.place(op.inputs[0]).bits},\n"
    )
    return w.call("transpose", "transpose", op, fields, w.pointer(op.outputs[0]), w.pointer(op.inputs[0]))


def _argmax(w: Writer, op: ops.ArgMax, tensors: dict[str, Tensor]) -> list[str]:
    x, y = op.inputs[0], op.outputs[0]
    bits = w.place(y).bits
    value = f"kestrel_argmax({w.pointer(x)}, {w.place(x).bits}, {tensors[x].size})"
    return [f"*({c_type(bits)} *){w.pointer(y)} = ({c_type(bits)}){value};"]


def _same_bits(w: Writer, op: Op) -> None:
    """Kernels that only move values do not change their width."""
    if len(set(w.bits(*op.inputs, *op.outputs))) > 1:
        raise op.problem("C code needs the features rescaled before they are moved")


EMITTERS: dict[type[Op], Callable[..., list[str]]] = {
    ops.Upsample: _upsample,
    ops.Concat: _concat,
    ops.Slice: _slice,
    ops.Transpose: _transpose,
    ops.ArgMax: _argmax,
}
