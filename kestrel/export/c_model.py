"""An integer graph as C99 source: model.c and model.h on top of runtime/include/kestrel.h.

The source is readable and the same for the same graph: one constant descriptor and one call per op, weights packed at
their bits, all tensors in one static arena (kestrel.lower.memory).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kestrel.export.c_frontend import WavInput
from kestrel.export.c_ops import statements
from kestrel.export.c_scan import scan_parts
from kestrel.export.c_text import block, escaped
from kestrel.export.c_writer import Writer
from kestrel.lower.graph import IntegerGraph, Scan
from kestrel.lower.memory import Plan, is_view, plan_memory, program_ops, returned_output

PREFIX = "kestrel_model"


@dataclass(frozen=True)
class CModel:
    """`source` (model.c) and `header` (model.h); bytes of constants by section; names of traced tensors by number."""

    source: str
    header: str
    plan: Plan
    sections: Mapping[str, int]
    traced: tuple[str, ...]
    streaming: bool
    wav: WavInput | None = None

    @property
    def constants(self) -> int:
        """Bytes of all constants of the model; those of a front end and the code come on top."""
        return sum(self.sections.values())


def generate(graph: IntegerGraph, classes: Sequence[str] = (), wav: WavInput | None = None) -> CModel:
    """C source of `graph`: features (int16) -> logits (int32), bit by bit as the graph computes them.

    With `wav` the host program takes sound, too. Raises KestrelError where the graph has no C form.
    """
    return _Source(graph, tuple(classes), wav).model()


class _Source:
    def __init__(self, graph: IntegerGraph, classes: tuple[str, ...], wav: WavInput | None) -> None:
        self.graph, self.classes, self.wav = graph, classes, wav
        self.output = returned_output(graph)
        self.plan = plan_memory(graph)
        self.tensors = {name: tensor for name, tensor, _ in graph.all_tensors()}
        self.writer = Writer(self.plan)
        self._first_value = 0  # of the features, that a streaming model reads

    def model(self) -> CModel:
        scans = [op for op in program_ops(self.graph) if isinstance(op, Scan)]
        operations = program_ops(self.graph)
        body: list[str] = []
        streaming = len(scans) == 1 and self._streams(scans[0])
        for op in operations:
            if not isinstance(op, Scan):
                body += statements(self.writer, op, self.graph)
                continue
            name = self.writer.identifier(op.outputs[0] if op.outputs else "scan", "scan")
            begin, loop, traces = scan_parts(self.writer, op, name, self.graph.tensors)
            if streaming:
                self._entry_points(op, name, begin)
                body = traces
            else:
                body += [*begin, *loop, *traces]
        final = self._final()
        source = self._source(body + final, scans[0] if streaming else None)
        return CModel(source, self._header(scans[0] if streaming else None), self.plan, self.writer.sections,
                      tuple(self.writer.traced), streaming, self.wav)  # fmt: skip

    def _streams(self, scan: Scan) -> bool:
        """Whether features can be given frame by frame: nothing is computed in front of the only scan."""
        tensors = self.graph.tensors
        operations = program_ops(self.graph)
        place = operations.index(scan)
        own = all(self.plan.places[name].buffer is None for name in scan.inputs)
        later = any(self.plan.places[name].buffer is None for op in operations[place + 1 :] for name in op.inputs)
        ahead = all(is_view(op, tensors) for op in operations[:place])
        return len(scan.inputs) == 1 and own and ahead and not later

    def _entry_points(self, scan: Scan, name: str, begin: list[str]) -> None:
        tensor = self.graph.tensors[scan.inputs[0]]
        place = self.plan.places[scan.inputs[0]]
        self._first_value = place.at * 8 // place.bits
        self.writer.functions.append(
            f"static int32_t position; /* frames that were pushed */\n\n"
            f"void {PREFIX}_init(void) {{\n    position = 0;\n" + block(begin) + "}\n"
        )
        self.writer.functions.append(
            f"void {PREFIX}_push_frame(const int16_t *frame) {{\n"
            f"    if (position < {tensor.shape[0]}) {{\n        {name}_step(position++, frame);\n    }}\n}}\n"
        )

    def _final(self) -> list[str]:
        tensor = self.tensors[self.output]
        descriptor = self.writer.copy(1, tensor.size, tensor.size, tensor.size, self.writer.place(self.output).bits, 32)
        return [f"kestrel_copy(&{self.writer.constant('logits, out', 'kestrel_copy_op', descriptor)}, logits, "
                f"{self.writer.pointer(self.output)});"]  # fmt: skip

    def _source(self, body: list[str], streaming: Scan | None) -> str:
        parts = [
            "/* Made by Kestrel from an integer model; docs/integer.md states the arithmetic. */\n"
            '#include "model.h"\n\n#include <string.h>\n\n#include "kestrel.h"\n',
            "/* Every tensor lies in here; tensors that are not alive at the same time share bytes. */\n"
            f"static union {{\n    uint8_t bytes[{PREFIX.upper()}_RAM_BYTES];\n    int16_t words[1];\n"
            "    int32_t aligned[1];\n} memory;\n"
            f"typedef char {PREFIX}_fits_its_plan[sizeof memory == {PREFIX.upper()}_RAM_BYTES ? 1 : -1];\n\n"
            "#define AT(offset) ((void *)(memory.bytes + (offset)))\n"
            "#define PART(pointer, offset) ((const void *)((const uint8_t *)(pointer) + (offset)))\n\n"
            "/* Compiled with KESTREL_TRACE the model shows every tensor that it computes. */\n"
            "#ifdef KESTREL_TRACE\n#define TRACE(tensor, values, bits, count) kestrel_trace(tensor, values, bits, count)\n"
            "#else\n#define TRACE(tensor, values, bits, count) ((void)0)\n#endif\n",
            *self.writer.constants,
            *self.writer.functions,
        ]
        if streaming is None:
            parts.append(f"void {PREFIX}_run(const int16_t *features, int32_t *logits) {{\n" + block(body) + "}\n")
        else:
            tensor = self.graph.tensors[streaming.inputs[0]]
            width = math.prod(tensor.shape[1:])
            start = f" + {self._first_value}" if self._first_value else ""
            parts.append(f"void {PREFIX}_finish(int32_t *logits) {{\n" + block(body) + "}\n")
            parts.append(
                f"void {PREFIX}_run(const int16_t *features, int32_t *logits) {{\n    int32_t t;\n"
                f"    {PREFIX}_init();\n    for (t = 0; t < {tensor.shape[0]}; t++) {{\n"
                f"        {PREFIX}_push_frame(features{start} + t * {width});\n    }}\n"
                f"    {PREFIX}_finish(logits);\n}}\n"
            )
        return "\n".join(parts)

    def _header(self, streaming: Scan | None) -> str:
        macro = PREFIX.upper()
        tensor = self.graph.tensors[self.graph.inputs[0]]
        shape = " x ".join(map(str, tensor.shape))
        scale = "" if tensor.scale is None else f", real value = code * {tensor.scale!r}"
        logits = self.tensors[self.output]
        step = "" if logits.scale is None else f", real value = code * {logits.scale!r}"
        classes = ", ".join(f'"{escaped(name)}"' for name in self.classes)
        lines = [
            "/* Made by Kestrel from an integer model.",
            " *",
            f" * features: int16 [{shape}], row-major, {tensor.low}..{tensor.high}{scale}",
            f" * logits: int32 [{logits.size}], {logits.low}..{logits.high}{step}",
            f" * RAM: {self.plan.size} bytes of static memory for all tensors"
            + (f", {self.plan.bytes_of(self.plan.states)} of them states" if self.plan.states else ""),
            " * One inference at a time: all threads of a program share this memory.",
            " * constants: "
            + ", ".join(f"{size} bytes of {name}" for name, size in self.writer.sections.items() if size),
            " */",
            f"#ifndef {macro}_H",
            f"#define {macro}_H",
            "",
            "#include <stdint.h>",
            "",
            f"#define {macro}_FEATURES {tensor.size}",
            f"#define {macro}_LOGITS {logits.size}",
            f"#define {macro}_RAM_BYTES {self.plan.size}",
            f"#define {macro}_CONSTANT_BYTES {sum(self.writer.sections.values())}",
            *([f"#define {macro}_CLASS_NAMES {{{classes}}}"] if classes else []),
        ]
        if self.wav is not None:
            lines += [
                f"#define {macro}_CLIP_SAMPLES {self.wav.clip_samples}",
                f"#define {macro}_FEATURE_SHIFT ({self.wav.shift}) /* feature = code of the front end / 2^this */",
            ]
        if streaming is not None:
            steps = self.graph.tensors[streaming.inputs[0]]
            lines += [
                "",
                "/* Frame by frame: init, then push_frame for each frame as it comes, then finish. Values of `features`",
                f" * before {macro}_FIRST_VALUE and behind the last frame are not used. */",
                f"#define {macro}_FRAMES {steps.shape[0]}",
                f"#define {macro}_FRAME_VALUES {math.prod(steps.shape[1:])}",
                f"#define {macro}_FIRST_VALUE {self._first_value}",
                f"void {PREFIX}_init(void);",
                f"void {PREFIX}_push_frame(const int16_t *frame);",
                f"void {PREFIX}_finish(int32_t *logits);",
            ]
        lines += ["", "/* The whole clip at once. */",
                  f"void {PREFIX}_run(const int16_t *features, int32_t *logits);", "", "#endif", ""]  # fmt: skip
        return "\n".join(lines)
