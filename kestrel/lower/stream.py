"""A feed-forward integer graph as a program that takes one column (frame) at a time, with static memory.

Every tensor with a time axis becomes a stream of columns: the values of one time index, in the order of the other axes. The
steps of the program run from the first to the last for every column of features. A step may end the run early (a `Window`
that waits for more columns) or repeat the rest of it (`Repeat`, from upsampling over time); so a step that comes later runs at its
own rate. Where a step reads a stream that is ahead of it, the columns wait in a queue (`Keep`). What is computed from the global
pool runs when logits are wanted. A simulation of one clip proves that every stream gets the columns that the graph gives it, and
finds the length of the queues.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kestrel.errors import KestrelError
from kestrel.lower import ops
from kestrel.lower.graph import IntegerGraph, Scan
from kestrel.lower.memory import Buffer, arrange, returned_output
from kestrel.lower.tensor import Tensor

COLUMN_OPS = (
    ops.Requantise,
    ops.AddRequantise,
    ops.Multiply,
    ops.Lookup,
    ops.MatMul,
    ops.Conv2d,
    ops.DepthwiseConv2d,
    ops.MaxPool,
    ops.SumPool,
    ops.Upsample,
)
TABLE_BYTES = 128  # four tables of sixteen int16
SEGMENT_CHOICES = (4, 5, 3, 6, 2)


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


def stream_program(graph: IntegerGraph, segments: int | None = None) -> StreamProgram:
    """The program of a graph (best a narrow one) whose input is features [T, F].

    `segments`: parts that a clip's global pool is kept in, so that logits of the latest clip length can be had whenever one is
    full; None chooses 4, or what divides the columns. Raises KestrelError, one line, where the graph cannot be cut in time.
    """
    maker = _Maker(graph, segments)
    program = maker.make()
    _simulate(program)
    _place(program)
    return program


def _refuse(op: ops.Op, text: str) -> KestrelError:
    return op.problem(f"cannot run column by column: {text}")


class _Maker:
    def __init__(self, graph: IntegerGraph, segments: int | None) -> None:
        (features,) = graph.inputs
        tensor = graph.tensors[features]
        if len(tensor.shape) != 2:
            raise KestrelError(f"a streamed model takes features [frames, values], not {tensor.shape}")
        self.graph, self.wanted = graph, segments
        stream = Stream(tensor, 0, tensor.shape[1:], tensor.shape[0])
        self.program = StreamProgram(graph, features, returned_output(graph), {features: stream}, {})
        self.pooled = False

    def make(self) -> StreamProgram:
        waiting = [op for op in self.graph.ops if not isinstance(op, ops.ArgMax)]
        while waiting:
            ready = [op for op in waiting if all(self.program.name(name) in self.program.streams for name in op.inputs)]
            # Steps that end or repeat a run come as late as possible: what follows them runs at their rate.
            op = next((op for op in ready if not self._changes_rate(op)), ready[0])
            waiting.remove(op)
            self._add(op)
        program = self.program
        program.logits = program.name(program.logits)
        if not self.pooled or program.streams[program.logits].length is not None:
            raise KestrelError("a streamed model ends with a global pool over time and what is computed from it")
        return program

    # ---------------------------------------------------------------------------------------------------------- shapes

    def _source(self, op: ops.Op, place: int = 0) -> tuple[str, Stream]:
        name = self.program.name(op.inputs[place])
        return name, self._view(op.inputs[place])

    def _view(self, tensor: str) -> Stream:
        """The stream of a tensor, in the shape of this tensor."""
        held = self.program.streams.get(tensor)
        return held if held is not None else self._reshaped[tensor]

    @property
    def _reshaped(self) -> dict[str, Stream]:
        return self.__dict__.setdefault("_views", {})

    def _changes_rate(self, op: ops.Op) -> bool:
        stream = self._source(op)[1]
        if stream.length is None:
            return False
        if isinstance(op, ops.Upsample):
            return self._along(op.factor, stream)[0] > 1
        window = getattr(op, "window", None)
        if window is None:
            return False
        return self._along(window.size, stream)[0] > 1 or self._along(window.stride, stream)[0] > 1

    @staticmethod
    def _along(pair: tuple[int, int], stream: Stream) -> tuple[int, int]:
        """(in time, across) of a pair (height, width)."""
        return (pair[0], pair[1]) if stream.axis in (0, None) else (pair[1], pair[0])

    def _stream(self, name: str, axis: int | None) -> Stream:
        tensor = self.graph.tensors[name]
        if axis is None:
            return Stream(tensor, None, tensor.shape, None)
        return Stream(tensor, axis, tensor.shape[:axis] + tensor.shape[axis + 1 :], tensor.shape[axis])

    # ------------------------------------------------------------------------------------------------------------- ops

    def _add(self, op: ops.Op) -> None:
        if isinstance(op, ops.Slice):
            self._first_frames(op)
            return
        if isinstance(op, Scan) or not isinstance(op, (*COLUMN_OPS, ops.Reshape, ops.Transpose)):
            raise _refuse(op, "this op is not among those that can")
        for name in op.inputs:
            if self.graph.tensors[name].bits > 8 and isinstance(
                op, (ops.MatMul, ops.Conv2d, ops.DepthwiseConv2d, ops.Multiply)
            ):
                raise _refuse(op, f"its input {name!r} has {self.graph.tensors[name].bits} bits, products take 8")
        if isinstance(op, (ops.Reshape, ops.Transpose)):
            self._move(op)
            return
        _, stream = self._source(op)
        streams = [self._view(name) for name in op.inputs]
        if stream.length is None or any(s.length is None for s in streams):
            self._final(op, streams)
            return
        if any(s.length != stream.length for s in streams):
            raise _refuse(op, "its inputs have different lengths")
        if isinstance(op, ops.SumPool) and self._along(op.window.size, stream)[0] == stream.length:
            self._pool(op, stream)
            return
        if isinstance(op, ops.MatMul) and stream.axis != 0:
            raise _refuse(op, "time is its last axis")
        if isinstance(op, ops.Upsample):
            self._upsample(op, stream)
            return
        window = getattr(op, "window", None)
        if window is not None and self._changes_rate(op):
            self._window(op, stream, window)
        self._compute(op, stream.axis)

    def _move(self, op: ops.Reshape | ops.Transpose) -> None:
        """Reshaping keeps the columns as they are; they only get another shape."""
        name, stream = self._source(op)
        (made,) = op.outputs
        shape = self.graph.tensors[made].shape
        if stream.length is None or stream.axis is None:
            moved = _order_kept(op, self.graph.tensors[op.inputs[0]].shape) if isinstance(op, ops.Transpose) else True
            view = self._stream(made, None)
        elif isinstance(op, ops.Transpose):
            axis = op.axes.index(stream.axis)
            rest = [a - (a > stream.axis) for a in op.axes if a != stream.axis]
            moved = _same_order(rest, stream.column)
            view = self._stream(made, axis)
        else:
            before = math.prod(self.graph.tensors[op.inputs[0]].shape[: stream.axis])
            axes = [a for a, size in enumerate(shape) if size == stream.length and math.prod(shape[:a]) == before]
            moved = bool(axes)
            view = self._stream(made, axes[0] if axes else 0)
        if not moved:
            raise _refuse(op, "it moves values within a column or between columns")
        self.program.same[made] = name
        self._reshaped[made] = view

    def _first_frames(self, op: ops.Slice) -> None:
        """A clip that is cut at its end is a shorter one."""
        name, stream = self._source(op)
        if name != self.program.features or op.axis != 0 or op.start != 0 or self.program.steps:
            raise _refuse(op, "only the clip's last frames can be cut off, and first of all")
        view = self._stream(op.outputs[0], 0)
        self.program.same[op.outputs[0]] = name
        self._reshaped[op.outputs[0]] = view
        self.program.streams[name] = Stream(stream.tensor, 0, stream.column, view.length)

    def _window(self, op: ops.Op, stream: Stream, window: ops.Window) -> None:
        size, stride = self._along(window.size, stream)[0], self._along(window.stride, stream)[0]
        before, after = self._along(window.before, stream)[0], self._along(window.after, stream)[0]
        if after:
            raise _refuse(op, f"{after} columns of zeros after the clip (pad before it only: causal)")
        if before >= size:
            raise _refuse(op, "its first windows hold zeros only")
        name = self._source(op)[0]
        made = f"{op.outputs[0]}.window"
        self.program.streams[made] = stream
        running = isinstance(op, ops.MaxPool) and size == stride and self._along(window.size, stream)[1] == 1
        self.program.steps.append(Window(made, name, size, stride, size - before, running))

    def _compute(self, op: ops.Op, axis: int | None) -> None:
        self.program.streams[op.outputs[0]] = self._stream(op.outputs[0], axis)
        self.program.steps.append(Compute(op.outputs[0], op))

    def _upsample(self, op: ops.Upsample, stream: Stream) -> None:
        factor, across = self._along(op.factor, stream)
        if across != 1:
            raise _refuse(op, "it repeats values within a column")
        self.program.streams[op.outputs[0]] = self._stream(op.outputs[0], stream.axis)
        self.program.steps.append(Repeat(op.outputs[0], self._source(op)[0], factor))

    def _pool(self, op: ops.SumPool, stream: Stream) -> None:
        if self.pooled:
            raise _refuse(op, "it is a second global pool")
        across = self._along(op.window.size, stream)[1]
        if across != math.prod(stream.column[:-1]):
            raise _refuse(op, "it is global in time only")
        assert stream.length is not None
        segments = self.wanted or next((n for n in SEGMENT_CHOICES if stream.length % n == 0), 1)
        if stream.length % segments:
            raise KestrelError(f"{stream.length} columns cannot be cut into {segments} segments of one length")
        columns = stream.length // segments
        if stream.tensor.magnitude * columns * across > 32767:
            raise _refuse(op, "a segment's sum has more than 16 bits: use more segments")
        sums = f"{op.outputs[0]}.sums"
        self.program.streams[sums] = self._stream(op.outputs[0], None)
        self.program.steps.append(Pool(sums, self._source(op)[0], segments, columns, across))
        self.program.streams[op.outputs[0]] = self._stream(op.outputs[0], None)
        self.program.final.append(Compute(op.outputs[0], op))
        self.pooled = True

    def _final(self, op: ops.Op, streams: list[Stream]) -> None:
        if any(s.length is not None for s in streams):
            raise _refuse(op, "it joins the pooled clip with single columns")
        if isinstance(op, (ops.MaxPool, ops.Upsample, ops.SumPool, ops.DepthwiseConv2d)):
            raise _refuse(op, "it comes behind the global pool")
        if isinstance(op, ops.Conv2d) and (
            op.window.size != (1, 1) or streams[0].column[:-1] not in ((), (1,), (1, 1))
        ):
            raise _refuse(op, "it comes behind the global pool")
        self.program.streams[op.outputs[0]] = self._stream(op.outputs[0], None)
        self.program.final.append(Compute(op.outputs[0], op))


def _order_kept(op: ops.Transpose, shape: tuple[int, ...]) -> bool:
    return _same_order(list(op.axes), shape)


def _same_order(axes: list[int], shape: tuple[int, ...]) -> bool:
    """Whether axes in this order leave values where they are: those longer than 1 keep their order."""
    long = [axis for axis in axes if shape[axis] > 1]
    return long == sorted(long)


# --------------------------------------------------------------------------------------------------------- simulation


def _reads(program: StreamProgram, step: Step) -> list[str]:
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


def _simulate(program: StreamProgram) -> None:
    """Run a clip with counters; put queues where a step reads behind the newest column."""
    steps = program.steps
    made: dict[str, int] = dict.fromkeys(program.streams, 0)
    used: dict[tuple[int, str], int] = {}
    deepest: dict[tuple[int, str], int] = {}
    seen = [0] * len(steps)

    def take(index: int, name: str) -> None:
        key = (index, name)
        used[key] = used.get(key, 0) + 1
        ahead = made[name] - used[key]
        if ahead < 0:
            raise KestrelError(f"{steps[index].output!r} cannot run column by column: {name!r} comes too late for it")
        deepest[key] = max(deepest.get(key, 0), ahead)

    def run(index: int) -> None:
        for place in range(index, len(steps)):
            step = steps[place]
            for name in dict.fromkeys(_reads(program, step)):
                take(place, name)
            seen[place] += 1
            if isinstance(step, Window):
                if seen[place] < step.first or (seen[place] - step.first) % step.stride:
                    return
                made[step.output] += 1
            elif isinstance(step, Repeat):
                for _ in range(step.factor):
                    made[step.output] += 1
                    run(place + 1)
                return
            elif not isinstance(step, Pool):
                made[step.output] += 1

    length = program.streams[program.features].length
    assert length is not None
    for _ in range(length):
        made[program.features] += 1
        run(0)
    for name, stream in program.streams.items():
        wanted = stream.length
        if wanted is not None and not name.endswith(".window") and made[name] != wanted:
            raise KestrelError(f"{name!r} cannot run column by column: it gets {made[name]} columns of {wanted}")
    _queue(program, {key: depth for key, depth in deepest.items() if depth})


def _queue(program: StreamProgram, behind: dict[tuple[int, str], int]) -> None:
    """Insert the queues: (index of the reading step, stream) -> columns that it is behind. Readers of one rate share one."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, stream in sorted(behind):
        turn = max((at for at, s in enumerate(program.steps[:index]) if isinstance(s, (Window, Repeat))), default=-1)
        groups.setdefault((stream, turn), []).append(index)
        if program.streams[stream].tensor.bits != 8:
            raise KestrelError(f"{stream!r} cannot wait in a queue: it has more than 8 bits")
    steps: list[Step] = []
    kept: dict[int, list[Step]] = {}
    for step in program.steps:
        steps.append(step)
        for (stream, _), readers in groups.items():
            if stream == step.output:
                depth = 1 + max(behind[index, stream] for index in readers)
                steps.append(Keep(stream, (), depth))
                kept[id(steps[-1])] = [program.steps[index] for index in readers]
    order = {id(step): place for place, step in enumerate(steps)}
    program.steps = [
        Keep(step.output, tuple(order[id(reader)] for reader in kept[id(step)]), step.depth)
        if isinstance(step, Keep)
        else step
        for step in steps
    ]


def queues(program: StreamProgram) -> dict[tuple[int, str], Keep]:
    """The queues by (index of a reading step, stream)."""
    return {(reader, step.output): step for step in program.steps if isinstance(step, Keep) for reader in step.readers}


# -------------------------------------------------------------------------------------------------------------- memory


def queue_name(queue: Keep) -> str:
    """Name of a queue's place."""
    return f"{queue.output}.queue{queue.readers[-1]}"


def product_outputs(op: ops.Op) -> int:
    """int32 accumulators that a step needs beside its output."""
    if isinstance(op, (ops.MatMul, ops.Conv2d)):
        return int(op.weight.shape[0])
    if isinstance(op, ops.DepthwiseConv2d):
        return int(op.weight.shape[2])
    return 0


def _place(program: StreamProgram) -> None:
    """State: windows, queues, segment sums. Scratch: columns, from the step that makes them to the last that reads them."""
    state: list[Buffer] = []
    scratch: list[Buffer] = []

    def hold(name: str, size: int) -> None:
        program.places[name] = Buffer(name, size, 0, 0)
        state.append(program.places[name])

    waiting = queues(program)
    repeats = [index for index, step in enumerate(program.steps) if isinstance(step, Repeat)]
    last = len(program.steps)
    for index, step in enumerate(program.steps):
        if isinstance(step, Window):
            hold(step.output, (1 if step.running else step.size) * program.streams[step.source].bytes)
        elif isinstance(step, Keep):
            hold(queue_name(step), step.depth * program.streams[step.output].bytes)
        elif isinstance(step, Pool):
            hold(step.output, 2 * step.segments * program.streams[step.output].size)
        if not isinstance(step, Keep):
            for name in _reads(program, step):
                place = program.places.get(name)
                if place is not None and (index, name) not in waiting:
                    # What a repeated step reads from before the repetition is needed by its last turn too.
                    repeated = any(place.start < repeat < index for repeat in repeats)
                    place.end = max(place.end, last if repeated else index)
        if isinstance(step, Compute):
            _column(program, step, index, scratch)
        elif isinstance(step, Repeat):
            program.same[step.output] = step.source
    start = last + 1
    for index, step in enumerate(program.final, start):
        assert isinstance(step, Compute)
        for name in [] if isinstance(step.op, ops.SumPool) else _reads(program, step):
            program.places[name].end = max(program.places[name].end, index)
        _column(program, step, index, scratch, (step.op,))
    program.places[program.logits].end = start + len(program.final)
    program.state, program.scratch = _in_order(state), arrange(scratch)


def _column(
    program: StreamProgram, step: Compute, index: int, scratch: list[Buffer], pooled: tuple[ops.Op, ...] = ()
) -> None:
    sizes = {step.output: program.streams[step.output].bytes}
    sums = product_outputs(step.op)
    if isinstance(step.op, ops.SumPool):
        sums = program.streams[step.output].size
    if sums:
        sizes[f"{step.output}.sums32"] = 4 * sums
    if isinstance(step.op, (ops.MatMul, ops.Conv2d)):
        sizes[f"{step.output}.tables"] = TABLE_BYTES
    if isinstance(step.op, (ops.Conv2d, ops.DepthwiseConv2d, ops.MaxPool, ops.SumPool)) and step.op not in pooled:
        window = across(program, step.op)
        if not window.plain:
            channels = op_input_shape(program, step.op)[2]
            sizes[f"{step.output}.patch"] = window.depth * window.size * channels
    for name, size in sizes.items():
        program.places[name] = Buffer(name, size, index, index)
        scratch.append(program.places[name])


def _in_order(buffers: list[Buffer]) -> int:
    offset = 0
    for buffer in buffers:
        buffer.offset = offset
        offset += -(-buffer.size // 4) * 4
    return offset


def product_rows(program: StreamProgram) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, weights [outputs, inputs] as a column orders its inputs, storage) of every matrix product."""
    for step in [*program.steps, *program.final]:
        if isinstance(step, Compute) and isinstance(step.op, (ops.MatMul, ops.Conv2d)):
            yield step.output, rows_of(program, step.op), step.op.weight.storage


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
