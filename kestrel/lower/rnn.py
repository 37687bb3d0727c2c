"""torch.nn.LSTM and GRU in integers, dense or with delta updates.

Inputs and hidden states are int8, weights have a scale per output, gate pre-activations are int16 codes of 2^-11, gates
int16 codes of 2^-15 from piecewise linear tables, cell states int16 codes of 2^-11. Products inside a state update are
exact int32 and added with a single rounding.

With delta updates a product W v_t becomes memories m += W d, where d are the elements of v that moved by their
threshold or more since they were last transmitted (Neil et al. 2017). m is exact, so thresholds of 0 give the bits of
the dense network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from kestrel.errors import KestrelError
from kestrel.lower.graph import Program, Scan, State
from kestrel.lower.ops import (
    Accumulate,
    AddRequantise,
    DeltaUpdate,
    Interpolate,
    MatMul,
    Multiply,
    Requantise,
    Slice,
    sum_range,
)
from kestrel.lower.tensor import Constant, Tensor
from kestrel.lower.value import Value
from kestrel.quant.integer import Rescale, Segments, from_reals, segments_of, symmetric, twos_complement
from kestrel.quant.packing import encode

H_STEP, GATE_STEP, PRE_STEP, C_STEP = 2.0**-7, 2.0**-15, 2.0**-11, 2.0**-11
_INT16 = twos_complement(16)
_INT8 = symmetric(8)
_UNIT = (0, (1 << 15) - 1)  # sigmoid codes of GATE_STEP
_SEGMENT_BITS = 6  # 2^10 segments over 16-bit inputs


@dataclass(frozen=True)
class Thresholds:
    """Smallest transmitted change of inputs and of hidden states, as real numbers."""

    x: float
    h: float


@dataclass
class _Layer:
    """One layer of a recurrent network inside the body of its scan."""

    rnn: nn.LSTM | nn.GRU
    index: int
    prefix: str
    weight_bits: int
    body: Program = field(default_factory=Program)
    states: list[State] = field(default_factory=list)

    def name(self, part: str) -> str:
        return f"{self.prefix}.{part}"

    def _array(self, part: str) -> np.ndarray:
        tensor = getattr(self.rnn, f"{part}_l{self.index}", None)
        if tensor is None:  # a network without biases
            return np.zeros(getattr(self.rnn, f"weight_ih_l{self.index}").shape[0])
        return tensor.detach().double().cpu().numpy()

    def state(self, part: str, limits: tuple[int, int], step: float, next_part: str, size: int | None = None) -> str:
        """Declare a state that continues with tensor `next_part`."""
        tensor = Tensor((size or self.rnn.hidden_size,), *limits, step)
        self.body.input(self.name(part), tensor)
        self.states.append(State(self.name(part), self.name(next_part), tensor))
        return self.name(part)

    def product(self, x: str, step: float, part: str, bias: np.ndarray, threshold: float | None) -> str:
        """W x + b as int16 codes of PRE_STEP; `part` is ih or hh."""
        codes = encode(self._array(f"weight_{part}"), self.weight_bits)
        weight = Constant.of(codes.codes.astype(np.int64), self.weight_bits)
        ratios = codes.scale.astype(np.float64) * (step / PRE_STEP)
        rescale = Rescale.of(ratios.tolist(), _INT16, (bias / PRE_STEP).tolist())
        name = self.name(f"p_{part}")
        if threshold is None:
            return self.body.add(MatMul(inputs=(x,), outputs=(name,), weight=weight, rescale=rescale, scale=PRE_STEP))
        source = self.body.tensors[x]
        sent, delta, memory = f"{part}.sent", f"{part}.delta", f"{part}.memory"
        limits = (min(source.low, 0), max(source.high, 0))
        self.state(sent, limits, step, f"{sent}.next", source.size)
        reach = sum_range(weight.values, None, *limits)
        tensor = Tensor((len(weight.values),), *reach)
        self.body.input(self.name(memory), tensor)
        self.states.append(State(self.name(memory), self.name(f"{memory}.next"), tensor))
        outputs = (self.name(delta), self.name(f"{sent}.next"))
        self.body.add(DeltaUpdate(inputs=(x, self.name(sent)), outputs=outputs, threshold=round(threshold / step)))
        inputs = (self.name(memory), self.name(delta))
        total = self.body.add(Accumulate(inputs=inputs, outputs=(self.name(f"{memory}.next"),), weight=weight))
        return self.body.add(Requantise(inputs=(total,), outputs=(name,), rescale=rescale, scale=PRE_STEP))

    def cut(self, x: str, part: str, place: int) -> str:
        """Piece `place` of the gates in `x`."""
        size = self.rnn.hidden_size
        cut = (place * size, (place + 1) * size)
        return self.body.add(Slice(inputs=(x,), outputs=(self.name(part),), start=cut[0], stop=cut[1]))

    def add(self, parts: dict[str, float], part: str, step: float, limits: tuple[int, int] = _INT16) -> str:
        """Sum of tensors {name: step}, one rounding."""
        multipliers, shift = from_reals([own / step for own in parts.values()])
        op = AddRequantise(
            inputs=tuple(parts),
            outputs=(self.name(part),),
            multipliers=tuple(multipliers),
            shift=shift,
            low=limits[0],
            high=limits[1],
            scale=step,
        )
        return self.body.add(op)

    def times(self, a: str, b: str, part: str, step: float, rescale: Rescale | None = None) -> str:
        """Product of two tensors."""
        return self.body.add(Multiply(inputs=(a, b), outputs=(self.name(part),), rescale=rescale, scale=step))

    def function(self, x: str, part: str, segments: Segments) -> str:
        """A tabulated function of codes of PRE_STEP (equal to C_STEP)."""
        op = Interpolate(
            inputs=(x,),
            outputs=(self.name(part),),
            nodes=_nodes(segments),
            first=segments.first,
            step_bits=segments.step_bits,
            low=segments.low,
            high=segments.high,
            scale=GATE_STEP,
            error=segments.error,
        )
        return self.body.add(op)


def _table(kind: str) -> Segments:
    def real(codes: np.ndarray) -> np.ndarray:
        x = codes * PRE_STEP
        y = np.tanh(x) if kind == "tanh" else 1 / (1 + np.exp(-x))
        return np.clip(y / GATE_STEP, -_UNIT[1], _UNIT[1])  # 1 itself would take a 17th bit

    return segments_of(real, _INT16, _UNIT if kind == "sigmoid" else symmetric(16), _SEGMENT_BITS)


SIGMOID, TANH = _table("sigmoid"), _table("tanh")
_CONSTANTS = {id(table): Constant.of(table.nodes, 16) for table in (SIGMOID, TANH)}


def _nodes(segments: Segments) -> Constant:
    """One constant for all users of a table."""
    return _CONSTANTS[id(segments)]


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
    kind = type(rnn).__name__
    if rnn.bidirectional:
        raise KestrelError(
            f"a bidirectional {kind} has no integer form: it cannot run frame by frame; use one direction"
        )
    if not rnn.batch_first:
        raise KestrelError(f"{kind} {name!r} is lowered for [batch, time, features]: set batch_first=True")
    if getattr(rnn, "proj_size", 0):
        raise KestrelError(f"{kind} {name!r} has no integer form with projections: set proj_size=0")
    for index in range(rnn.num_layers):
        prefix = name if rnn.num_layers == 1 else f"{name}.{index}"
        layer = _Layer(rnn, index, prefix, weight_bits)
        source = program.tensors[x.name]
        step = layer.body.input(f"{prefix}.x", Tensor(source.shape[1:], source.low, source.high, x.step))
        cell = _lstm_step if isinstance(rnn, nn.LSTM) else _gru_step
        h = cell(layer, step, x.step, thresholds)
        scan = Scan(
            inputs=(x.name,),
            outputs=(f"{prefix}.sequence",),
            body=layer.body,
            steps=(step,),
            states=tuple(layer.states),
            emitted=(h,),
        )
        x = Value(program.add(scan), H_STEP)
    return x


def _lstm_step(layer: _Layer, x: str, x_step: float, thresholds: Thresholds | None) -> str:
    """i, f, g, o = W_ih x + b_ih + W_hh h + b_hh; c' = f c + i g; h' = o tanh c'."""
    h = layer.state("h", _INT8, H_STEP, "h.next")
    c = layer.state("c", _INT16, C_STEP, "c.next")
    p_x = layer.product(x, x_step, "ih", layer._array("bias_ih"), thresholds.x if thresholds else None)
    p_h = layer.product(h, H_STEP, "hh", layer._array("bias_hh"), thresholds.h if thresholds else None)
    gates = layer.add({p_x: PRE_STEP, p_h: PRE_STEP}, "gates", PRE_STEP)
    i, f, g, o = (
        layer.function(layer.cut(gates, f"{part}.in", place), part, TANH if part == "g" else SIGMOID)
        for place, part in enumerate("ifgo")
    )
    kept = layer.times(c, f, "kept", C_STEP * GATE_STEP)
    new = layer.times(i, g, "new", GATE_STEP**2)
    c_next = layer.add({kept: C_STEP * GATE_STEP, new: GATE_STEP**2}, "c.next", C_STEP)
    shown = layer.function(c_next, "shown", TANH)
    return layer.times(o, shown, "h.next", H_STEP, Rescale.of(GATE_STEP**2 / H_STEP, _INT8))


def _gru_step(layer: _Layer, x: str, x_step: float, thresholds: Thresholds | None) -> str:
    """r, z as usual; n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""
    h = layer.state("h", _INT8, H_STEP, "h.next")
    p_x = layer.product(x, x_step, "ih", layer._array("bias_ih"), thresholds.x if thresholds else None)
    p_h = layer.product(h, H_STEP, "hh", layer._array("bias_hh"), thresholds.h if thresholds else None)
    gates = {}
    for place, part in enumerate("rz"):
        pieces = {layer.cut(p, f"{part}.{p[-2:]}", place): PRE_STEP for p in (p_x, p_h)}
        gates[part] = layer.function(layer.add(pieces, f"{part}.in", PRE_STEP), part, SIGMOID)
    n_x, n_h = layer.cut(p_x, "n.ih", 2), layer.cut(p_h, "n.hh", 2)
    reset = layer.times(gates["r"], n_h, "reset", GATE_STEP * PRE_STEP)
    n_in = layer.add({n_x: PRE_STEP, reset: GATE_STEP * PRE_STEP}, "n.in", PRE_STEP)
    n = layer.function(n_in, "n", TANH)
    one = Rescale((-1,), 0, *_UNIT, (1 << 15,))  # 1 - z; exactly 1 saturates
    name = layer.name("1-z")
    rest = layer.body.add(Requantise(inputs=(gates["z"],), outputs=(name,), rescale=one, scale=GATE_STEP))
    new = layer.times(rest, n, "new", GATE_STEP**2)
    kept = layer.times(gates["z"], h, "kept", GATE_STEP * H_STEP)
    return layer.add({new: GATE_STEP**2, kept: GATE_STEP * H_STEP}, "h.next", H_STEP, _INT8)
