"""A simulated clip: every stream of a program gets the columns that its graph gives it; what runs ahead waits in queues."""

from __future__ import annotations

from kestrel.errors import KestrelError
from kestrel.lower.stream_steps import Keep, Pool, Repeat, Step, StreamProgram, Window, reads_of


def simulate(program: StreamProgram) -> None:
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
            for name in dict.fromkeys(reads_of(program, step)):
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
