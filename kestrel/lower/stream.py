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

from kestrel.errors import KestrelError
from kestrel.lower import ops
from kestrel.lower.graph import IntegerGraph, Scan
from kestrel.lower.memory import returned_output
from kestrel.lower.stream_check import simulate
from kestrel.lower.stream_memory import place
from kestrel.lower.stream_steps import Compute, Pool, Repeat, Stream, StreamProgram, Window

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
SEGMENT_CHOICES = (4, 5, 3, 6, 2)


def stream_program(graph: IntegerGraph, segments: int | None = None) -> StreamProgram:
    """The program of a graph (best a narrow one) whose input is features [T, F].

    `segments`: parts that a clip's global pool is kept in, so that logits of the latest clip length can be had whenever one is
    full; None chooses 4, or what divides the columns. Raises KestrelError, one line, where the graph cannot be cut in time.
    """
    maker = _Maker(graph, segments)
    program = maker.make()
    simulate(program)
    place(program)
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
