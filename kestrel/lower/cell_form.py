"""Which codes a recurrent layer computes with, and the tables of its non-linearities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from kestrel.lower.ops import Interpolate, Lookup, Op
from kestrel.lower.tensor import Constant
from kestrel.lower.value import Grid
from kestrel.nn.delta_fixed import Fixed, Numerics
from kestrel.quant.integer import Segments, segments_of, symmetric, table_of, twos_complement

Curve = Literal["sigmoid", "tanh"]
H_STEP, GATE_STEP, PRE_STEP, C_STEP = 2.0**-7, 2.0**-15, 2.0**-11, 2.0**-11
_INT16 = twos_complement(16)
_SEGMENT_BITS = 6  # 2^10 segments over 16-bit inputs
_TABLE_BITS = 10  # inputs of more bits are interpolated between 2^_TABLE_BITS nodes


@dataclass(frozen=True)
class CellForm:
    """Codes inside a recurrent layer.

    `products`: products W v + b before they are added, None = exact int32 (weights and inputs then have one step each).
    `pre`: pre-activations. `gate`: results of sigmoid and tanh. `numerics`: the kind of these, and in fixed point what
    is rounded where; then the two terms of a GRU's new state are rounded one by one.
    """

    hidden: Grid
    products: Grid | None
    pre: Grid
    gate: Grid
    cell: Grid
    numerics: Numerics = Numerics()

    @property
    def fixed(self) -> bool:
        """Whether signals are those of training in fixed point."""
        return self.numerics.activation is not None

    def curve(self, kind: Curve, x: str, y: str, source: Grid) -> Op:
        """The op y = kind(x) of codes of `source`: a table, or straight lines for codes of many bits."""
        limits = (0 if kind == "sigmoid" else self.gate.low, self.gate.high)
        bits = max(source.high, -source.low).bit_length() + 1
        if self.numerics.gate is not None and bits <= _TABLE_BITS:
            table = table_of(self._exact(kind, source, self.numerics.gate), *source.limits)
            return Lookup(inputs=(x,), outputs=(y,), table=Constant.of(table), first=source.low, scale=self.gate.step)
        step_bits = _SEGMENT_BITS if not self.fixed else max(bits - _TABLE_BITS, 1)
        segments, nodes = _segments(self.numerics, kind, source, self.gate, limits, step_bits)
        return Interpolate(
            inputs=(x,),
            outputs=(y,),
            nodes=nodes,
            first=segments.first,
            step_bits=segments.step_bits,
            low=segments.low,
            high=segments.high,
            scale=self.gate.step,
            error=segments.error,
        )

    def _exact(self, kind: Curve, source: Grid, form: Fixed) -> Callable[[np.ndarray], np.ndarray]:
        """Codes of what training computes."""
        function = self.numerics.sigmoid if kind == "sigmoid" else self.numerics.tanh

        def codes(inputs: np.ndarray) -> np.ndarray:
            levels = form.levels(function(torch.from_numpy(inputs).float() * source.step))
            return np.rint(levels.double().numpy() / form.step).astype(np.int64)

        return codes


@cache
def _segments(
    numerics: Numerics, kind: Curve, source: Grid, target: Grid, limits: tuple[int, int], step_bits: int
) -> tuple[Segments, Constant]:
    """The lines of a function, and their nodes as one constant for all users of the table."""
    hard = numerics.hard_sigmoid if kind == "sigmoid" else numerics.hard_tanh

    def real(codes: np.ndarray) -> np.ndarray:
        x = codes * source.step
        if hard:  # clamped behind the lines, so its corners are exact
            y = 0.25 * x + 0.5 if kind == "sigmoid" else x
        else:
            y = 1 / (1 + np.exp(-x)) if kind == "sigmoid" else np.tanh(x)
        y = y / target.step - (0.5 if target.down else 0.0)
        return y if hard else np.clip(y, *limits)  # 1 itself may take a bit more

    made = segments_of(real, source.limits, limits, step_bits)
    return made, Constant.of(made.nodes)


def _fixed_grid(form: Fixed) -> Grid:
    return Grid(form.step, *form.limits, form.rounding == "floor")


def float_form(hidden: Grid | None = None, numerics: Numerics | None = None) -> CellForm:
    """Codes for layers that were trained in floating point."""
    wide = Grid(PRE_STEP, *_INT16)
    return CellForm(
        hidden=hidden or Grid(H_STEP, *symmetric(8)),
        products=wide,
        pre=wide,
        gate=Grid(GATE_STEP, *symmetric(16)),
        cell=Grid(C_STEP, *_INT16),
        numerics=numerics or Numerics(),
    )


def fixed_form(numerics: Numerics) -> CellForm:
    """The codes of training in fixed point; products are exact where weights are in fixed point too."""
    assert numerics.activation is not None and numerics.gate is not None
    signal = _fixed_grid(numerics.activation)
    return CellForm(
        hidden=signal,
        products=None if numerics.weight is not None else Grid(PRE_STEP, *_INT16),
        pre=signal,
        gate=_fixed_grid(numerics.gate),
        cell=signal,
        numerics=numerics,
    )
