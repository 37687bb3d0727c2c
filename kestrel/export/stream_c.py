"""C source of a streamed network: stream_model.c and stream_model.h, from a program of kestrel.lower.stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kestrel.export.c_text import block, escaped
from kestrel.export.stream_pack import pack_matrix, straight_cost
from kestrel.export.stream_writer import Layer, Writer
from kestrel.lower import ops
from kestrel.lower.stream_steps import Compute, Pool, StreamProgram, rows_of

SOURCE, HEADER = "stream_model.c", "stream_model.h"
CODE_BYTES = 3.3  # of a compressed RV32E instruction in straight lines, with the loads that the compiler adds
TABLE_INSTRUCTIONS = 8  # of the table kernel, for each weight of up to 4 bits


@dataclass(frozen=True)
class StreamModel:
    """The C files of a streamed network. `layers` say how each product is computed."""

    program: StreamProgram
    files: dict[str, str]
    layers: tuple[Layer, ...]
    constants: int  # bytes of arrays that the network takes


def stream_model(program: StreamProgram, classes: Sequence[str] = (), straight: Iterable[str] = ()) -> StreamModel:
    """The C files. `straight`: products that become straight-line code (see `choose_straight`)."""
    writer = Writer(program, frozenset(straight))
    column, final = writer.column(), writer.final()
    streams = program.streams
    features, logits = streams[program.features], streams[program.logits]
    pool = next(step for step in program.steps if isinstance(step, Pool))
    source = [
        "/* Made by Kestrel from an integer model; docs/microcontroller.md states how it runs. Do not edit. */\n",
        f'#include "{HEADER}"\n\n#include "kestrel_stream.h"\n\n',
        "\n".join(writer.arrays),
        f"\nstatic uint8_t state[{program.state}] __attribute__((aligned(4)));\n",
        "static uint8_t columns, segment, full;\n",
        f"static uint8_t wait[{len(writer.waits)}];\n" if writer.waits else "",
        f"static uint8_t held[{len(writer.queues)}];\n" if writer.queues else "",
        "\n" + "\n".join(writer.functions) if writer.functions else "",
        "\nvoid kestrel_stream_start(void)\n{\n",
        block(
            [
                f"kestrel_stream_clear(state, {program.state});",
                *(f"wait[{number}] = {first};" for number, (first, _) in enumerate(writer.waits)),
                *(f"held[{number}] = 0;" for number in range(len(writer.queues))),
                "columns = segment = full = 0;",
            ]
        ),
        "}\n\nint kestrel_stream_column(const int16_t *features, uint8_t *scratch)\n{\n",
        block([*_locals(column), *column, "return done;"]),
        "}\n\nvoid kestrel_stream_logits(uint8_t *scratch, int32_t *logits)\n{\n",
        block(["int place;", *final]),
        "}\n",
    ]
    return StreamModel(
        program,
        {
            SOURCE: "".join(source),
            HEADER: _header(program, classes, features.length or 0, features.size, logits.size, pool),
        },
        tuple(writer.layers),
        writer.constants,
    )


def _locals(lines: Sequence[str]) -> list[str]:
    text = "\n".join(lines)
    turns = [f"turn{depth}" for depth in range(8) if f"turn{depth}" in text]
    places = ["place"] if "place" in text else []
    return [f"int {', '.join([*places, *turns, 'done = 0'])};"]


def _header(program: StreamProgram, classes: Sequence[str], frames: int, width: int, logits: int, pool: Pool) -> str:
    names = ""
    if classes:
        names = "#define KESTREL_STREAM_CLASS_NAMES {" + ", ".join(f'"{escaped(name)}"' for name in classes) + "}\n"
    return f"""/* Made by Kestrel from an integer model; docs/microcontroller.md states how it runs. Do not edit. */
#ifndef STREAM_MODEL_H
#define STREAM_MODEL_H

#include <stdint.h>

#define KESTREL_STREAM_FRAMES {frames}  /* of a clip */
#define KESTREL_STREAM_WIDTH {width}   /* features of a frame */
#define KESTREL_STREAM_LOGITS {logits}
#define KESTREL_STREAM_SEGMENTS {pool.segments}
#define KESTREL_STREAM_STATE_BYTES {program.state}
#define KESTREL_STREAM_SCRATCH_BYTES {program.scratch}
{names}
/* Start of a clip or of a stream. */
void kestrel_stream_start(void);

/*
 * Takes the next frame of features. Returns 1 where a segment of the clip has become full and as many as a clip has are
 * held: then kestrel_stream_logits gives the logits of the latest clip length. `scratch` (KESTREL_STREAM_SCRATCH_BYTES,
 * aligned to 4 bytes) may hold anything before and after.
 */
int kestrel_stream_column(const int16_t *features, uint8_t *scratch);

/* logits [KESTREL_STREAM_LOGITS] */
void kestrel_stream_logits(uint8_t *scratch, int32_t *logits);

#endif
"""


def choose_straight(program: StreamProgram, budget: int) -> list[str]:
    """Products that become code within `budget` bytes of flash: those that save most instructions for each byte first."""
    offers = []
    for step in [*program.steps, *program.final]:
        if not isinstance(step, Compute) or not isinstance(step.op, (ops.MatMul, ops.Conv2d)):
            continue
        rows = rows_of(program, step.op)
        packed = pack_matrix(rows, step.op.weight.storage)
        cost = straight_cost(rows)
        grown = round(CODE_BYTES * cost) - packed.bytes
        nibbles = packed.words.size * 4
        saved = (TABLE_INSTRUCTIONS * nibbles - cost) * (program.streams[step.output].length or 1)
        offers.append((saved / max(1, grown), grown, step.output))
    chosen, left = [], budget
    for gain, grown, name in sorted(offers, reverse=True):
        if gain > 0 and grown <= left:
            chosen.append(name)
            left -= grown
    return chosen
