"""A graph whose rescaling needs no multiplier: every one becomes a sum of few signed powers of two."""

from __future__ import annotations

import dataclasses

import numpy as np

from kestrel.errors import UsageError
from kestrel.lower.graph import IntegerGraph, Program, Scan
from kestrel.lower.ops import AddRequantise, Op
from kestrel.quant.integer import MULTIPLIER_BITS, Rescale, few_digits, rounding_shift


def shift_add_form(graph: IntegerGraph, terms: int) -> IntegerGraph:
    """`graph` with multipliers of at most `terms` signed powers of two each, relative error <= 3^-terms + 2^-29.

    Products of two signals (gates) and with weights stay as they are. The result is another integer model: score it.
    """
    if terms < 1:
        raise UsageError(f"terms: {terms} is out of bounds (>= 1)")
    found = IntegerGraph(notes={**graph.notes, "shift_add_terms": terms})
    _fill(found, graph, terms)
    for name in graph.outputs:
        found.output(name)
    return found


def _fill(target: Program, source: Program, terms: int) -> None:
    for name in source.inputs:
        target.input(name, source.tensors[name])
    for op in source.ops:
        target.add(_changed(op, terms))


def _changed(op: Op, terms: int) -> Op:
    if isinstance(op, Scan):
        body = Program()
        _fill(body, op.body, terms)
        return dataclasses.replace(op, body=body)
    if isinstance(op, AddRequantise):
        multipliers, shift, _ = _few(op.multipliers, op.shift, (0,), terms)
        return dataclasses.replace(op, multipliers=multipliers, shift=shift)
    rescale = getattr(op, "rescale", None)
    if not isinstance(rescale, Rescale):
        return op
    multipliers, shift, offsets = _few(rescale.multipliers, rescale.shift, rescale.offsets, terms)
    changed = dataclasses.replace(rescale, multipliers=multipliers, shift=shift, offsets=offsets)
    return dataclasses.replace(op, rescale=changed)  # type: ignore[call-arg]


def _few(
    multipliers: tuple[int, ...], shift: int, offsets: tuple[int, ...], terms: int
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    if shift > 0 and max(abs(m) for m in multipliers) > 3 << (MULTIPLIER_BITS - 2):
        # The nearest power of two would be 2^31, which an int32 does not hold.
        multipliers, offsets = _halved(multipliers), _halved(offsets)
        shift -= 1
    return tuple(few_digits(m, terms) for m in multipliers), shift, offsets


def _halved(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(rounding_shift(np.array(values), 1).tolist())
