"""An integer graph as C99 source: model.c and model.h on top of runtime/include/kestrel.h.

The source is readable and the same for the same graph: one constant descriptor and one call per op, weights packed at
their bits, all tensors in one static arena (kestrel.lower.memory).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kestrel.export.c_frontend import WavInput
from kestrel.export.c_pack import pack_rows
from kestrel.export.c_text import block, c_type, comment, escaped, listed, literal, numbers
from kestrel.lower import ops
from kestrel.lower.graph import IntegerGraph, Program, Scan, State
from kestrel.lower.memory import (
    Place,
    Plan,
    is_view,
    moved_state,
    plan_memory,
    program_ops,
    replaced_states,
    returned_output,
    saved_name,
    unpack_rows,
)
from kestrel.lower.ops import Op, Window
from kestrel.lower.tensor import Constant, Tensor, storage_of
from kestrel.quant.integer import Rescale

PREFIX = "kestrel_model"
MAX_RANK = 6  # KESTREL_RANK
DOUBLE_BITS = 53  # integers below 2^53 are exact in double
PANEL = 16  # most lanes of a vector
ROWS = 4  # rows of inputs that a vector kernel takes at once

_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register "
    "restrict return short signed sizeof static struct switch typedef union unsigned void volatile while memory "
    "features frame logits main step".split()
)


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
    return _Writer(graph, tuple(classes), wav).model()


class _Writer:
    def __init__(self, graph: IntegerGraph, classes: tuple[str, ...], wav: WavInput | None) -> None:
        self.graph, self.classes, self.wav = graph, classes, wav
        self.output = returned_output(graph)
        self.plan = plan_memory(graph)
        self.tensors = {name: tensor for name, tensor, _ in graph.all_tensors()}
        self.constants: list[str] = []
        self.functions: list[str] = []
        self.sections = {"weights": 0, "scaling": 0, "tables": 0, "initial states": 0}
        self.traced: list[str] = []
        self._arrays: dict[tuple[str, bytes], str] = {}
        self._identifiers: dict[str, str] = {}
        self._taken: set[str] = set(_KEYWORDS)
        self._first_value = 0  # of the features, that a streaming model reads

    # -------------------------------------------------------------------------------------------------------- whole

    def model(self) -> CModel:
        scans = [op for op in program_ops(self.graph) if isinstance(op, Scan)]
        operations = program_ops(self.graph)
        body: list[str] = []
        streaming = len(scans) == 1 and self._streams(scans[0])
        for op in operations:
            if not isinstance(op, Scan):
                body += self._op(op, self.graph)
                continue
            name = self._identifier(op.outputs[0] if op.outputs else "scan", "scan")
            begin, loop, traces = self._scan(op, name)
            if streaming:
                self._entry_points(op, name, begin)
                body = traces
            else:
                body += [*begin, *loop, *traces]
        final = self._final()
        source = self._source(body + final, scans[0] if streaming else None)
        return CModel(source, self._header(scans[0] if streaming else None), self.plan, self.sections,
                      tuple(self.traced), streaming, self.wav)  # fmt: skip

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
        self.functions.append(
            f"static int32_t position; /* frames that were pushed */\n\n"
            f"void {PREFIX}_init(void) {{\n    position = 0;\n" + block(begin) + "}\n"
        )
        self.functions.append(
            f"void {PREFIX}_push_frame(const int16_t *frame) {{\n"
            f"    if (position < {tensor.shape[0]}) {{\n        {name}_step(position++, frame);\n    }}\n}}\n"
        )

    def _final(self) -> list[str]:
        tensor = self.tensors[self.output]
        descriptor = self._copy(1, tensor.size, tensor.size, tensor.size, self._place(self.output).bits, 32)
        return [f"kestrel_copy(&{self._constant('logits, out', 'kestrel_copy_op', descriptor)}, logits, "
                f"{self._pointer(self.output)});"]  # fmt: skip

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
            *self.constants,
            *self.functions,
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
            " * constants: " + ", ".join(f"{size} bytes of {name}" for name, size in self.sections.items() if size),
            " */",
            f"#ifndef {macro}_H",
            f"#define {macro}_H",
            "",
            "#include <stdint.h>",
            "",
            f"#define {macro}_FEATURES {tensor.size}",
            f"#define {macro}_LOGITS {logits.size}",
            f"#define {macro}_RAM_BYTES {self.plan.size}",
            f"#define {macro}_CONSTANT_BYTES {sum(self.sections.values())}",
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

    # -------------------------------------------------------------------------------------------------------- names

    def _identifier(self, name: str, suffix: str = "") -> str:
        key = f"{name}\0{suffix}"
        if key not in self._identifiers:
            base = re.sub(r"\W+", "_", f"{name}_{suffix}" if suffix else name, flags=re.ASCII)
            base = base if not base[:1].isdigit() and not base.startswith("_") else f"t{base}"
            found, number = base, 1
            while found in self._taken or found.lower().startswith("kestrel"):
                number += 1
                found = f"{base}_{number}" if not base.lower().startswith("kestrel") else f"t_{base}_{number}"
            self._taken.add(found)
            self._identifiers[key] = found
        return self._identifiers[key]

    def _place(self, name: str) -> Place:
        return self.plan.places[name]

    def _pointer(self, name: str) -> str:
        place = self._place(name)
        if place.step is not None:
            return (
                f"PART({self._identifier(place.step, 'in')}, {place.at})"
                if place.at
                else self._identifier(place.step, "in")
            )
        if place.buffer is None:
            return f"PART(features, {place.at})" if place.at else "features"
        return f"AT({place.offset})"

    def _constant(self, name: str, kind: str, fields: str) -> str:
        identifier = self._identifier(name, "op")
        self.constants.append(f"static const {kind} {identifier} = {{\n{fields}}};\n")
        return identifier

    def _array(self, values: np.ndarray, name: str, section: str, note: str = "") -> str:
        """A constant array; equal ones are written once."""
        kind = f"{values.dtype.name}_t"
        key = kind, values.tobytes()
        if key not in self._arrays:
            identifier = self._identifier(name)
            self._arrays[key] = identifier
            self.sections[section] += values.nbytes
            headline = f"/* {comment(note)} */\n" if note else ""
            rows = numbers(values.reshape(-1).tolist() or [0])
            self.constants.append(
                f"{headline}static const {kind} {identifier}[{max(1, values.size)}] = {{\n{rows}}};\n"
            )
        return self._arrays[key]

    # ------------------------------------------------------------------------------------------------------- fields

    def _rescale(self, rescale: Rescale | None, x: tuple[int, int], name: str) -> str:
        """Field `rescale`; x is the range in front of it."""
        if rescale is None:
            return "    .rescale = {.multipliers = NULL},\n"
        multipliers = self._array(np.array(rescale.multipliers, np.int32), f"{name}, multipliers", "scaling")
        offsets = "NULL"
        if any(rescale.offsets):
            offsets = self._array(np.array(rescale.offsets, np.int32), f"{name}, offsets", "scaling")
        product = max(abs(x[0]), abs(x[1])) * max(abs(m) for m in rescale.multipliers)
        reached = product + max(abs(o) for o in rescale.offsets) + (1 << rescale.shift)
        narrow = 1 if reached < 1 << 31 else 2 if reached < 1 << DOUBLE_BITS else 0
        return (
            f"    .rescale = {{.multipliers = {multipliers}, .offsets = {offsets},"
            f" .multiplier_step = {int(len(rescale.multipliers) > 1)}, .offset_step = {int(len(rescale.offsets) > 1)},\n"
            f"                .shift = {rescale.shift}, .narrow = {narrow}, .low = {literal(rescale.low)},"
            f" .high = {literal(rescale.high)}}},\n"
        )

    def _weights(self, values: np.ndarray, constant: Constant, name: str) -> str:
        packed = pack_rows(values, constant.storage)
        note = f"{name}: weights {' x '.join(map(str, values.shape))}, {constant.storage}"
        array = self._array(packed.array, f"{name}, weights", "weights", note)
        return (
            f"    .weights = {{.data = {array}, .kind = {packed.kind}, .bits = {packed.bits},"
            f" .field_bits = {packed.field_bits}, .row_bytes = {packed.row_bytes}}},\n"
        )

    def _bias(self, bias: Constant | None, name: str) -> str:
        found = "NULL" if bias is None else self._array(bias.values.astype(np.int32), f"{name}, bias", "weights")
        return f"    .bias = {found},\n"

    @staticmethod
    def _window(window: Window, shape: Sequence[int], out: Sequence[int]) -> str:
        return (
            f"    .window = {{.height = {shape[0]}, .width = {shape[1]}, .channels = {shape[2]},"
            f" .out_height = {out[0]}, .out_width = {out[1]},\n"
            f"               .size_y = {window.size[0]}, .size_x = {window.size[1]}, .stride_y = {window.stride[0]},"
            f" .stride_x = {window.stride[1]}, .top = {window.before[0]}, .left = {window.before[1]}}},\n"
        )

    @staticmethod
    def _copy(outer: int, inner: int, x_stride: int, y_stride: int, x_bits: int, y_bits: int) -> str:
        return (
            f"    .outer = {outer}, .inner = {inner}, .x_stride = {x_stride}, .y_stride = {y_stride},"
            f" .x_bits = {x_bits}, .y_bits = {y_bits},\n"
        )

    def _bits(self, *names: str) -> tuple[int, ...]:
        return tuple(self._place(name).bits for name in names)

    # ---------------------------------------------------------------------------------------------------------- ops

    def _op(self, op: Op, program: Program) -> list[str]:
        """Statements that run `op`; its constants are added."""
        lines = [f"/* {comment(self._headline(op, program))} */"]
        if type(op) not in _EMIT and not is_view(op, program.tensors):
            raise op.problem("it has no C form")
        if not is_view(op, program.tensors):
            lines += _EMIT[type(op)](self, op, program.tensors)
        for name in op.outputs:
            self.traced.append(name)
            bits, size = self._place(name).bits, program.tensors[name].size
            lines.append(f"TRACE({len(self.traced) - 1}, {self._pointer(name)}, {bits}, {size});")
        return lines

    def _headline(self, op: Op, program: Program) -> str:
        made = ", ".join(
            f"{name} int{self._place(name).bits} [{' x '.join(map(str, program.tensors[name].shape))}]"
            for name in op.outputs
        )
        return f"{made} = {type(op).__name__}({', '.join(op.inputs)})"

    def _call(self, function: str, kind: str, op: Op, fields: str, *pointers: str) -> list[str]:
        descriptor = self._constant(op.outputs[0], f"kestrel_{kind}_op", fields)
        return [f"kestrel_{function}(&{descriptor}, {', '.join(pointers)});"]

    def _scratch(self, op: Op) -> str:
        buffer = self.plan.scratch.get(op.outputs[0])
        return "NULL" if buffer is None else f"AT({buffer.offset})"

    def _requantise(self, op: ops.Requantise, tensors: dict[str, Tensor]) -> list[str]:
        x, y = tensors[op.inputs[0]], op.outputs[0]
        channels = x.shape[-1] if max(len(op.rescale.multipliers), len(op.rescale.offsets)) > 1 else x.size
        x_bits, y_bits = self._bits(op.inputs[0], y)
        fields = self._rescale(op.rescale, (x.low, x.high), y) + (
            f"    .rows = {x.size // channels}, .channels = {channels}, .x_bits = {x_bits}, .y_bits = {y_bits},\n"
        )
        return self._call("requantise", "requantise", op, fields, self._pointer(y), self._pointer(op.inputs[0]))

    def _add(self, op: ops.AddRequantise, tensors: dict[str, Tensor]) -> list[str]:
        y = op.outputs[0]
        multipliers = self._array(np.array(op.multipliers, np.int32), f"{y}, multipliers", "scaling")
        bits = self._array(np.array(self._bits(*op.inputs), np.uint8), f"{y}, bits", "scaling")
        sizes = zip((tensors[name].magnitude for name in op.inputs), op.multipliers, strict=True)
        narrow = int(sum(size * abs(m) for size, m in sizes) + (1 << op.shift) < 1 << 31)
        fields = (
            f"    .multipliers = {multipliers}, .x_bits = {bits}, .inputs = {len(op.inputs)},"
            f" .size = {tensors[y].size},\n    .low = {literal(op.low)}, .high = {literal(op.high)},"
            f" .shift = {op.shift}, .y_bits = {self._place(y).bits}, .narrow = {narrow},\n"
        )
        inputs = ", ".join(self._pointer(name) for name in op.inputs)
        return self._call("add", "add", op, fields, self._pointer(y), f"(const void *const[]){{{inputs}}}")

    def _multiply(self, op: ops.Multiply, tensors: dict[str, Tensor]) -> list[str]:
        a, b = (tensors[name] for name in op.inputs)
        y = op.outputs[0]
        per_channel = op.rescale is not None and max(len(op.rescale.multipliers), len(op.rescale.offsets)) > 1
        shape, strides = _broadcast(a.shape, b.shape, per_channel)
        if len(shape) > MAX_RANK:
            raise op.problem(f"C code takes at most {MAX_RANK} dimensions")
        corners = [p * q for p in (a.low, a.high) for q in (b.low, b.high)]
        a_bits, b_bits, y_bits = self._bits(*op.inputs, y)
        fields = self._rescale(op.rescale, (min(corners), max(corners)), y) + (
            f"    .rank = {len(shape)}, .shape = {{{listed(shape)}}}, .b_stride = {{{listed(strides)}}},\n"
            f"    .a_bits = {a_bits}, .b_bits = {b_bits}, .y_bits = {y_bits},\n"
        )
        pointers = (self._pointer(name) for name in (y, *op.inputs))
        return self._call("multiply", "multiply", op, fields, *pointers)

    def _lookup(self, op: ops.Lookup, tensors: dict[str, Tensor]) -> list[str]:
        y, x = op.outputs[0], op.inputs[0]
        x_bits, y_bits = self._bits(x, y)
        table = self._array(op.table.values.astype(f"int{y_bits}"), f"{y}, table", "tables")
        fields = (
            f"    .table = {table}, .first = {literal(op.first)}, .size = {tensors[y].size}, .x_bits = {x_bits},"
            f" .y_bits = {y_bits},\n"
        )
        return self._call("lookup", "lookup", op, fields, self._pointer(y), self._pointer(x))

    def _interpolate(self, op: ops.Interpolate, tensors: dict[str, Tensor]) -> list[str]:
        y, x = op.outputs[0], op.inputs[0]
        x_bits, y_bits = self._bits(x, y)
        values = op.nodes.values.astype(storage_of(op.nodes.values))
        nodes = self._array(values, f"{y}, nodes", "tables")
        fields = (
            f"    .nodes = {nodes}, .first = {literal(op.first)}, .size = {tensors[y].size}, .low = {literal(op.low)},"
            f" .high = {literal(op.high)},\n    .step_bits = {op.step_bits}, .node_bits = {8 * values.itemsize},"
            f" .x_bits = {x_bits}, .y_bits = {y_bits},\n"
        )
        return self._call("interpolate", "interpolate", op, fields, self._pointer(y), self._pointer(x))

    def _delta(self, op: ops.DeltaUpdate, tensors: dict[str, Tensor]) -> list[str]:
        x, ref, delta, following = self._bits(*op.inputs, *op.outputs)
        fields = (
            f"    .threshold = {op.threshold}, .size = {tensors[op.inputs[0]].size}, .x_bits = {x}, .ref_bits = {ref},"
            f" .delta_bits = {delta}, .next_bits = {following},\n"
        )
        pointers = (self._pointer(name) for name in (*op.outputs, *op.inputs))
        return self._call("delta", "delta", op, fields, *pointers)

    def _matmul(self, op: ops.MatMul, tensors: dict[str, Tensor]) -> list[str]:
        x, y = tensors[op.inputs[0]], op.outputs[0]
        outputs, width = op.weight.shape
        x_bits, y_bits = self._bits(op.inputs[0], y)
        fields = (
            self._weights(op.weight.values, op.weight, y)
            + self._bias(op.bias, y)
            + self._rescale(op.rescale, _sums(op, op.weight.values, op.bias, x), y)
            + f"    .rows = {x.size // width}, .width = {width}, .outputs = {outputs},"
            f" .unpack_rows = {unpack_rows(op.weight)}, .x_bits = {x_bits}, .y_bits = {y_bits},\n"
            + self._panels(op, outputs, width)
        )
        return self._product("matmul", op, fields)

    def _prepared(self, op: Op, weight_bytes: int, sums: int, row_bytes: int) -> str:
        """Field `prepared`: memory for the vector kernels of computers, absent elsewhere."""
        name = self._identifier(op.outputs[0], "prepared")
        self.constants.append(f"KESTREL_PREPARED({name}, {weight_bytes}, {sums}, {row_bytes})\n")
        return f"    KESTREL_USE({name})\n"

    def _panels(self, op: Op, outputs: int, length: int) -> str:
        """`prepared` of products [outputs, length]: int16 weights in panels, rows of int16."""
        row = 2 * (length + length % 2)
        padded = -(-outputs // PANEL) * PANEL
        return self._prepared(op, padded * row, padded, ROWS * row)

    def _product(self, kind: str, op: Op, fields: str) -> list[str]:
        pointers = self._pointer(op.outputs[0]), self._pointer(op.inputs[0]), self._scratch(op)
        return self._call(kind, kind, op, fields, *pointers)

    def _accumulate(self, op: ops.Accumulate, tensors: dict[str, Tensor]) -> list[str]:
        outputs, width = op.weight.shape
        d_bits, y_bits = self._bits(op.inputs[1], op.outputs[0])
        fields = self._weights(op.weight.values.T, op.weight, op.outputs[0]) + (
            f"    .width = {width}, .outputs = {outputs}, .d_bits = {d_bits}, .y_bits = {y_bits},\n"
        )
        pointers = (self._pointer(name) for name in (op.outputs[0], *op.inputs))
        return self._call("accumulate", "accumulate", op, fields, *pointers, self._scratch(op))

    def _conv(self, op: ops.Conv2d, tensors: dict[str, Tensor]) -> list[str]:
        x, y = tensors[op.inputs[0]], op.outputs[0]
        flat = op.weight.values.reshape(op.weight.shape[0], -1)
        x_bits, y_bits = self._bits(op.inputs[0], y)
        fields = (
            self._weights(flat, op.weight, y)
            + self._bias(op.bias, y)
            + self._rescale(op.rescale, _sums(op, flat, op.bias, x), y)
            + self._window(op.window, x.shape, tensors[y].shape)
            + f"    .outputs = {len(flat)}, .unpack_rows = {unpack_rows(op.weight)}, .x_bits = {x_bits},"
            f" .y_bits = {y_bits},\n" + self._panels(op, *flat.shape)
        )
        return self._product("conv", op, fields)

    def _depthwise(self, op: ops.DepthwiseConv2d, tensors: dict[str, Tensor]) -> list[str]:
        x, y = tensors[op.inputs[0]], op.outputs[0]
        flat = op.weight.values.reshape(-1, op.weight.shape[-1])  # [place, channel]
        channels = -(-flat.shape[1] // (2 * PANEL)) * 2 * PANEL
        x_bits, y_bits = self._bits(op.inputs[0], y)
        fields = (
            self._weights(flat, op.weight, y)
            + self._bias(op.bias, y)
            + self._rescale(op.rescale, _sums(op, flat.T, op.bias, x), y)
            + self._window(op.window, x.shape, tensors[y].shape)
            + f"    .x_bits = {x_bits}, .y_bits = {y_bits},\n"
            + self._prepared(op, (len(flat) + 1) // 2 * 4 * channels, channels, 2 * channels)
        )
        return self._product("depthwise", op, fields)

    def _pool(self, op: ops.MaxPool | ops.SumPool, tensors: dict[str, Tensor]) -> list[str]:
        x, y = tensors[op.inputs[0]], op.outputs[0]
        count = math.prod(op.window.size)
        kind = "sum_pool" if isinstance(op, ops.SumPool) else "max_pool"
        rescale = op.rescale if isinstance(op, ops.SumPool) else None
        x_bits, y_bits = self._bits(op.inputs[0], y)
        fields = (
            self._rescale(rescale, (count * min(x.low, 0), count * max(x.high, 0)), y)
            + self._window(op.window, x.shape, tensors[y].shape)
            + f"    .x_bits = {x_bits}, .y_bits = {y_bits},\n"
        )
        return self._call(kind, "pool", op, fields, self._pointer(y), self._pointer(op.inputs[0]))

    def _upsample(self, op: ops.Upsample, tensors: dict[str, Tensor]) -> list[str]:
        height, width, channels = tensors[op.inputs[0]].shape
        fields = (
            f"    .height = {height}, .width = {width}, .channels = {channels}, .factor_y = {op.factor[0]},"
            f" .factor_x = {op.factor[1]}, .bits = {self._place(op.inputs[0]).bits},\n"
        )
        self._same_bits(op)
        return self._call("upsample", "upsample", op, fields, self._pointer(op.outputs[0]), self._pointer(op.inputs[0]))

    def _same_bits(self, op: Op) -> None:
        """Kernels that only move values do not change their width."""
        if len(set(self._bits(*op.inputs, *op.outputs))) > 1:
            raise op.problem("C code needs the features rescaled before they are moved")

    def _concat(self, op: ops.Concat, tensors: dict[str, Tensor]) -> list[str]:
        y = op.outputs[0]
        shape = tensors[y].shape
        outer, row, at = math.prod(shape[: op.axis]), math.prod(shape[op.axis :]), 0
        lines = []
        for place, name in enumerate(op.inputs):
            inner = tensors[name].size // outer
            x_bits, y_bits = self._bits(name, y)
            fields = self._copy(outer, inner, inner, row, x_bits, y_bits)
            descriptor = self._constant(f"{y}, part {place}", "kestrel_copy_op", fields)
            target = f"AT({self._place(y).offset + at * y_bits // 8})"
            lines.append(f"kestrel_copy(&{descriptor}, {target}, {self._pointer(name)});")
            at += inner
        return lines

    def _slice(self, op: ops.Slice, tensors: dict[str, Tensor]) -> list[str]:
        shape, y = tensors[op.inputs[0]].shape, op.outputs[0]
        outer, rest = math.prod(shape[: op.axis]), math.prod(shape[op.axis + 1 :])
        x_bits, y_bits = self._bits(op.inputs[0], y)
        fields = self._copy(outer, (op.stop - op.start) * rest, shape[op.axis] * rest, (op.stop - op.start) * rest,
                            x_bits, y_bits)  # fmt: skip
        source = f"PART({self._pointer(op.inputs[0])}, {op.start * rest * x_bits // 8})"
        return self._call("copy", "copy", op, fields, self._pointer(y), source)

    def _transpose(self, op: ops.Transpose, tensors: dict[str, Tensor]) -> list[str]:
        shape = tensors[op.inputs[0]].shape
        if len(shape) > MAX_RANK:
            raise op.problem(f"C code takes at most {MAX_RANK} dimensions")
        self._same_bits(op)
        strides = [math.prod(shape[axis + 1 :]) for axis in op.axes]
        fields = (
            f"    .rank = {len(shape)}, .shape = {{{listed(tensors[op.outputs[0]].shape)}}},"
            f" .x_stride = {{{listed(strides)}}}, .bits = {self._place(op.inputs[0]).bits},\n"
        )
        return self._call(
            "transpose", "transpose", op, fields, self._pointer(op.outputs[0]), self._pointer(op.inputs[0])
        )

    def _argmax(self, op: ops.ArgMax, tensors: dict[str, Tensor]) -> list[str]:
        x, y = op.inputs[0], op.outputs[0]
        bits = self._place(y).bits
        value = f"kestrel_argmax({self._pointer(x)}, {self._place(x).bits}, {tensors[x].size})"
        return [f"*({c_type(bits)} *){self._pointer(y)} = ({c_type(bits)}){value};"]

    # --------------------------------------------------------------------------------------------------------- scans

    def _scan(self, scan: Scan, name: str) -> tuple[list[str], list[str], list[str]]:
        """Statements that set the states, that run all steps, and that trace the outputs; adds the step function."""
        begin: list[str] = []
        for state in scan.states:
            begin += self._initial(state)
        stacked = list(zip(scan.outputs, scan.emitted, strict=False))
        parameters = [f"const void *{self._identifier(step, 'in')}" for step in scan.steps]
        body = [line for op in scan.body.ops for line in self._op(op, scan.body)]
        for out, inner in stacked:
            body += self._emit_row(out, inner)
        body += self._replace(scan)
        unused = [] if stacked else ["(void)t;"]
        unused += [f"(void){self._identifier(step, 'in')};" for step in scan.steps]
        signature = f"static void {name}_step(int32_t t, {', '.join(parameters)})"
        headline = f"/* One time step: {', '.join(scan.outputs)}. */\n"
        self.functions.append(f"{headline}{signature} {{\n{block([*unused, *body])}}}\n")
        length = self.graph.tensors[scan.inputs[0]].shape[0]
        arguments = []
        for source in scan.inputs:
            tensor = self.graph.tensors[source]
            row = tensor.size // tensor.shape[0] * self._place(source).bits // 8
            arguments.append(f"PART({self._pointer(source)}, t * {row})")
        call = [f"for (int32_t t = 0; t < {length}; t++) {{", f"    {name}_step(t, {', '.join(arguments)});", "}"]
        traces = []
        for out in scan.outputs:
            self.traced.append(out)
            bits, size = self._place(out).bits, self.graph.tensors[out].size
            traces.append(f"TRACE({len(self.traced) - 1}, {self._pointer(out)}, {bits}, {size});")
        return begin, call, traces

    def _initial(self, state: State) -> list[str]:
        place = self._place(state.name)
        if state.initial is None:
            return [f"memset({self._pointer(state.name)}, 0, {state.tensor.bytes}); /* {comment(state.name)} */"]
        array = self._array(state.initial.values.astype(f"int{place.bits}"), f"{state.name}, initial", "initial states")
        return [f"memcpy({self._pointer(state.name)}, {array}, {state.tensor.bytes}); /* {comment(state.name)} */"]

    def _emit_row(self, out: str, inner: str) -> list[str]:
        x_bits, y_bits = self._bits(inner, out)
        size = self.tensors[inner].size
        target = f"AT({self._place(out).offset} + t * {size * y_bits // 8})"
        descriptor = self._constant(f"{out}, row", "kestrel_copy_op", self._copy(1, size, size, size, x_bits, y_bits))
        return [f"kestrel_copy(&{descriptor}, {target}, {self._pointer(inner)}); /* {comment(out)} */"]

    def _replace(self, scan: Scan) -> list[str]:
        """All states take their next values, together."""
        done = replaced_states(scan)
        saved, lines = [], []
        for state in scan.states:
            if state.next == state.name or done.get(state.next) == state.name:
                continue
            x_bits, y_bits = self._bits(state.next, state.name)
            size = state.tensor.size
            fields = self._copy(1, size, size, size, x_bits, y_bits)
            descriptor = self._constant(f"{state.name}, next", "kestrel_copy_op", fields)
            source = self._pointer(state.next)
            if moved_state(scan, state):
                waiting = f"AT({self._place(saved_name(state)).offset})"
                saved.append(f"kestrel_copy(&{descriptor}, {waiting}, {source});")
                lines.append(f"memcpy({self._pointer(state.name)}, {waiting}, {state.tensor.bytes});")
            else:
                lines.append(f"kestrel_copy(&{descriptor}, {self._pointer(state.name)}, {source});")
        return [*saved, *lines]


def _sums(op: Op, flat: np.ndarray, bias: Constant | None, x: Tensor) -> tuple[int, int]:
    """Bounds of the accumulators of a linear op."""
    return ops.sum_range(flat, None if bias is None else bias.values, x.low, x.high)


def _broadcast(a: Sequence[int], b: Sequence[int], keep_last: bool) -> tuple[list[int], list[int]]:
    """Shape of a and strides of b with as few axes as possible; the last axis stays by itself with `keep_last`."""
    strides = [math.prod(b[axis + 1 :]) if b[axis] > 1 else 0 for axis in range(len(b))]
    shape: list[int] = []
    steps: list[int] = []
    for axis, (size, stride) in enumerate(zip(a, strides, strict=True)):
        last = axis == len(a) - 1 and keep_last
        if size == 1 and not last:
            continue
        if shape and not last and steps[-1] == stride * size:
            shape[-1], steps[-1] = shape[-1] * size, stride
        else:
            shape.append(size)
            steps.append(stride)
    return shape or [1], steps or [0]


_EMIT: dict[type[Op], Callable[..., list[str]]] = {
    ops.Requantise: _Writer._requantise,
    ops.AddRequantise: _Writer._add,
    ops.Multiply: _Writer._multiply,
    ops.Lookup: _Writer._lookup,
    ops.Interpolate: _Writer._interpolate,
    ops.DeltaUpdate: _Writer._delta,
    ops.MatMul: _Writer._matmul,
    ops.Accumulate: _Writer._accumulate,
    ops.Conv2d: _Writer._conv,
    ops.DepthwiseConv2d: _Writer._depthwise,
    ops.MaxPool: _Writer._pool,
    ops.SumPool: _Writer._pool,
    ops.Upsample: _Writer._upsample,
    ops.Concat: _Writer._concat,
    ops.Slice: _Writer._slice,
    ops.Transpose: _Writer._transpose,
    ops.ArgMax: _Writer._argmax,
}
