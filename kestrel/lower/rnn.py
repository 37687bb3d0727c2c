"""Recurrent layers in integers: torch.nn.LSTM and GRU and delta networks, dense or with delta updates.

`CellForm` says which codes a layer computes with. Without another one, inputs and hidden states are int8, weights have a
scale per output, gate pre-activations are int16 codes of 2^-11, gates int16 codes of 2^-15 from piecewise linear tables,
cell states int16 codes of 2^-11. Products inside a state update are exact int32 and added with a single rounding. In
fixed point (kestrel.nn.delta_fixed) sums are exact up to the place where training rounds them.

With delta updates a product W v_t becomes memories m += W d, where d are the elements of v that moved by their
threshold or more since they were last transmitted (Neil et al. 2017). m is exact, so thresholds of 0 give the bits of
the dense network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from kestrel.errors import KestrelError
from kestrel.lower.cell_form import GATE_STEP, H_STEP, CellForm, Curve, float_form
from kestrel.lower.graph import Program, Scan, State
from kestrel.lower.ops import (
    Accumulate,
    AddRequantise,
    DeltaUpdate,
    MatMul,
    Multiply,
    Requantise,
    Slice,
    sum_range,
)
from kestrel.lower.tensor import Constant, Tensor
from kestrel.lower.value import Grid, Value, on_grid
from kestrel.nn.delta_cell import Kind
from kestrel.quant.integer import INT32, Rescale, from_reals
from kestrel.quant.packing import WeightCodes, encode

__all__ = ["GATE_STEP", "H_STEP", "LayerWeights", "Thresholds", "lower_layer", "lower_rnn"]


@dataclass(frozen=True)
class Thresholds:
    """Smallest transmitted change of inputs and of hidden states, as real numbers; None = all are multiplied anew."""

    x: float | None
    h: float | None


@dataclass(frozen=True)
class LayerWeights:
    """Weights [G H, I] and [G H, H] as codes; biases [G H] as real numbers."""

    w_ih: WeightCodes
    w_hh: WeightCodes
    b_ih: np.ndarray
    b_hh: np.ndarray


@dataclass
class _Layer:
    """One layer of a recurrent network inside the body of its scan."""

    weights: LayerWeights
    prefix: str
    form: CellForm
    body: Program = field(default_factory=Program)
    states: list[State] = field(default_factory=list)

    @property
    def hidden(self) -> int:
        """Units."""
        return self.weights.w_hh.codes.shape[1]

    def name(self, part: str) -> str:
        return f"{self.prefix}.{part}"

    def state(self, part: str, grid: Grid, next_part: str, size: int | None = None) -> str:
        """Declare a state that continues with tensor `next_part`."""
        tensor = Tensor((size or self.hidden,), *grid.limits, grid.step)
        self.body.input(self.name(part), tensor)
        self.states.append(State(self.name(part), self.name(next_part), tensor))
        return self.name(part)

    def product(self, x: str, step: float, part: str, threshold: float | None) -> Value:
        """W x + b, as codes of `form.products` or as exact int32; `part` is ih or hh."""
        codes: WeightCodes = getattr(self.weights, f"w_{part}")
        bias: np.ndarray = getattr(self.weights, f"b_{part}")
        weight = Constant.of(codes.codes.astype(np.int64), codes.bits)
        steps = codes.scale.astype(np.float64) * step
        target, name = self.form.products, self.name(f"p_{part}")
        rescale = None if target is None else target.rescale(steps.tolist(), bias.tolist())
        made = float(steps[0]) if target is None else target.step
        start = None if target is not None else np.rint(bias / made).astype(np.int64)  # whole numbers but for float32
        if threshold is None:
            constant = None if start is None else Constant.of(start, 32)
            op = MatMul(inputs=(x,), outputs=(name,), weight=weight, bias=constant, rescale=rescale, scale=made)
            return Value(self.body.add(op), made)
        source = self.body.tensors[x]
        sent, delta, memory = f"{part}.sent", f"{part}.delta", f"{part}.memory"
        limits = (min(source.low, 0), max(source.high, 0))
        self.state(sent, Grid(step, *limits), f"{sent}.next", source.size)
        low, high = sum_range(weight.values, None, *limits)
        if start is not None:
            low, high = low + min(int(start.min()), 0), high + max(int(start.max()), 0)
        tensor = Tensor((len(weight.values),), low, high, made if target is None else None)
        self.body.input(self.name(memory), tensor)
        initial = None if start is None or not start.any() else Constant.of(start, 32)
        self.states.append(State(self.name(memory), self.name(f"{memory}.next"), tensor, initial))
        outputs = (self.name(delta), self.name(f"{sent}.next"))
        self.body.add(DeltaUpdate(inputs=(x, self.name(sent)), outputs=outputs, threshold=round(threshold / step)))
        inputs = (self.name(memory), self.name(delta))
        total = self.body.add(Accumulate(inputs=inputs, outputs=(self.name(f"{memory}.next"),), weight=weight))
        if rescale is None:
            return Value(total, made)
        op_ = Requantise(inputs=(total,), outputs=(name,), rescale=rescale, scale=made)
        return Value(self.body.add(op_), made)

    def cut(self, x: Value, part: str, place: int) -> Value:
        """Piece `place` of the gates in `x`."""
        start = place * self.hidden
        op = Slice(inputs=(x.name,), outputs=(self.name(part),), start=start, stop=start + self.hidden)
        return Value(self.body.add(op), x.step)

    def add(self, parts: Sequence[Value], part: str, grid: Grid) -> Value:
        """Sum of values, one rounding."""
        name, inputs = self.name(part), tuple(value.name for value in parts)
        if grid.down:
            finest = min(value.step for value in parts)
            whole = [value.step / finest for value in parts]
            reach = sum(self.body.tensors[v.name].magnitude * m for v, m in zip(parts, whole, strict=True))
            if any(m != int(m) for m in whole) or reach > INT32[1]:
                raise KestrelError(
                    f"a sum in {self.prefix} takes more than 32 bits: choose narrower fixed-point formats"
                )
            multipliers = tuple(int(m) for m in whole)
            exact = AddRequantise(
                inputs=inputs, outputs=(f"{name}.sum",), multipliers=multipliers, shift=0, low=INT32[0], high=INT32[1]
            )
            return on_grid(self.body, Value(self.body.add(exact), finest), grid, name)
        factors, shift = from_reals([value.step / grid.step for value in parts])
        op = AddRequantise(
            inputs=inputs,
            outputs=(name,),
            multipliers=tuple(factors),
            shift=shift,
            low=grid.low,
            high=grid.high,
            scale=grid.step,
        )
        return Value(self.body.add(op), grid.step)

    def times(self, a: Value, b: Value, part: str, grid: Grid | None = None) -> Value:
        """Product of two values, exact or on a grid."""
        exact = a.step * b.step
        step, rescale = (exact, None) if grid is None else (grid.step, grid.rescale(exact))
        op = Multiply(inputs=(a.name, b.name), outputs=(self.name(part),), rescale=rescale, scale=step)
        return Value(self.body.add(op), step)

    def curve(self, kind: Curve, x: Value, part: str, source: Grid) -> Value:
        """Sigmoid or tanh of codes of `source`."""
        return Value(self.body.add(self.form.curve(kind, x.name, self.name(part), source)), self.form.gate.step)


def lower_rnn(
    program: Program,
    x: Value,
    rnn: nn.LSTM | nn.GRU,
    name: str,
    weight_bits: int = 8,
    thresholds: Thresholds | None = None,
) -> Value:
    """Add `rnn`, applied to int8 codes x [T, I], to `program`; returns the hidden states [T, H] of the last layer.

    `thresholds` switches delta updates on. Raises KestrelError for forms without integers.
    """
    kind: Kind = "LSTM" if isinstance(rnn, nn.LSTM) else "GRU"
    if rnn.bidirectional:
        raise KestrelError(
            f"a bidirectional {kind} has no integer form: it cannot run frame by frame; use one direction"
        )
    if not rnn.batch_first:
        raise KestrelError(f"{kind} {name!r} is lowered for [batch, time, features]: set batch_first=True")
    if getattr(rnn, "proj_size", 0):
        raise KestrelError(f"{kind} {name!r} has no integer form with projections: set proj_size=0")

    def array(part: str, index: int) -> np.ndarray:
        tensor = getattr(rnn, f"{part}_l{index}", None)
        if tensor is None:  # a network without biases
            return np.zeros(getattr(rnn, f"weight_ih_l{index}").shape[0])
        return tensor.detach().double().cpu().numpy()

    for index in range(rnn.num_layers):
        w_ih, w_hh = (encode(array(part, index), weight_bits) for part in ("weight_ih", "weight_hh"))
        weights = LayerWeights(w_ih, w_hh, array("bias_ih", index), array("bias_hh", index))
        prefix = name if rnn.num_layers == 1 else f"{name}.{index}"
        x = lower_layer(program, x, kind, weights, prefix, float_form(), thresholds)
    return x


def lower_layer(
    program: Program,
    x: Value,
    kind: Kind,
    weights: LayerWeights,
    prefix: str,
    form: CellForm,
    thresholds: Thresholds | None = None,
) -> Value:
    """Add one layer, applied to codes x [T, I], to `program`; returns its hidden states [T, H]."""
    layer = _Layer(weights, prefix, form)
    source = program.tensors[x.name]
    step = Value(layer.body.input(f"{prefix}.x", Tensor(source.shape[1:], source.low, source.high, x.step)), x.step)
    made = (_lstm_step if kind == "LSTM" else _gru_step)(layer, step, thresholds or Thresholds(None, None))
    scan = Scan(
        inputs=(x.name,),
        outputs=(f"{prefix}.sequence",),
        body=layer.body,
        steps=(step.name,),
        states=tuple(layer.states),
        emitted=(made.name,),
    )
    return Value(program.add(scan), made.step)


def _lstm_step(layer: _Layer, x: Value, thresholds: Thresholds) -> Value:
    """i, f, g, o = W_ih x + b_ih + W_hh h + b_hh; c' = f c + i g; h' = o tanh c'."""
    form = layer.form
    h = layer.state("h", form.hidden, "h.next")
    c = Value(layer.state("c", form.cell, "c.next"), form.cell.step)
    p_x = layer.product(x.name, x.step, "ih", thresholds.x)
    p_h = layer.product(h, form.hidden.step, "hh", thresholds.h)
    gates = layer.add([p_x, p_h], "gates", form.pre)
    i, f, g, o = (
        layer.curve("tanh" if part == "g" else "sigmoid", layer.cut(gates, f"{part}.in", place), part, form.pre)
        for place, part in enumerate("ifgo")
    )
    kept, new = layer.times(c, f, "kept"), layer.times(i, g, "new")
    c_next = layer.add([kept, new], "c.next", form.cell)
    shown = layer.curve("tanh", c_next, "shown", form.cell)
    return layer.times(o, shown, "h.next", form.hidden)


def _gru_step(layer: _Layer, x: Value, thresholds: Thresholds) -> Value:
    """r, z as usual; n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""
    form = layer.form
    h = Value(layer.state("h", form.hidden, "h.next"), form.hidden.step)
    p_x = layer.product(x.name, x.step, "ih", thresholds.x)
    p_h = layer.product(h.name, h.step, "hh", thresholds.h)
    gates = {}
    for place, part in enumerate("rz"):
        pieces = [layer.cut(p, f"{part}.{side}", place) for p, side in ((p_x, "ih"), (p_h, "hh"))]
        gates[part] = layer.curve("sigmoid", layer.add(pieces, f"{part}.in", form.pre), part, form.pre)
    n_x, n_h = layer.cut(p_x, "n.ih", 2), layer.cut(p_h, "n.hh", 2)
    n_h = on_grid(layer.body, n_h, form.pre, layer.name("n.hh.pre"))
    reset = layer.times(gates["r"], n_h, "reset")
    n = layer.curve("tanh", layer.add([n_x, reset], "n.in", form.pre), "n", form.pre)
    unit = round(1 / form.gate.step)
    limits = (min(unit - form.gate.high, 0), unit if form.fixed else form.gate.high)  # 1 itself takes a bit more
    rest = Rescale((-1,), 0, *limits, (unit,))  # 1 - z
    op = Requantise(inputs=(gates["z"].name,), outputs=(layer.name("1-z"),), rescale=rest, scale=form.gate.step)
    rounded = form.hidden if form.fixed else None
    new = layer.times(Value(layer.body.add(op), form.gate.step), n, "new", rounded)
    kept = layer.times(gates["z"], h, "kept", rounded)
    return layer.add([new, kept], "h.next", form.hidden)
