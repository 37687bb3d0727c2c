"""A graph whose rescaling fits a small processor: int32 throughout, multipliers of three signed digits, offsets as biases."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from kestrel.digits import signed_digits
from kestrel.errors import KestrelError
from kestrel.lower.graph import IntegerGraph, Scan
from kestrel.lower.ops import AddRequantise, Conv2d, DepthwiseConv2d, MatMul, Multiply, Op, Requantise, SumPool
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale, few_digits

TERMS = 3  # signed digits of a multiplier
BITS = 12  # of the largest multiplier of an op, at most
LARGEST_EXPONENT = 15  # of a digit
_INT31 = (1 << 31) - 1

PRODUCTS = (MatMul, Conv2d, DepthwiseConv2d)


def narrow_form(graph: IntegerGraph) -> IntegerGraph:
    """`graph` with multipliers of at most TERMS signed digits below 2^16 and with accumulators, products and offsets in int32.

    Offsets of products become their bias, rounded to whole steps of the accumulator. The result is another integer model:
    score it. Raises KestrelError for recurrent networks and where 32 bits leave a multiplier too few digits.
    """
    found = IntegerGraph(notes={**graph.notes, "narrow_terms": TERMS})
    for name in graph.inputs:
        found.input(name, graph.tensors[name])
    for op in graph.ops:
        if isinstance(op, Scan):
            raise op.problem("a recurrent network has no narrow form")
        found.add(_narrow(op, [found.tensors[name] for name in op.inputs]))
    for name in graph.outputs:
        found.output(name)
    return found


def _narrow(op: Op, inputs: list[Tensor]) -> Op:
    if isinstance(op, AddRequantise):
        reach = sum(x.magnitude for x in inputs)
        multipliers, shift = few_bits([m * 2.0**-op.shift for m in op.multipliers], reach)
        op.check(any(multipliers) or not any(op.multipliers), "its multipliers do not fit 32 bits")
        return dataclasses.replace(op, multipliers=tuple(multipliers), shift=shift)
    rescale = getattr(op, "rescale", None)
    if rescale is None:
        return op
    if isinstance(op, PRODUCTS):
        return _product(op, inputs[0], rescale)
    if isinstance(op, SumPool):
        reach = inputs[0].magnitude * math.prod(op.window.size)
    elif isinstance(op, Multiply):
        reach = inputs[0].magnitude * inputs[1].magnitude
    else:
        assert isinstance(op, Requantise)
        reach = inputs[0].magnitude
    ratios = [m * 2.0**-rescale.shift for m in rescale.multipliers]
    offsets = [o * 2.0**-rescale.shift for o in rescale.offsets]
    multipliers, shift = few_bits(ratios, reach, max(abs(o) for o in offsets))
    changed = Rescale(
        tuple(multipliers), shift, rescale.low, rescale.high, tuple(round(math.ldexp(o, shift)) for o in offsets)
    )
    return dataclasses.replace(op, rescale=changed)


def _product(op: MatMul | Conv2d | DepthwiseConv2d, x: Tensor, rescale: Rescale) -> Op:
    """Offsets join the bias: an accumulator's step is far below one of the output's."""
    values = op.weight.values
    rows = (
        values.reshape(-1, values.shape[-1]).T if isinstance(op, DepthwiseConv2d) else values.reshape(len(values), -1)
    )
    outputs = len(rows)
    multipliers = np.broadcast_to(np.array(rescale.multipliers, np.float64), outputs)
    offsets = np.broadcast_to(np.array(rescale.offsets, np.float64), outputs)
    bias = np.zeros(outputs) if op.bias is None else op.bias.values.astype(np.float64)
    bias = bias + np.divide(offsets, multipliers, out=np.zeros(outputs), where=multipliers != 0)
    if np.abs(bias).max() > 1 << 28:
        raise op.problem("an offset does not fit a narrow bias")
    biases = np.rint(bias).astype(np.int64)
    reach = int((np.abs(rows).sum(axis=1) * x.magnitude + np.abs(biases)).max())
    narrow, shift = few_bits((multipliers * 2.0**-rescale.shift).tolist(), reach)
    # A channel whose multiplier is 0 gives its offset whatever it reads.
    rest = [
        round(math.ldexp(o, shift - rescale.shift)) if m == 0 else 0 for m, o in zip(multipliers, offsets, strict=True)
    ]
    changed = Rescale(tuple(narrow), shift, rescale.low, rescale.high, tuple(rest) if any(rest) else (0,))
    held = Constant.of(biases) if biases.any() else None
    return dataclasses.replace(op, rescale=changed, bias=held)


def few_bits(ratios: list[float], reach: int, offset: float = 0.0) -> tuple[list[int], int]:
    """Multipliers of TERMS digits and one shift: m / 2^shift is near each ratio, and x m + offset 2^shift fits int32 for |x| <= reach.

    The largest multiplier has up to BITS bits, fewer where 32 bits would not hold its products. Raises KestrelError where a
    digit is left with none.
    """
    largest = max(abs(ratio) for ratio in ratios)
    if largest == 0:
        return [0] * len(ratios), 0
    for bits in range(BITS, 0, -1):
        shift = bits - math.frexp(largest)[1]
        if shift < 0:
            continue
        found = [few_digits(round(math.ldexp(ratio, shift)), TERMS) for ratio in ratios]
        exponents = [digit[1] for m in found for digit in signed_digits(m)]
        most = max(abs(m) for m in found) * reach + math.ldexp(offset, shift) + (1 << shift)
        # Digits are added one by one: no partial sum may leave int32 either.
        if 2 * most < _INT31 and max(exponents, default=0) < LARGEST_EXPONENT and shift < 31:
            while shift > 0 and not any(m & 1 for m in found) and offset == 0:
                found, shift = [m // 2 for m in found], shift - 1
            return found, shift
    if math.frexp(largest)[1] > BITS:
        raise KestrelError(f"a factor of {largest:g} has no narrow form")
    raise KestrelError(f"inputs of up to {reach} leave a multiplier no digits in 32 bits: use fewer bits")
