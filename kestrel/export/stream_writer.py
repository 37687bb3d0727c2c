"""C statements and constants of a streamed network, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kestrel.digits import signed_digits
from kestrel.export.c_text import block, comment, literal, numbers
from kestrel.export.stream_pack import pack_matrix, straight_lines
from kestrel.lower import ops
from kestrel.lower.narrow import TERMS
from kestrel.lower.stream_memory import queue_name
from kestrel.lower.stream_steps import (
    Compute,
    Keep,
    Pool,
    Repeat,
    Step,
    StreamProgram,
    Window,
    across,
    op_input_shape,
    queues,
    rows_of,
    taps_of,
)
from kestrel.quant.integer import Rescale


@dataclass(frozen=True)
class Layer:
    """A matrix product or depthwise convolution for the table of costs: weights used for a column of its output."""

    name: str
    weights: int
    bits: float
    bytes: int  # of packed weights; 0 where they are code
    straight: bool


@dataclass
class Writer:
    program: StreamProgram
    straight: frozenset[str]
    arrays: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(default_factory=list)  # first, stride
    held: list[int] = field(default_factory=list)  # queues
    constants: int = 0

    # ------------------------------------------------------------------------------------------------------- constants

    def array(self, kind: str, size: int, name: str, values: Iterable[int]) -> str:
        found = [int(value) for value in values]
        self.constants += size * len(found)
        self.arrays.append(f"static const {kind} {name}[{len(found)}] = {{\n{numbers(found)}}};\n")
        return name

    def scaling(
        self, number: int, multipliers: Sequence[int], rescale: Rescale | ops.AddRequantise, channels: int, bits: int
    ) -> str:
        digits = [digit_code(m) for m in multipliers]
        offsets = list(getattr(rescale, "offsets", (0,)))
        names = [self.array("uint16_t", 2, f"digits_{number}", digits)]
        held = "0"
        if any(offsets):
            held = self.array("int32_t", 4, f"offsets_{number}", offsets)
        each = [int(len(multipliers) > 1 and not isinstance(rescale, ops.AddRequantise)), int(len(offsets) > 1)]
        self.arrays.append(
            f"static const kestrel_stream_scaling scaling_{number} = {{\n    {names[0]}, {held}, {channels}, "
            f"{rescale.low}, {rescale.high}, {rescale.shift}, {each[0]}, {each[1]}, {bits}}};\n"
        )
        self.constants += 20
        return f"&scaling_{number}"

    # ---------------------------------------------------------------------------------------------------------- places

    def at(self, name: str, kind: str | None = None) -> str:
        """Address of a stream's newest column."""
        program = self.program
        name = program.name(name)
        if name == program.features:
            return "features"
        place = program.places[name]
        bits = program.streams[name].tensor.bits if name in program.streams else 8
        base = "state" if name.endswith(".window") else "scratch"
        cast = kind or f"int{bits}_t"
        return f"({cast} *)({base} + {place.offset})"

    def read(self, step: Compute, index: int, place: int = 0) -> str:
        """Address of the column, or of the window's columns, that an input of `step` holds."""
        name = self.program.name(step.op.inputs[place])
        queue = queues(self.program).get((index, name))
        if queue is not None:
            return f"(int8_t *)(state + {self.program.places[queue_name(queue)].offset})"
        window = f"{step.output}.window"
        if place == 0 and window in self.program.places and self.program.streams[window].length is not None:
            return f"(int8_t *)(state + {self.program.places[window].offset})"
        return self.at(name)

    def bits(self, name: str) -> int:
        return self.program.graph.tensors[name].bits

    # ------------------------------------------------------------------------------------------------------------- ops

    def compute(self, step: Compute, index: int, number: int) -> list[str]:
        op = step.op
        lines = [f"/* {comment(step.output)} */"]
        if isinstance(op, (ops.MatMul, ops.Conv2d)):
            lines += self._product(step, op, index, number)
        elif isinstance(op, ops.DepthwiseConv2d):
            lines += self._depthwise(step, op, index, number)
        elif isinstance(op, (ops.MaxPool, ops.SumPool)):
            lines += self._pooled(step, op, index, number)
        else:
            lines += self._elementwise(step, op, index, number)
        for number, queue in enumerate(self.queues):
            if queue.readers[-1] == index:  # drop the column that was read
                place, size = self.program.places[queue_name(queue)], self.program.streams[queue.output].bytes
                start = f"state + {place.offset}"
                lines += [f"kestrel_stream_shift({start}, {place.size}, {start}, {size});", f"held[{number}]--;"]
        return lines

    @property
    def queues(self) -> list[Keep]:
        return [step for step in self.program.steps if isinstance(step, Keep)]

    def _rescaled(self, op: ops.Op, number: int, channels: int, source: str, bits: int, count: int) -> str:
        rescale: Rescale | None = op.rescale  # type: ignore[attr-defined]
        target = self.at(op.outputs[0], "void")
        if rescale is None:
            rescale = Rescale((1,), 0, -(1 << 15), (1 << 15) - 1)
        named = self.scaling(number, rescale.multipliers, rescale, channels, self.bits(op.outputs[0]))
        return f"kestrel_stream_scale({named}, {source}, {bits}, {count}, {target});"

    def _bias(self, bias: np.ndarray | None, number: int) -> tuple[str, int]:
        if bias is None:
            return "0", 16
        bits = 16 if np.abs(bias).max() < 1 << 15 else 32
        return self.array(f"int{bits}_t", bits // 8, f"bias_{number}", bias), bits

    def _logits(self, op: ops.Op) -> bool:
        return self.program.name(op.outputs[0]) == self.program.logits

    def _product(self, step: Compute, op: ops.MatMul | ops.Conv2d, index: int, number: int) -> list[str]:
        rows = rows_of(self.program, op)
        outputs, inputs = rows.shape
        values = None if op.bias is None else op.bias.values
        sums, tables = self._scratch(step, "sums32", "int32_t"), self._scratch(step, "tables", "int16_t")
        source = self.read(step, index)
        lines = []
        if step.output in self.straight:
            body = [
                f"KESTREL_STREAM_STRAIGHT static void layer_{number}(const int8_t *in, int32_t *sums)\n{{\n",
                block(straight_lines(rows, values)),
                "}\n",
            ]
            self.functions.append("".join(body))
            call = f"layer_{number}({{source}}, {sums});"
            held = 0
        else:
            bias, bias_bits = self._bias(values, number)
            lines.append(f"kestrel_stream_bias({bias}, {bias_bits}, {outputs}, {sums});")
            packed = pack_matrix(rows, op.weight.storage)
            held = packed.bytes
            weights = self.array("uint16_t", 2, f"weights_{number}", packed.words.reshape(-1))
            self.arrays.append(
                f"static const kestrel_stream_matrix matrix_{number} = {{\n    {weights}, 0, {inputs}, {outputs}, "
                f"{packed.kind}, {int(packed.odd)}, 16}};\n"
            )
            self.constants += 16
            call = f"kestrel_stream_product(&matrix_{number}, {{source}}, {sums}, {tables});"
        self.layers.append(Layer(step.output, rows.size, _stored_bits(op), held, step.output in self.straight))
        positions, source, gather, target = self._positions(step, op, source, outputs)
        lines += [gather] if gather else []
        lines.append(call.format(source=source))
        op.check(op.rescale is not None, "its sums of 32 bits are not rescaled")
        assert op.rescale is not None
        bits = self.bits(op.outputs[0])
        named = self.scaling(number, op.rescale.multipliers, op.rescale, outputs, bits)
        lines.append(f"kestrel_stream_scale({named}, {sums}, 32, {outputs}, {target});")
        return _looped(lines, positions)

    def _depthwise(self, step: Compute, op: ops.DepthwiseConv2d, index: int, number: int) -> list[str]:
        taps = taps_of(self.program, op)
        channels = taps.shape[2]
        weights = taps.reshape(-1, channels)
        bias, bias_bits = self._bias(None if op.bias is None else op.bias.values, number)
        sums = self._scratch(step, "sums32", "int32_t")
        source = self.read(step, index)
        positions, source, gather, target = self._positions(step, op, source, channels)
        lines = [f"kestrel_stream_bias({bias}, {bias_bits}, {channels}, {sums});"]
        lines += [gather] if gather else []
        self.layers.append(Layer(step.output, weights.size, _stored_bits(op), weights.size, False))
        name = self.array("int8_t", 1, f"taps_{number}", weights.reshape(-1))
        lines.append(f"kestrel_stream_taps({name}, {source}, {len(weights)}, {channels}, {channels}, {sums});")
        bits = self.bits(op.outputs[0])
        assert op.rescale is not None
        named = self.scaling(number, op.rescale.multipliers, op.rescale, channels, bits)
        lines.append(f"kestrel_stream_scale({named}, {sums}, 32, {channels}, {target});")
        return _looped(lines, positions)

    def _pooled(self, step: Compute, op: ops.MaxPool | ops.SumPool, index: int, number: int) -> list[str]:
        pool = next((s for s in self.program.steps if isinstance(s, Pool) and s.output == f"{step.output}.sums"), None)
        channels = op_input_shape(self.program, op)[2]
        if isinstance(op, ops.SumPool) and pool is not None:
            sums = self._scratch(step, "sums32", "int32_t")
            segments = f"(int16_t *)(state + {self.program.places[pool.output].offset})"
            total = f"kestrel_stream_total({segments}, {pool.segments}, {channels}, {sums});"
            return [total, self._rescaled(op, number, channels, sums, 32, channels)]
        positions, source, gather, target = self._positions(step, op, self.read(step, index), channels)
        lines = [gather] if gather else []
        window = across(self.program, op)
        rows = window.depth * window.size
        if isinstance(op, ops.MaxPool):
            lines.append(f"kestrel_stream_largest({source}, {rows}, {channels}, {target});")
        else:
            sums = self._scratch(step, "sums32", "int32_t")
            assert op.rescale is not None
            named = self.scaling(number, op.rescale.multipliers, op.rescale, channels, self.bits(op.outputs[0]))
            lines += [
                f"kestrel_stream_bias(0, 16, {channels}, {sums});",
                f"kestrel_stream_collect32({source}, {rows}, {channels}, {sums});",
                f"kestrel_stream_scale({named}, {sums}, 32, {channels}, {target});",
            ]
        return _looped(lines, positions)

    def _positions(self, step: Compute, op: ops.Op, source: str, outputs: int) -> tuple[int, str, str, str]:
        """(positions of a column, address of a window's values, statement that gathers them, address of the result)."""
        target = self.at(step.output, "int8_t" if self.bits(op.outputs[0]) == 8 else "int16_t")
        if self.program.streams[step.output].length is None:
            return 1, source, "", self.at(step.output, "void")
        if isinstance(op, ops.MatMul):
            width = op.weight.shape[1]
            positions = self.program.streams[step.output].size // outputs
            if positions == 1:
                return 1, source, "", target
            return positions, f"{source} + place * {width}", "", f"{target} + place * {outputs}"
        window = across(self.program, op)  # type: ignore[arg-type]
        if window.plain:
            return 1, source, "", target
        channels = op_input_shape(self.program, op)[2]
        patch = self._scratch(step, "patch", "int8_t")
        gather = (
            f"kestrel_stream_patch({source}, {window.depth}, {window.positions * channels}, place * "
            f"{window.stride * channels} - {window.before * channels}, {window.size * channels}, {patch});"
        )
        return window.made, patch, gather, f"{target} + place * {outputs}"

    def _elementwise(self, step: Compute, op: ops.Op, index: int, number: int) -> list[str]:
        stream = self.program.streams[step.output]
        count, channels = stream.size, stream.column[-1] if stream.column else 1
        source = self.read(step, index)
        if isinstance(op, ops.Requantise):
            channels = self.program.graph.tensors[op.inputs[0]].shape[-1]
            return [self._rescaled(op, number, channels, source, self.bits(op.inputs[0]), count)]
        target = self.at(step.output, "void")
        if isinstance(op, ops.Lookup):
            table = self.array(f"int{op_bits(op)}_t", op_bits(op) // 8, f"table_{number}", op.table.values)
            kind = f"int{self.bits(op.outputs[0])}_t"
            return [
                f"for (place = 0; place < {count}; place++) {{",
                f"    (({kind} *){target})[place] = {table}[({source})[place] - {literal(op.first)}];",
                "}",
            ]
        bits = self.bits(op.outputs[0])
        if isinstance(op, ops.AddRequantise):
            named = self.scaling(number, op.multipliers, op, channels, bits)
            second = self.read(step, index, 1)
            op.check(len(op.inputs) == 2 and all(self.bits(n) == 8 for n in op.inputs), "takes two int8 inputs here")
            return [f"kestrel_stream_add({named}, {source}, {second}, {count}, {target});"]
        assert isinstance(op, ops.Multiply)
        rescale = op.rescale or Rescale((1,), 0, -(1 << 15), (1 << 15) - 1)
        named = self.scaling(number, rescale.multipliers, rescale, channels, bits)
        run, size = _repeats(self.program, op)
        return [
            f"kestrel_stream_multiply({named}, {source}, {self.read(step, index, 1)}, {run}, {size}, {count}, {target});"
        ]

    def _scratch(self, step: Step, what: str, kind: str) -> str:
        return f"({kind} *)(scratch + {self.program.places[f'{step.output}.{what}'].offset})"

    # -------------------------------------------------------------------------------------------------------- programs

    def column(self) -> list[str]:
        """Statements of kestrel_stream_column."""
        lines: list[str] = []
        closing: list[str] = []
        steps = self.program.steps
        for index, step in enumerate(steps):
            pad = "    " * len(closing)
            if isinstance(step, Compute):
                found = self.compute(step, index, index)
            elif isinstance(step, Window):
                found = self._wait(step, len(closing) > 0, index)
            elif isinstance(step, Keep):
                found = self._keep(step)
            elif isinstance(step, Repeat):
                depth = len(closing)
                found = [f"for (turn{depth} = 0; turn{depth} < {step.factor}; turn{depth}++) {{"]
                closing.insert(0, pad + "}")
            else:
                assert isinstance(step, Pool)
                found = self._pool(step)
            lines += [pad + line for line in found]
        return [*lines, *closing]

    def _wait(self, step: Window, repeated: bool, index: int) -> list[str]:
        place = self.program.places[step.output]
        source, size = self.at(step.source, "void"), self.program.streams[step.source].bytes
        assert (index, self.program.name(step.source)) not in queues(self.program)
        lines = [f"kestrel_stream_shift(state + {place.offset}, {place.size}, {source}, {size});"]
        if step.running:
            new = f"wait[{len(self.waits)}] == {step.stride}"
            lines = [f"kestrel_stream_larger(state + {place.offset}, {source}, {size}, {new});"]
        if (step.first, step.stride) != (1, 1):
            number = len(self.waits)
            self.waits.append((step.first, step.stride))
            lines += [
                f"if (--wait[{number}] > 0) {{",
                "    continue;" if repeated else "    return 0;",
                "}",
                f"wait[{number}] = {step.stride};",
            ]
        return lines

    def _keep(self, step: Keep) -> list[str]:
        number = self.queues.index(step)
        place = self.program.places[queue_name(step)]
        size = self.program.streams[step.output].bytes
        return [
            f"kestrel_stream_put(state + {place.offset}, held[{number}], {self.at(step.output, 'void')}, {size});",
            f"held[{number}]++;",
        ]

    def _pool(self, step: Pool) -> list[str]:
        size = self.program.streams[step.output].size
        place, source = self.program.places[step.output], self.at(step.source, "int8_t")
        return [
            "if (columns == 0) {",
            f"    kestrel_stream_clear(state + {place.offset} + segment * {2 * size}, {2 * size});",
            "}",
            f"kestrel_stream_collect16({source}, {step.positions}, {size}, (int16_t *)(state + {place.offset}) + segment * {size});",
            f"if (++columns == {step.columns}) {{",
            "    columns = 0;",
            f"    segment = (uint8_t)(segment + 1 == {step.segments} ? 0 : segment + 1);",
            f"    full = (uint8_t)(full < {step.segments} ? full + 1 : full);",
            "    done = full == " + str(step.segments) + ";",
            "}",
        ]

    def final(self) -> list[str]:
        """Statements of kestrel_stream_logits."""
        lines: list[str] = []
        start = len(self.program.steps)
        for index, step in enumerate(self.program.final, start):
            assert isinstance(step, Compute)
            lines += self.compute(step, index, index)
        stream = self.program.streams[self.program.logits]
        source = self.at(self.program.logits, "void")
        return [
            *lines,
            f"for (place = 0; place < {stream.size}; place++) {{",
            f"    logits[place] = kestrel_stream_value({source}, {stream.tensor.bits}, place);",
            "}",
        ]


def op_bits(op: ops.Lookup) -> int:
    """Bits of a table's elements."""
    return 8 if np.abs(op.table.values).max(initial=0) < 128 else 16


def _stored_bits(op: ops.MatMul | ops.Conv2d | ops.DepthwiseConv2d) -> float:
    from kestrel.lower.tensor import STORAGE_BITS

    return STORAGE_BITS[op.weight.storage]


def _looped(lines: list[str], positions: int) -> list[str]:
    if positions == 1:
        return lines
    return [f"for (place = 0; place < {positions}; place++) {{", *("    " + line for line in lines), "}"]


def _repeats(program: StreamProgram, op: ops.Multiply) -> tuple[int, int]:
    """(neighbours that share a value of b, values of b) within a column."""
    stream = program.streams[op.outputs[0]]
    a, b = (program.graph.tensors[name].shape for name in op.inputs)
    if stream.axis is not None:
        a, b = (shape[: stream.axis] + shape[stream.axis + 1 :] for shape in (a, b))
    shared = [place for place, (p, q) in enumerate(zip(a, b, strict=True)) if p != q]
    if not shared:
        return 1, math.prod(b)
    first, last = shared[0], shared[-1]
    op.check(all(q == 1 for q in b[first : last + 1]), "b may be shared along neighbouring axes only")
    trailing = last == len(a) - 1 or math.prod(a[last + 1 :]) == 1
    if trailing:  # one value for a run of neighbours
        return math.prod(a[first:]), math.prod(b)
    op.check(math.prod(a[:first]) == 1, "b may be shared along the first or the last axes only")
    return 1, math.prod(b)


def digit_code(multiplier: int) -> int:
    """Three digits of five bits: exponents, 16 for a negative one."""
    digits = signed_digits(multiplier)
    if len(digits) > TERMS:
        raise ValueError(f"multiplier {multiplier} has more than {TERMS} signed digits")
    if not digits:
        digits = [(1, 1), (-1, 0), (-1, 0)]
    while len(digits) < TERMS:
        sign, exponent = digits.pop(0)  # 2^e = 2^(e-1) + 2^(e-1); 1 = 2 - 1
        digits = [(sign, exponent - 1)] * 2 + digits if exponent else [(sign, 1), (-sign, 0), *digits]
    return sum((exponent | (16 if sign < 0 else 0)) << (5 * place) for place, (sign, exponent) in enumerate(digits))
