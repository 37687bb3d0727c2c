"""Memory of a program that takes one column at a time: what lives from column to column, and scratch."""

from __future__ import annotations

from kestrel.lower import ops
from kestrel.lower.memory import Buffer, arrange
from kestrel.lower.stream_steps import (
    Compute,
    Keep,
    Pool,
    Repeat,
    StreamProgram,
    Window,
    across,
    op_input_shape,
    queues,
    reads_of,
)

TABLE_BYTES = 128  # four tables of sixteen int16


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


def place(program: StreamProgram) -> None:
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
            for name in reads_of(program, step):
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
        for name in [] if isinstance(step.op, ops.SumPool) else reads_of(program, step):
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
