"""The integer model: graph and constants in files, the bytes of their sections, and its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.export.c_pack import pack_rows
from kestrel.export.form import Part, Work
from kestrel.lower import files
from kestrel.lower.answers import Answers, accumulator_reach
from kestrel.lower.graph import PRODUCTS, IntegerGraph
from kestrel.lower.ops import Accumulate, Op, weight_rows
from kestrel.lower.spotter import CLASS, FEATURES, LOGITS
from kestrel.lower.tensor import Constant
from kestrel.store.markdown import percent, table

INTEGER = "integer model (integer/), no float"
FOLDER = "integer"


def integer_form(work: Work, folder: Path) -> Part:
    """integer/integer.json and integer.npz, and the accuracy of the integer model on every clip."""
    if work.graph is None or work.integer is None:
        text = f"Left out: {work.obstacle}."
        return Part("Integer model", text, missing=(f"Integer-only inference: {work.obstacle}.",))
    (folder / FOLDER).mkdir()
    paths = files.save(work.graph, folder / FOLDER)
    found, rows = work.integer, write_constants(work.graph, folder / FOLDER / "constants.bin")
    tensor, peaks = work.graph.tensors[FEATURES], found.peaks
    text = "\n".join(
        [
            "integer/integer.json lists the tensors and ops, integer/integer.npz holds their constants; "
            "`kestrel.lower.files.load` reads both and `run` executes them. docs/integer.md states the arithmetic.",
            "",
            f"Input `{FEATURES}`: int16 [{tensor.shape[0]}, {tensor.shape[1]}], value = code x {tensor.scale:.10g}, "
            f"rounded half to even and saturated. Outputs: `{LOGITS}` (int{work.graph.tensors[LOGITS].bits}, one code stands for "
            f"{found.logit_step:.6g}) and `{CLASS}`.",
            "",
            f"On {found.integer.n:,} clips it gives the answer of the fake-quant network with the same weight codes "
            f"({percent(found.fake_quant.value, 2)} right, no device noise) in {found.same:,} ({percent(found.agreement, 2)}); "
            f"accuracy differs by {found.points:+.2f} points, a logit by at most {found.largest_difference:.3g}."
            + _of_float32(found),
            "",
            f"Accumulators are int32. The largest can reach {peaks.accumulator:,} (`{peaks.accumulator_of}`, "
            f"{peaks.accumulator_bits} bits); logits reached code {peaks.logit:,}, features code {peaks.feature:,} "
            f"({peaks.clipped_features:,} saturated).",
            "",
            "integer/constants.bin holds the constants packed at their bits, each once however many ops share it:",
            "",
            _table(rows),
            "",
            "Ops that hold weights:",
            "",
            _layers(work.graph),
        ]
    )
    names = {
        f"{FOLDER}/{paths[0].name}": "the integer model: tensors, ops, rescaling",
        f"{FOLDER}/{paths[1].name}": "its weights, biases and tables, in whole int8, int16 or int32",
        f"{FOLDER}/constants.bin": "the same constants packed, for their size",
    }
    figures = {**found.figures(), "integer_sections": [vars(row) for row in rows]}
    return Part("Integer model", text, names, {INTEGER: found.integer}, figures)


def _of_float32(found: Answers) -> str:
    others = found.integer.n - found.same
    if found.float32 is None or not others:
        return ""
    return (
        f" For {found.float32:,} of the {others:,} others the network gives the integer model's answer when it is computed "
        "in float64."
    )


def constants(graph: IntegerGraph) -> list[tuple[Op, str, Constant]]:
    """Every constant once, with the first op that holds it and the name of its field."""
    found: dict[int, tuple[Op, str, Constant]] = {}
    for op, _ in graph.all_ops():
        for name, value in files.vars_of(op).items():
            if isinstance(value, Constant):
                found.setdefault(id(value), (op, name, value))
    return list(found.values())


def packed(constant: Constant, op: Op | None = None) -> bytes:
    """A constant at the bits of its storage as the C runtime reads it (kestrel.export.c_pack), little-endian.

    Each index of the first axis begins at a whole byte, or where it is the weight of `op`, an Accumulate, each column. A matrix of
    storage `masked` is one piece.
    """
    values = constant.values
    if isinstance(op, Accumulate) or (constant.storage.startswith("masked") and isinstance(op, PRODUCTS)):
        values = weight_rows(op)
    array = pack_rows(values.reshape(len(values) if values.ndim > 1 else 1, -1), constant.storage).array
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


@dataclass(frozen=True)
class Section:
    """Constants of one kind inside constants.bin."""

    name: str
    values: int
    offset: int
    bytes: int


_KINDS = {"weight": "weights", "bias": "biases", "table": "tables", "nodes": "tables"}


def write_constants(graph: IntegerGraph, path: Path) -> list[Section]:
    """Write every constant of `graph` packed, kind by kind and each at a whole byte; then multipliers and offsets.

    Multipliers and offsets are int32, little-endian: per op its multipliers, then its offsets where they are not 0.
    """
    kinds: dict[str, list[tuple[Constant, Op]]] = {}
    for op, name, constant in constants(graph):
        kinds.setdefault(_KINDS.get(name, name), []).append((constant, op))
    scaling = [number for op, _ in graph.all_ops() for number in _scaling(op)]
    found = []
    with path.open("wb") as file:
        for kind, held in kinds.items():
            start = file.tell()
            file.writelines(packed(constant, op) for constant, op in held)
            found.append(Section(kind, sum(constant.values.size for constant, _ in held), start, file.tell() - start))
        start = file.tell()
        file.write(np.array(scaling, "<i4").tobytes())
        found.append(Section("multipliers and offsets", len(scaling), start, file.tell() - start))
    return found


def _scaling(op: Op) -> tuple[int, ...]:
    own = getattr(op, "multipliers", ())
    rescale = getattr(op, "rescale", None)
    if rescale is None:
        return own
    return (*own, *rescale.multipliers, *(rescale.offsets if any(rescale.offsets) else ()))


def _table(rows: Sequence[Section]) -> str:
    shown: list[Sequence[Any]] = [(row.name, row.values, row.offset, row.bytes) for row in rows]
    shown.append(("all", sum(row.values for row in rows), None, sum(row.bytes for row in rows)))
    return table(("section", "values", "offset", "bytes"), shown)


def _layers(graph: IntegerGraph) -> str:
    tensors = {name: tensor for name, tensor, _ in graph.all_tensors()}
    reach, rows = accumulator_reach(graph), []
    for op, name, constant in constants(graph):
        if name == "weight":
            x, y = tensors[op.inputs[0]], tensors[op.outputs[0]]
            shape = " x ".join(str(size) for size in constant.shape)
            accumulator = reach.get(op.outputs[0])
            bits = None if accumulator is None else accumulator.bit_length() + 1
            row = (op.outputs[0], type(op).__name__, shape, constant.storage, f"int{x.bits}", bits, f"int{y.bits}")
            rows.append((*row, len(packed(constant, op))))
    header = ("op", "kind", "weights", "stored as", "input", "accumulator bits", "output", "bytes")
    return table(header, rows)
