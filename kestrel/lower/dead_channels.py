"""Channels whose weights are all zero, as pruning by channel leaves them: taken out of the graph, with the same answers.

Such a channel is a constant. Through ops that keep channels apart it stays one; the product that reads it gets the
constant's share as a bias, exactly, and loses the channel's weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kestrel.lower.graph import IntegerGraph, Scan
from kestrel.lower.ops import Concat, Conv2d, DepthwiseConv2d, MatMul, MaxPool, Op, Requantise, Reshape, SumPool
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale

Array = np.ndarray
_APART = (Requantise, MaxPool, SumPool, DepthwiseConv2d)  # ops whose channels do not meet


def without_dead_channels(graph: IntegerGraph) -> IntegerGraph:
    """`graph` without the channels of convolutions and dense layers that are constant; itself where there are none."""
    if any(isinstance(op, Scan) for op in graph.ops):
        return graph
    changed: dict[str, Op] = {}  # by first output
    for op in graph.ops:
        maker = changed.get(op.outputs[0], op)
        if isinstance(maker, (Conv2d, MatMul)) and maker.rescale is not None:
            _remove(graph, maker, changed)
    if not changed:
        return graph
    found = IntegerGraph(notes=dict(graph.notes))
    for name in graph.inputs:
        found.input(name, graph.tensors[name])
    for op in graph.ops:
        found.add(changed.get(op.outputs[0], op))
    for name in graph.outputs:
        found.output(name)
    return found


def _remove(graph: IntegerGraph, maker: Conv2d | MatMul, changed: dict[str, Op]) -> None:
    """Put `maker` without its dead channels, and the ops up to the product that reads them, into `changed`."""
    rows = maker.weight.values.reshape(len(maker.weight.values), -1)
    dead = ~rows.any(axis=1)
    chain = _chain(graph, maker, changed)
    if not dead.any() or dead.all() or chain is None:
        return
    assert maker.rescale is not None
    bias = np.zeros(len(rows), np.int64) if maker.bias is None else maker.bias.values
    value = maker.rescale.apply(bias.copy()[None])[0]  # of a dead channel
    keep: Array = np.logical_not(dead)
    whole_keep = keep
    *between, reader = chain
    for op in between:
        if isinstance(op, Concat):  # copies side by side
            value, keep = np.tile(value, len(op.inputs)), np.tile(keep, len(op.inputs))
        elif not isinstance(op, Reshape):
            value = _constant(op, value, graph.tensors[op.inputs[0]])
        changed[op.outputs[0]] = _kept(op, keep)
    assert isinstance(reader, (Conv2d, MatMul))
    weight = reader.weight.values
    share = (weight[..., ~keep] * value[~keep]).reshape(len(weight), -1).sum(axis=1)
    whole = share if reader.bias is None else share + reader.bias.values
    left = Constant(weight[..., keep], reader.weight.storage)
    reader_bias = Constant.of(whole, 32) if whole.any() else None
    changed[reader.outputs[0]] = dataclasses.replace(reader, weight=left, bias=reader_bias)
    changed[maker.outputs[0]] = _kept(maker, whole_keep)


def _chain(graph: IntegerGraph, maker: Op, changed: dict[str, Op]) -> list[Op] | None:
    """The ops behind `maker`, each the only reader of the one before, to a product without padding; None = there is none."""
    found: list[Op] = []
    name = maker.outputs[0]
    while name not in graph.outputs:
        readers = [op for op in graph.ops if name in op.inputs]
        if len(readers) != 1:
            return None
        op = changed.get(readers[0].outputs[0], readers[0])
        window = getattr(op, "window", None)
        if window is not None and any((*window.before, *window.after)):
            return None
        found.append(op)
        if isinstance(op, (Conv2d, MatMul)):
            return found
        if not isinstance(op, _APART) and not _keeps_channels(graph, op):
            return None
        name = op.outputs[0]
    return None


def _keeps_channels(graph: IntegerGraph, op: Op) -> bool:
    """Whether `op` moves whole channels: a reshape that leaves the last axis, or copies of one tensor along it."""
    x = graph.tensors[op.inputs[0]]
    if isinstance(op, Reshape):
        return op.shape[-1] == x.shape[-1]
    return isinstance(op, Concat) and len(set(op.inputs)) == 1 and op.axis == len(x.shape) - 1


def _constant(op: Op, value: Array, x: Tensor) -> Array:
    """What `op` makes of an image whose channels are the constants `value` [C]: constants again."""
    image = np.broadcast_to(value, (1, *x.shape)).astype(np.int64)
    return op.run(image)[0].reshape(-1, len(value))[0]


def _kept(op: Op, keep: Array) -> Op:
    """`op` with the channels `keep` of its result alone."""
    parts: dict[str, object] = {}
    rescale: Rescale | None = getattr(op, "rescale", None)
    if rescale is not None:
        places = np.flatnonzero(keep)
        multipliers, offsets = (
            values if len(values) == 1 else tuple(values[place] for place in places)
            for values in (rescale.multipliers, rescale.offsets)
        )
        parts["rescale"] = dataclasses.replace(rescale, multipliers=multipliers, offsets=offsets)
    if isinstance(op, Reshape):
        parts["shape"] = (*op.shape[:-1], int(keep.sum()))
    weight: Constant | None = getattr(op, "weight", None)
    if weight is not None:
        values = weight.values[..., keep] if isinstance(op, DepthwiseConv2d) else weight.values[keep]
        parts["weight"] = Constant(values, weight.storage)
        bias: Constant | None = getattr(op, "bias", None)
        if bias is not None:
            parts["bias"] = Constant(bias.values[keep], bias.storage)
    return dataclasses.replace(op, **parts)  # type: ignore[arg-type]
