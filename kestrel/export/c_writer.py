"""What the parts of a generated model.c share: names, constants that are written once, and fields of descriptors."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from kestrel.export.c_pack import pack_rows
from kestrel.export.c_text import comment, literal, numbers
from kestrel.lower.memory import Place, Plan
from kestrel.lower.ops import Op, Window
from kestrel.lower.tensor import Constant
from kestrel.quant.integer import Rescale

DOUBLE_BITS = 53  # integers below 2^53 are exact in double

_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register "
    "restrict return short signed sizeof static struct switch typedef union unsigned void volatile while memory "
    "features frame logits main step".split()
)


class Writer:
    """Constants and functions of a model.c as they are added, bytes of constants by section, numbers of traced tensors."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.constants: list[str] = []
        self.functions: list[str] = []
        self.sections = {"weights": 0, "scaling": 0, "tables": 0, "initial states": 0}
        self.traced: list[str] = []
        self._arrays: dict[tuple[str, bytes], str] = {}
        self._identifiers: dict[str, str] = {}
        self._taken: set[str] = set(_KEYWORDS)

    def trace(self, name: str, size: int) -> str:
        """Statement that shows a tensor of `size` elements."""
        self.traced.append(name)
        return f"TRACE({len(self.traced) - 1}, {self.pointer(name)}, {self.bits(name)[0]}, {size});"

    def identifier(self, name: str, suffix: str = "") -> str:
        """A C identifier for `name` (and `suffix`), the same each time."""
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

    def place(self, name: str) -> Place:
        """Where a tensor lies."""
        return self.plan.places[name]

    def pointer(self, name: str) -> str:
        """Expression that points to a tensor."""
        place = self.place(name)
        if place.step is not None:
            return (
                f"PART({self.identifier(place.step, 'in')}, {place.at})"
                if place.at
                else self.identifier(place.step, "in")
            )
        if place.buffer is None:
            return f"PART(features, {place.at})" if place.at else "features"
        return f"AT({place.offset})"

    def constant(self, name: str, kind: str, fields: str) -> str:
        """Add a constant of struct `kind`; returns its identifier."""
        identifier = self.identifier(name, "op")
        self.constants.append(f"static const {kind} {identifier} = {{\n{fields}}};\n")
        return identifier

    def array(self, values: np.ndarray, name: str, section: str, note: str = "") -> str:
        """A constant array; equal ones are written once."""
        kind = f"{values.dtype.name}_t"
        key = kind, values.tobytes()
        if key not in self._arrays:
            identifier = self.identifier(name)
            self._arrays[key] = identifier
            self.sections[section] += values.nbytes
            headline = f"/* {comment(note)} */\n" if note else ""
            rows = numbers(values.reshape(-1).tolist() or [0])
            self.constants.append(
                f"{headline}static const {kind} {identifier}[{max(1, values.size)}] = {{\n{rows}}};\n"
            )
        return self._arrays[key]

    def rescale(self, rescale: Rescale | None, x: tuple[int, int], name: str) -> str:
        """Field `rescale`; x is the range in front of it."""
        if rescale is None:
            return "    .rescale = {.multipliers = NULL},\n"
        multipliers = self.array(np.array(rescale.multipliers, np.int32), f"{name}, multipliers", "scaling")
        offsets = "NULL"
        if any(rescale.offsets):
            offsets = self.array(np.array(rescale.offsets, np.int32), f"{name}, offsets", "scaling")
        product = max(abs(x[0]), abs(x[1])) * max(abs(m) for m in rescale.multipliers)
        reached = product + max(abs(o) for o in rescale.offsets) + (1 << rescale.shift)
        return (
            f"    .rescale = {{.multipliers = {multipliers}, .offsets = {offsets},"
            f" .multiplier_step = {int(len(rescale.multipliers) > 1)}, .offset_step = {int(len(rescale.offsets) > 1)},\n"
            f"                .shift = {rescale.shift}, .narrow = {narrow(reached, rescale.shift)}, .low = {literal(rescale.low)},"
            f" .high = {literal(rescale.high)}}},\n"
        )

    def weights(self, values: np.ndarray, constant: Constant, name: str) -> str:
        """Field `weights`: rows of `values`, packed at their storage."""
        packed = pack_rows(values, constant.storage)
        note = f"{name}: weights {' x '.join(map(str, values.shape))}, {constant.storage}"
        array = self.array(packed.array, f"{name}, weights", "weights", note)
        array += f" + {packed.start}" if packed.start else ""
        bitmap = f", .bitmap_bytes = {packed.bitmap_bytes}" if packed.bitmap_bytes else ""
        bitmap += f", .lanes = {packed.lanes}" if packed.lanes else ""
        return (
            f"    .weights = {{.data = {array}, .kind = {packed.kind}, .bits = {packed.bits},"
            f" .field_bits = {packed.field_bits}, .row_bytes = {packed.row_bytes}{bitmap}}},\n"
        )

    def bias(self, bias: Constant | None, name: str) -> str:
        """Field `bias`."""
        found = "NULL" if bias is None else self.array(bias.values.astype(np.int32), f"{name}, bias", "weights")
        return f"    .bias = {found},\n"

    @staticmethod
    def window(window: Window, shape: Sequence[int], out: Sequence[int]) -> str:
        """Field `window` for an image of `shape` and a result of shape `out`."""
        return (
            f"    .window = {{.height = {shape[0]}, .width = {shape[1]}, .channels = {shape[2]},"
            f" .out_height = {out[0]}, .out_width = {out[1]},\n"
            f"               .size_y = {window.size[0]}, .size_x = {window.size[1]}, .stride_y = {window.stride[0]},"
            f" .stride_x = {window.stride[1]}, .top = {window.before[0]}, .left = {window.before[1]}}},\n"
        )

    @staticmethod
    def copy(outer: int, inner: int, x_stride: int, y_stride: int, x_bits: int, y_bits: int) -> str:
        """Fields of kestrel_copy_op."""
        return (
            f"    .outer = {outer}, .inner = {inner}, .x_stride = {x_stride}, .y_stride = {y_stride},"
            f" .x_bits = {x_bits}, .y_bits = {y_bits},\n"
        )

    def bits(self, *names: str) -> tuple[int, ...]:
        """Bits of tensors where they lie."""
        return tuple(self.place(name).bits for name in names)

    def call(self, function: str, kind: str, op: Op, fields: str, *pointers: str) -> list[str]:
        """Add the descriptor of `op`, a kestrel_`kind`_op; returns the call of its kernel."""
        descriptor = self.constant(op.outputs[0], f"kestrel_{kind}_op", fields)
        return [f"kestrel_{function}(&{descriptor}, {', '.join(pointers)});"]

    def scratch(self, op: Op) -> str:
        """Pointer to the bytes in which the kernel unpacks weights."""
        buffer = self.plan.scratch.get(op.outputs[0])
        return "NULL" if buffer is None else f"AT({buffer.offset})"

    def prepared(self, op: Op, weight_bytes: int, sums: int, row_bytes: int) -> str:
        """Field `prepared`: memory for the vector kernels of computers, absent elsewhere."""
        name = self.identifier(op.outputs[0], "prepared")
        self.constants.append(f"KESTREL_PREPARED({name}, {weight_bytes}, {sums}, {row_bytes})\n")
        return f"    KESTREL_USE({name})\n"


def narrow(reached: int, shift: int) -> int:
    """Field `narrow`: what holds values up to `reached` before they are divided by 2^shift."""
    return 1 if reached < 1 << 31 else 2 if reached < 1 << min(DOUBLE_BITS, 31 + shift) else 0
