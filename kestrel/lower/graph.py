"""Integer models: ops in the order of their execution, recurrence over time steps, and what both compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kestrel.errors import KestrelError
from kestrel.lower.ops import PRODUCTS, Accumulate, DeltaUpdate, Op, sum_range, weight_rows
from kestrel.lower.tensor import Constant, Tensor

Array = np.ndarray
Trace = dict[str, Array]


@dataclass(eq=False)
class Program:
    """Named tensors, and the ops that compute them from the `inputs`, in order. Every tensor is written once."""

    inputs: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def input(self, name: str, tensor: Tensor) -> str:
        """Declare an input."""
        self._name(name, tensor)
        self.inputs.append(name)
        return name

    def add(self, op: Op) -> str:
        """Append `op`, checked, with its outputs; returns the name of its first output."""
        missing = [name for name in op.inputs if name not in self.tensors]
        op.check(not missing, f"input {missing[0] if missing else ''!r} does not exist yet")
        count = len(op.inputs)
        fits = op.arity == count or (op.arity is None and count > 0)
        op.check(fits, f"{count} inputs, takes {op.arity or '1 or more'}")
        found = op.infer(*(self.tensors[name] for name in op.inputs))
        op.check(len(found) == len(op.outputs), f"{len(op.outputs)} outputs, makes {len(found)}")
        for name, tensor in zip(op.outputs, found, strict=True):
            self._name(name, tensor)
        self.ops.append(op)
        return op.outputs[0]

    def leave_out_zeros(self) -> None:
        """Store matrices of weights without their zeros where that makes them a quarter smaller, those of scans too."""
        for place, op in enumerate(self.ops):
            if isinstance(op, Scan):
                op.body.leave_out_zeros()
            elif isinstance(op, PRODUCTS):
                self.ops[place] = dataclasses.replace(
                    op, weight=op.weight.compact(weight_rows(op), columns=isinstance(op, Accumulate))
                )

    def _name(self, name: str, tensor: Tensor) -> None:
        if name in self.tensors:
            raise KestrelError(f"tensor {name!r} exists already")
        self.tensors[name] = tensor

    def execute(self, values: dict[str, Array], trace: Trace | None = None) -> None:
        """Run the ops on `values` (by name, int64 [batch, ...]), which gain every tensor that they compute."""
        for op in self.ops:
            arrays = (values[name] for name in op.inputs)
            results = op.traced(trace, *arrays) if isinstance(op, Scan) else op.run(*arrays)
            values.update(zip(op.outputs, results, strict=True))


@dataclass(frozen=True)
class State:
    """Memory of a Scan: body tensor `name`, declared as `tensor`, becomes body tensor `next` after each step.

    `initial`: its values before the first step, all 0 where None.
    """

    name: str
    next: str
    tensor: Tensor
    initial: Constant | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Scan(Op):
    """The ops of `body`, once for each index of the first axis of the inputs (time).

    `steps` names the body's inputs, which see one index each of this op's inputs, in order. The other inputs of the
    body are the `states`. Outputs: the tensors `emitted` of every step, stacked [time, ...], then the last values of
    `last` (names of states).
    """

    body: Program
    steps: tuple[str, ...]
    states: tuple[State, ...]
    emitted: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    arity: ClassVar[int | None] = None

    def infer(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.check(len(self.steps) == len(tensors), f"{len(self.steps)} step inputs for {len(tensors)} inputs")
        lengths = {x.shape[0] for x in tensors if len(x.shape) > 1}
        self.check(len(lengths) == 1 and all(len(x.shape) > 1 for x in tensors), "inputs are not of one length in time")
        for name, x in zip(self.steps, tensors, strict=True):
            self._contains(name, Tensor(x.shape[1:], x.low, x.high), "input")
        expected = sorted([*self.steps, *(state.name for state in self.states)])
        self.check(expected == sorted(self.body.inputs), f"the body has inputs {self.body.inputs}, not {expected}")
        for state in self.states:
            self._check_state(state)
        known = {state.name for state in self.states}
        self.check(set(self.last) <= known, f"last {self.last} are not all states")
        self.check(set(self.emitted) <= set(self.body.tensors), f"emitted {self.emitted} are not all in the body")
        (length,) = lengths
        stacked = [self.body.tensors[name] for name in self.emitted]
        return (
            *(Tensor((length, *x.shape), x.low, x.high, x.scale) for x in stacked),
            *(self.body.tensors[name] for name in self.last),
        )

    def _contains(self, name: str, x: Tensor, kind: str) -> None:
        self.check(name in self.body.tensors, f"{kind} {name!r} is not in the body")
        held = self.body.tensors[name]
        self.check(held.shape == x.shape, f"{kind} {name!r} has shape {held.shape}, gets {x.shape}")
        fits = held.low <= x.low and x.high <= held.high
        self.check(fits, f"{kind} {name!r} holds {held.low}..{held.high}, gets {x.low}..{x.high}")

    def _check_state(self, state: State) -> None:
        self.check(state.next in self.body.tensors, f"state {state.name!r} continues with unknown {state.next!r}")
        held = self.body.tensors.get(state.name)
        self.check(held == state.tensor, f"state {state.name!r} is not declared in the body as it is here")
        values = np.zeros(state.tensor.shape, np.int64) if state.initial is None else state.initial.values
        first = Tensor(values.shape, int(values.min()), int(values.max()))
        self._contains(state.name, first, "state")
        self._contains(state.name, self.body.tensors[state.next], "state")
        chain = self._accumulations(state)
        if not chain:
            return
        # Memories hold initial + (transmitted values) W^T, however often they were added to.
        low, high = min(first.low, 0), max(first.high, 0)
        for op in chain:
            reference = self._reference(op)
            added = sum_range(op.weight.values, None, min(reference.low, 0), max(reference.high, 0))
            low, high = low + added[0], high + added[1]
        self._accumulated(low, high)
        self._contains(state.name, Tensor(state.tensor.shape, low, high), "state")

    def _accumulations(self, state: State) -> list[Accumulate]:
        """The Accumulate ops through which a state becomes its next value; none for other states."""
        makers = {name: op for op in self.body.ops for name in op.outputs}
        chain: list[Accumulate] = []
        name = state.next
        while isinstance(op := makers.get(name), Accumulate):
            chain.append(op)
            name = op.inputs[0]
        self.check(not chain or name == state.name, f"state {state.name!r} does not accumulate onto itself")
        return chain

    def _reference(self, op: Accumulate) -> Tensor:
        """The transmitted values whose changes `op` adds."""
        maker = next((other for other in self.body.ops if op.inputs[1] in other.outputs[:1]), None)
        if not isinstance(maker, DeltaUpdate):
            raise self.problem(f"{op.inputs[1]!r} is not made by a DeltaUpdate, so {op.outputs[0]!r} has no bound")
        kept = any(s.name == maker.inputs[1] and s.next == maker.outputs[1] and s.initial is None for s in self.states)
        self.check(kept, f"the references of {op.inputs[1]!r} are not a state that starts at 0")
        return self.body.tensors[maker.outputs[1]]

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        return self.traced(None, *arrays)

    def traced(self, trace: Trace | None, *arrays: Array) -> tuple[Array, ...]:
        """Like `run`; `trace` gains every tensor of the body, stacked over time [batch, time, ...]."""
        batch, length = arrays[0].shape[:2]
        values: dict[str, Array] = {}
        for state in self.states:
            start = np.zeros(state.tensor.shape, np.int64) if state.initial is None else state.initial.values
            values[state.name] = np.broadcast_to(start, (batch, *state.tensor.shape))
        wanted = list(self.body.tensors) if trace is not None else list(dict.fromkeys(self.emitted))
        kept: dict[str, list[Array]] = {name: [] for name in wanted}
        for step in range(length):
            now = {**values, **{name: x[:, step] for name, x in zip(self.steps, arrays, strict=True)}}
            self.body.execute(now)
            for name, rows in kept.items():
                rows.append(now[name])
            values = {state.name: now[state.next] for state in self.states}
        stacked = {name: np.stack(rows, axis=1) for name, rows in kept.items()}
        if trace is not None:
            trace.update(stacked)
        return (*(stacked[name] for name in self.emitted), *(values[name] for name in self.last))


@dataclass(frozen=True)
class Mismatch:
    """Where two executions first differ: a tensor, an index (clip, time step if in a Scan, ...), and both values."""

    tensor: str
    index: tuple[int, ...]
    expected: int
    actual: int

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index))
        return f"{self.tensor}[{where}]: expected {self.expected}, got {self.actual}"


@dataclass(eq=False)
class IntegerGraph(Program):
    """An integer model: features as int codes -> `outputs`. `notes` are plain facts about it, for cards and files."""

    outputs: list[str] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)

    def output(self, name: str) -> None:
        """Declare tensor `name` an output."""
        if name not in self.tensors:
            raise KestrelError(f"output {name!r} does not exist")
        self.outputs.append(name)

    def add(self, op: Op) -> str:
        """Append `op`. Names are unique over the graph and the bodies of its scans."""
        if isinstance(op, Scan):
            clash = sorted(set(op.body.tensors) & {name for name, _, _ in self.all_tensors()})
            op.check(not clash, f"its body reuses the name {clash[0] if clash else ''!r}")
        return super().add(op)

    def all_ops(self) -> Iterator[tuple[Op, Scan | None]]:
        """Every op with the scan that it lies in, in order; a scan comes before its body."""
        for op in self.ops:
            yield op, None
            if isinstance(op, Scan):
                yield from ((inner, op) for inner in op.body.ops)

    def all_tensors(self) -> Iterator[tuple[str, Tensor, Scan | None]]:
        """Every tensor with the scan that it lies in."""
        yield from ((name, tensor, None) for name, tensor in self.tensors.items())
        for op in self.ops:
            if isinstance(op, Scan):
                yield from ((name, tensor, op) for name, tensor in op.body.tensors.items())

    def run(self, *codes: Array, trace: Trace | None = None) -> dict[str, Array]:
        """Integer inputs [batch, *shape] in the order of `inputs` -> outputs by name, int64 [batch, ...].

        `trace`, a dictionary, gains every tensor; those inside a scan with time as their second axis. Raises
        KestrelError where an input has another shape or leaves its range.
        """
        values: dict[str, Array] = {}
        for name, array in zip(self.inputs, codes, strict=True):
            tensor = self.tensors[name]
            array = np.asarray(array)
            if array.shape[1:] != tensor.shape or array.dtype.kind not in "iu":
                raise KestrelError(f"input {name!r} takes integers {tensor.shape}, not {array.dtype} {array.shape[1:]}")
            if array.size and (array.min() < tensor.low or array.max() > tensor.high):
                raise KestrelError(f"input {name!r} leaves its range {tensor.low}..{tensor.high}")
            values[name] = array.astype(np.int64)
        self.execute(values, trace)
        if trace is not None:
            trace.update(values)
        return {name: values[name] for name in self.outputs}

    def check_trace(self, trace: Trace) -> None:
        """Raise KestrelError where a value of `trace` leaves the range that was proven for its tensor."""
        for name, tensor, _ in self.all_tensors():
            found = trace[name]
            if found.size and (found.min() < tensor.low or found.max() > tensor.high):
                raise KestrelError(f"{name}: {found.min()}..{found.max()} is outside {tensor.low}..{tensor.high}")

    def first_mismatch(self, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> Mismatch | None:
        """The first value, in the order of computation, that differs between two traces; tensors of both are compared.

        Order: op by op; inside a scan time step by time step; then by position in the tensor.
        """
        for op in self.ops:
            found = self._first_in_scan(op, expected, actual) if isinstance(op, Scan) else None
            for name in op.outputs:
                found = found or _difference(name, expected, actual)
            if found:
                return found
        return None

    @staticmethod
    def _first_in_scan(scan: Scan, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> Mismatch | None:
        order = [name for op in scan.body.ops for name in op.outputs if name in expected and name in actual]
        places = {name: _difference(name, expected, actual) for name in order}
        steps: dict[str, int] = {}
        for name, place in places.items():
            if place is not None:
                differs = expected[name] != actual[name]
                steps[name] = int(np.flatnonzero(differs.any(axis=(0, *range(2, differs.ndim))))[0])
        if not steps:
            return None
        name = min(steps, key=lambda key: (steps[key], order.index(key)))
        step = steps[name]
        inner = _difference(name, {name: expected[name][:, step]}, {name: actual[name][:, step]})
        assert inner is not None
        return Mismatch(name, (inner.index[0], step, *inner.index[1:]), inner.expected, inner.actual)


def _difference(name: str, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> Mismatch | None:
    if name not in expected or name not in actual:
        return None
    places = np.argwhere(expected[name] != actual[name])
    if not len(places):
        return None
    index = tuple(int(i) for i in places[0])
    return Mismatch(name, index, int(expected[name][index]), int(actual[name][index]))


def input_codes(features: Array, tensor: Tensor) -> Array:
    """Real features -> codes of the input `tensor`, int16: round half to even of value / scale, saturated.

    Raises KestrelError where a feature is not finite.
    """
    assert tensor.scale is not None
    values = np.asarray(features, dtype=np.float64)
    if not np.isfinite(values).all():
        raise KestrelError("the features hold values that are not finite: run stage 2 again with --force")
    codes = np.rint(values / tensor.scale)
    return np.clip(codes, tensor.low, tensor.high).astype(np.int16)


def calibrated_scale(largest: float, headroom: float = 1.5) -> float:
    """The power of two at which int16 codes reach `headroom` times the largest magnitude seen in training features."""
    if not np.isfinite(largest) or largest < 0:
        raise KestrelError("the features hold values that are not finite: run stage 2 again with --force")
    exponent = int(np.ceil(np.log2(max(largest, 2.0**-40) * headroom / 32767)))
    return 2.0**exponent
