"""The steps of a program that takes one column of features at a time, and what they read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kestrel.lower import ops
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.memory import Buffer
from kestrel.lower.tensor import Tensor


@dataclass(frozen=True)
class Stream:
    """A tensor cut along time: `length` columns of shape `column`; length None for what follows the global pool."""

    tensor: Tensor
    axis: int | None
    column: tuple[int, ...]
    length: int | None

    @property
    def size(self) -> int:
        """Values of a column."""
        return math.prod(self.column)

    @property
    def bytes(self) -> int:
        """Bytes of a column."""
        return self.size * self.tensor.bits // 8


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the program; `output` is the stream that it makes a column of."""

    output: str


@dataclass(frozen=True, eq=False)
class Compute(Step):
    """`op` on the newest columns of its inputs."""

    op: ops.Op


@dataclass(frozen=True, eq=False)
class Window(Step):
    """Appends a column of `source` to the latest `size` ones; ends the run unless `stride` columns came since the last time.

    `first`: columns before the first output (size less the zeros that precede the clip). `output` are the columns together, or
    where `running` the largest of their values: pools that do not overlap keep one column.
    """

    source: str
    size: int
    stride: int
    first: int
    running: bool = False


@dataclass(frozen=True, eq=False)
class Repeat(Step):
    """Runs the rest of the program `factor` times with the same column of `source`."""

    source: str
    factor: int


@dataclass(frozen=True, eq=False)
class Keep(Step):
    """Puts a column of `output` into a queue of `depth` columns, for the steps `readers`; the last one takes it out."""

    readers: tuple[int, ...]
    depth: int


@dataclass(frozen=True, eq=False)
class Pool(Step):
    """Adds a column of `source` to the sum of the current segment: `segments` of them hold the columns of a clip."""

    source: str
    segments: int
    columns: int  # of a segment
    positions: int  # of a column, summed too


@dataclass(eq=False)
class StreamProgram:
    """`steps` for every column of features, `final` for logits. Streams by name; buffers hold their places in memory.

    `state` bytes live from column to column, `scratch` bytes while one is computed.
    """

    graph: IntegerGraph
    features: str
    logits: str
    streams: dict[str, Stream]
    same: dict[str, str]  # reshaped tensors -> those that they are
    steps: list[Step] = field(default_factory=list)
    final: list[Step] = field(default_factory=list)
    places: dict[str, Buffer] = field(default_factory=dict)
    state: int = 0
    scratch: int = 0

    def name(self, tensor: str) -> str:
        """The stream that a tensor of the graph belongs to."""
        while tensor in self.same:
            tensor = self.same[tensor]
        return tensor


def reads_of(program: StreamProgram, step: Step) -> list[str]:
    """Streams that a step takes a column of, or holds already (the columns of its window)."""
    if isinstance(step, (Window, Repeat, Pool)):
        return [step.source]
    assert isinstance(step, Compute)
    names = [program.name(name) for name in step.op.inputs]
    window = f"{step.output}.window"
    return [
        window if window in program.streams and program.streams[window].length is not None else names[0],
        *names[1:],
    ]


def queues(program: StreamProgram) -> dict[tuple[int, str], Keep]:
    """The queues by (index of a reading step, stream)."""
    return {(reader, step.output): step for step in program.steps if isinstance(step, Keep) for reader in step.readers}


def product_rows(program: StreamProgram) -> Iterator[tuple[str, np.ndarray, str, np.ndarray]]:
    """(name, weights [outputs, inputs] as a column orders its inputs, storage, bias [outputs]) of every matrix product."""
    for step in [*program.steps, *program.final]:
        if isinstance(step, Compute) and isinstance(step.op, (ops.MatMul, ops.Conv2d)):
            rows, bias = rows_of(program, step.op), step.op.bias
            found = np.zeros(len(rows), np.int64) if bias is None else bias.values
            yield step.output, rows, step.op.weight.storage, found


def rows_of(program: StreamProgram, op: ops.MatMul | ops.Conv2d) -> np.ndarray:
    """Weights [outputs, kernel in time, across, channels], flattened after the outputs."""
    values = op.weight.values
    if isinstance(op, ops.MatMul):
        return values
    if _time_axis(program, op) == 1:
        values = values.transpose(0, 2, 1, 3)
    return values.reshape(len(values), -1)


def _time_axis(program: StreamProgram, op: ops.Op) -> int:
    """Axis of time in the output of a column's op (0 behind the global pool)."""
    return program.streams[op.outputs[0]].axis or 0


def taps_of(program: StreamProgram, op: ops.DepthwiseConv2d) -> np.ndarray:
    """Weights [kernel in time, across, channels]."""
    return op.weight.values.transpose(1, 0, 2) if _time_axis(program, op) == 1 else op.weight.values


@dataclass(frozen=True)
class Across:
    """The window of an op within a column: positions of the input and of the output, size, stride and zeros before."""

    positions: int
    made: int
    size: int
    stride: int
    before: int
    depth: int  # columns

    @property
    def plain(self) -> bool:
        """One position, so that the window is the columns as they lie."""
        return self.positions == self.made == self.size == 1 and self.before == 0


def across(program: StreamProgram, op: ops.Conv2d | ops.DepthwiseConv2d | ops.MaxPool | ops.SumPool) -> Across:
    """The window of `op` within a column."""
    made = program.streams[op.outputs[0]]
    time = made.axis or 0
    shape = op_input_shape(program, op)
    other = 1 - time
    window = op.window
    depth = window.size[time]
    if any(
        isinstance(step, Window) and step.running and step.output == f"{op.outputs[0]}.window" for step in program.steps
    ):
        depth = 1
    return Across(
        shape[other],
        made.tensor.shape[other],
        window.size[other],
        window.stride[other],
        window.before[other],
        depth,
    )


def op_input_shape(program: StreamProgram, op: ops.Op) -> tuple[int, ...]:
    """Shape of an op's first input in the graph."""
    return program.graph.tensors[op.inputs[0]].shape
