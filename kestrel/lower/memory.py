"""Static memory of an integer graph in C: which bytes of one arena every tensor has, and when.

Moments count the ops in the order of their execution, those of a scan's body between the scan's beginning and its end.
Tensors whose lifetimes overlap never share bytes; states of a scan live from its beginning to its end, so a device may
return between two frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kestrel.errors import KestrelError
from kestrel.lower.graph import IntegerGraph, Program, Scan, State
from kestrel.lower.ops import (
    Accumulate,
    AddRequantise,
    ArgMax,
    Conv2d,
    DeltaUpdate,
    DepthwiseConv2d,
    Interpolate,
    Lookup,
    MatMul,
    Multiply,
    Op,
    Requantise,
    Reshape,
    Slice,
)
from kestrel.lower.tensor import Constant, Tensor, leaves_out_zeros

ALIGNMENT = 4
INPUT_BITS = 16  # features arrive as int16, whatever their range is
DEPTHWISE_TILE = 40  # KESTREL_DEPTHWISE_TILE
UNPACK_BYTES = 1024  # four rows of packed weights are unpacked at a time where they fit
UNPACKED_BYTES = {"power4": 2}  # of an element, where it is not one
DIRECT = {
    "int8": 8,
    "int16": 16,
    "int32": 32,
    "odd8": 16,
}  # storages that C reads without unpacking; odd8 holds values beyond int8


@dataclass
class Buffer:
    """Bytes that are alive from moment `start` to moment `end`, both included. `offset` is set by the plan."""

    name: str
    size: int
    start: int
    end: int
    offset: int = 0

    def overlaps(self, other: Buffer) -> bool:
        """Whether both are alive at some moment."""
        return self.start <= other.end and other.start <= self.end


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `at` bytes behind the start of its buffer; buffer None = the caller's features.

    Where `step` names an input of a scan's body, `at` counts from that time step's part of the scan's input instead.
    """

    buffer: Buffer | None
    at: int
    bits: int
    step: str | None = None

    @property
    def offset(self) -> int:
        """Bytes from the start of the arena, or of the features."""
        return self.at + (self.buffer.offset if self.buffer else 0)


@dataclass(frozen=True)
class Plan:
    """`places` by tensor, `scratch` by the first output of an op, and the bytes of the arena."""

    places: dict[str, Place]
    scratch: dict[str, Buffer]
    buffers: tuple[Buffer, ...]
    size: int
    states: tuple[str, ...] = field(default=())

    def bytes_of(self, names: tuple[str, ...]) -> int:
        """Bytes of the buffers that hold these tensors."""
        held = {id(b): b.size for name in names if (b := self.places[name].buffer) is not None}
        return sum(held.values())


def returned_output(graph: IntegerGraph) -> str:
    """The tensor that the C model returns, the logits. Raises KestrelError where the graph has another form."""
    makers = {name: op for op in graph.ops for name in op.outputs}
    name, *others = graph.outputs or [""]
    classes = [other for other in others if isinstance(makers[other], ArgMax) and makers[other].inputs == (name,)]
    if not name or len(classes) != len(others) or len(graph.inputs) != 1:
        raise KestrelError("C code is made for models with one input and one output (and its ArgMax)")
    tensor = graph.tensors[graph.inputs[0]]
    if tensor.bits > INPUT_BITS:
        raise KestrelError(f"the C model takes features of {INPUT_BITS} bits, the graph has {tensor.bits}")
    return name


def program_ops(graph: IntegerGraph) -> list[Op]:
    """The ops that the C model runs: all but the ArgMax of the logits, which its caller has a function for."""
    others = set(graph.outputs[1:])
    return [op for op in graph.ops if not others & set(op.outputs)]


def is_view(op: Op, tensors: dict[str, Tensor]) -> bool:
    """Whether the output is a part of the input that lies in one piece, so that nothing needs to be moved."""
    if isinstance(op, Slice):
        return math.prod(tensors[op.inputs[0]].shape[: op.axis]) == 1
    return isinstance(op, Reshape)


def view_start(op: Op, tensors: dict[str, Tensor]) -> int:
    """Elements before the output of a view."""
    if not isinstance(op, Slice):
        return 0
    return op.start * math.prod(tensors[op.inputs[0]].shape[op.axis + 1 :])


def unpack_rows(weight: Constant) -> int:
    """Rows of a packed matrix that are unpacked at a time: four where they take at most UNPACK_BYTES."""
    length = math.prod(weight.shape[1:]) * UNPACKED_BYTES.get(weight.storage, 1)
    return 4 if 4 * length <= UNPACK_BYTES else 1


def scratch_bytes(op: Op) -> int:
    """Bytes that a kernel needs to unpack weights."""
    weight = getattr(op, "weight", None)
    if weight is None or weight.storage in DIRECT:
        return 0
    size = UNPACKED_BYTES.get(weight.storage, 1)
    if isinstance(op, Accumulate):
        return 0 if leaves_out_zeros(weight.storage) else size * int(weight.shape[0])
    if isinstance(op, DepthwiseConv2d):
        return size * math.prod(op.window.size) * DEPTHWISE_TILE
    assert isinstance(op, (MatMul, Conv2d))
    return size * unpack_rows(weight) * math.prod(weight.shape[1:])


class _Planner:
    def __init__(self, graph: IntegerGraph) -> None:
        self.graph, self.output = graph, returned_output(graph)
        self.places: dict[str, Place] = {}
        self.scratch: dict[str, Buffer] = {}
        self.buffers: list[Buffer] = []
        self.states: list[str] = []
        self.now = 0

    def plan(self) -> Plan:
        (name,) = self.graph.inputs
        self.places[name] = Place(None, 0, INPUT_BITS)
        for op in program_ops(self.graph):
            self.now += 1
            if isinstance(op, Scan):
                self._scan(op)
            else:
                self._op(op, self.graph)
        self.now += 1
        self._use(self.output)
        return Plan(self.places, self.scratch, tuple(self.buffers), arrange(self.buffers), tuple(self.states))

    def _buffer(self, name: str, size: int) -> Buffer:
        buffer = Buffer(name, size, self.now, self.now)
        self.buffers.append(buffer)
        return buffer

    def _make(self, name: str, tensor: Tensor) -> None:
        self.places[name] = Place(self._buffer(name, tensor.bytes), 0, tensor.bits)

    def _use(self, name: str) -> None:
        buffer = self.places[name].buffer
        if buffer is not None:
            buffer.end = max(buffer.end, self.now)

    def _op(self, op: Op, program: Program, fixed: dict[str, str] | None = None) -> None:
        """`fixed`: outputs that are written over a state, by name."""
        for name in op.inputs:
            self._use(name)
        if is_view(op, program.tensors):
            source = self.places[op.inputs[0]]
            at = source.at + view_start(op, program.tensors) * source.bits // 8
            self.places[op.outputs[0]] = Place(source.buffer, at, source.bits, source.step)
            return
        for name in op.outputs:
            if fixed and name in fixed:
                self.places[name] = self.places[fixed[name]]
            else:
                self._make(name, program.tensors[name])
        size = scratch_bytes(op)
        if size:
            self.scratch[op.outputs[0]] = self._buffer(f"{op.outputs[0]}, unpacked weights", size)

    def _scan(self, scan: Scan) -> None:
        """States, then the body, then the moment at which outputs and states are copied."""
        body = scan.body
        for name in scan.inputs:
            self._use(name)
        stacked = dict(zip(scan.outputs, scan.emitted, strict=False))
        for name in stacked:
            self._make(name, self.graph.tensors[name])
        for state in scan.states:
            self._make(state.name, state.tensor)
            self.states.append(state.name)
        for name, source in zip(scan.steps, scan.inputs, strict=True):
            held = self.places[source]
            self.places[name] = Place(held.buffer, 0, held.bits, name)
        for state in scan.states:
            if moved_state(scan, state):
                self._make(saved_name(state), state.tensor)
        fixed = replaced_states(scan)
        for op in body.ops:
            self.now += 1
            self._op(op, body, fixed)
        self.now += 1
        for name in (*scan.emitted, *(state.next for state in scan.states), *(s.name for s in scan.states)):
            self._use(name)
        for name in (*scan.inputs, *stacked, *(saved_name(s) for s in scan.states if moved_state(scan, s))):
            self._use(name)
        for name, state_name in zip(scan.outputs[len(stacked) :], scan.last, strict=True):
            self.places[name] = self.places[state_name]


def saved_name(state: State) -> str:
    """Where the next value of a state waits that is itself a state, until all are replaced."""
    return f"{state.name}, next"


def moved_state(scan: Scan, state: State) -> bool:
    """Whether a state becomes another state, or a view of one, whose old value has to be saved first."""
    return state.next != state.name and _root(scan, state.next) in {other.name for other in scan.states}


def _root(scan: Scan, name: str) -> str:
    """The tensor that `name` is a view of."""
    makers = {made: op for op in scan.body.ops for made in op.outputs}
    while name in makers and is_view(makers[name], scan.body.tensors):
        name = makers[name].inputs[0]
    return name


def replaced_states(scan: Scan) -> dict[str, str]:
    """Next values {tensor: state} that are written straight over their state, because nothing reads it afterwards."""
    found: dict[str, str] = {}
    nexts = [state.next for state in scan.states]
    roots = [_root(scan, name) for name in (*nexts, *scan.emitted)]
    for state in scan.states:
        makers = [op for op in scan.body.ops if state.next in op.outputs]
        if not makers or nexts.count(state.next) > 1 or state.name in roots:
            continue
        (maker,) = makers
        readers = [op for op in scan.body.ops if any(_root(scan, name) == state.name for name in op.inputs)]
        views = [op for op in readers if is_view(op, scan.body.tensors)]
        readers = [op for op in readers if op not in views]
        place = scan.body.ops.index(maker)
        late = [op for op in readers if scan.body.ops.index(op) > place]
        same_bits = scan.body.tensors[state.next].bits == state.tensor.bits
        if late or not same_bits or is_view(maker, scan.body.tensors):
            continue
        if maker not in readers or _in_place(scan, maker, state):
            found[state.next] = state.name
    return found


def _in_place(scan: Scan, op: Op, state: State) -> bool:
    """Whether `op`, which reads `state`, may write its next value over it."""
    others = [name for name in op.inputs if _root(scan, name) == state.name and name != state.name]
    if others:
        return False
    if isinstance(op, Accumulate):
        return op.inputs[0] == state.name and op.inputs[1] != state.name
    if isinstance(op, DeltaUpdate):
        return state.next == op.outputs[1] and op.inputs[1] == state.name and op.inputs[0] != state.name
    if isinstance(op, Multiply):
        return scan.body.tensors[op.inputs[0]].shape == scan.body.tensors[op.inputs[1]].shape
    return isinstance(op, (Requantise, AddRequantise, Lookup, Interpolate))


def arrange(buffers: list[Buffer]) -> int:
    """Set the offsets, largest buffers first, each at the lowest place that is free during its life; returns the size.

    (Greedy by size: Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, arXiv 2001.03288.)
    """
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.start, b.name)):
        offset = 0
        for other in sorted((o for o in placed if o.overlaps(buffer)), key=lambda o: o.offset):
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.size))
        buffer.offset = offset
        placed.append(buffer)
    return _aligned(max((b.offset + b.size for b in buffers), default=0)) or ALIGNMENT


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_memory(graph: IntegerGraph) -> Plan:
    """The arena of `graph`. Raises KestrelError where the graph has no C form."""
    return _Planner(graph).plan()
