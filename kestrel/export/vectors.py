"""Test vectors for hardware: every tensor of the integer model for a few clips, as npz and as text for $readmemh."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.export.form import Part, Work
from kestrel.lower.files import vars_of
from kestrel.lower.graph import IntegerGraph, Scan, input_codes
from kestrel.lower.ops import AddRequantise, Conv2d, DepthwiseConv2d, MatMul, Multiply, Op, SumPool
from kestrel.lower.spotter import FEATURES
from kestrel.lower.tensor import Constant, whole_bits
from kestrel.quant.integer import Rescale
from kestrel.store.atomic import write_json, write_text
from kestrel.store.hashing import sha256_file
from kestrel.store.npz import write_npz

FOLDER = "vectors"
FORMAT = "kestrel-vectors-1"
STEPS = 4  # time steps of tensors inside a scan; fewer where a step is large
LARGEST_TEXT = 3_000_000  # bytes of the text files of tensors that the steps are chosen for
_ACCUMULATOR_BITS = 32
_SUM_BITS = 64  # of the products with multipliers that AddRequantise adds
_PACKED_BITS = {"ternary": 2, "binary": 1, "power4": 9}


@dataclass(frozen=True)
class Vector:
    """Values of one name: [clips, (time steps,) *shape] of a tensor, or a constant of the graph as it is."""

    name: str
    values: np.ndarray  # int64
    bits: int  # of a value in the text file, two's complement
    steps: int | None = None  # time steps that `values` holds, for tensors inside a scan
    odd: bool = False  # the text file holds k of the odd value 2k + 1

    def lines(self, values: np.ndarray) -> str:
        """One value per line, row-major: two's complement in hex."""
        stored = (values.reshape(-1) - 1) // 2 if self.odd else values.reshape(-1)
        if self.bits == 1:  # binary: the bit is set for -1
            stored = (values.reshape(-1) < 0).astype(np.int64)
        digits, mask = -(-self.bits // 4), (1 << self.bits) - 1
        return "".join(f"{int(value) & mask:0{digits}x}\n" for value in stored)

    @property
    def array(self) -> np.ndarray:
        """The values as the smallest of int8, int16, int32 and int64 that holds the storage."""
        low, high = int(self.values.min(initial=0)), int(self.values.max(initial=0))
        wide = max(8, self.bits)
        for kind in (np.int8, np.int16, np.int32):
            info = np.iinfo(kind)
            if wide <= info.bits and info.min <= low and high <= info.max:
                return self.values.astype(kind)
        return self.values


def vectors_form(work: Work, folder: Path) -> Part:
    """vectors/: npz, hex text files, index.json and README.md of the first clips."""
    count = min(work.settings.vectors, work.data.shape[0])
    if work.graph is None or not count:
        reason = work.obstacle if work.graph is None else "`export.vectors` is 0"
        return Part("Test vectors", f"Left out: {reason}.")
    rows = np.arange(count)
    codes = input_codes(work.data.rows(rows), work.graph.tensors[FEATURES]).astype(np.int64)
    clips = [
        {"folder": f"clip{row}", "utt_id": work.data.utt_ids[row], "class": work.data.classes[work.data.labels[row]]}
        for row in rows
    ]
    target = folder / FOLDER
    target.mkdir()
    index = write_vectors(work.graph, codes, clips, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    steps = index["steps"]
    inside = f" (inside a scan the first {steps} time steps)" if steps is not None else ""
    text = (
        f"vectors/ holds every tensor of the integer model for {count} clips{inside}: inputs, weights, tables, "
        "accumulators and outputs of each op, as vectors.npz and as hex text files for `$readmemh`; vectors/README.md "
        f"states the formats. {len(index['files']):,} files, {size:,} bytes; index.json lists the SHA-256 of each."
    )
    files = {
        f"{FOLDER}/README.md": "formats of the test vectors, with an example",
        f"{FOLDER}/index.json": "ops in their order, tensors, and the hex files with their SHA-256",
        f"{FOLDER}/vectors.npz": "all test vectors as integer arrays",
    }
    return Part("Test vectors", text, files, figures={"vectors": {"clips": count, "steps": steps, "bytes": size}})


def write_vectors(graph: IntegerGraph, codes: np.ndarray, clips: list[dict[str, str]], folder: Path) -> dict[str, Any]:
    """Write the vectors of input `codes` [clips, T, F]; returns the content of index.json.

    `clips` are the entries of index.json for each clip; `folder` of them is where its text files lie.
    """
    trace: dict[str, np.ndarray] = {}
    graph.run(codes, trace=trace)
    steps = _steps(graph, len(codes))
    tensors = list(_tensors(graph, trace, steps))
    held = list(_constants(graph))
    stems = _stems([vector.name for vector in (*tensors, *held)])
    paths: list[str] = []
    for vector in held:
        paths.append(_write(folder, f"constants/{stems[vector.name]}.hex", vector.lines(vector.values)))
    for row, clip in enumerate(clips):
        for vector in tensors:
            paths.append(_write(folder, f"{clip['folder']}/{stems[vector.name]}.hex", vector.lines(vector.values[row])))
    write_npz(folder / "vectors.npz", {vector.name: vector.array for vector in (*tensors, *held)})
    index = {
        "format": FORMAT,
        "clips": clips,
        "steps": steps,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "ops": [_op(op, scan) for op, scan in graph.all_ops()],
        "tensors": {vector.name: _entry(vector, stems, vector.values.shape[1:]) for vector in tensors},
        "constants": {vector.name: _entry(vector, stems, vector.values.shape) for vector in held},
        "files": {path: sha256_file(folder / path) for path in paths},
    }
    write_json(folder / "index.json", index)
    write_text(folder / "README.md", _readme(graph, steps, tensors, stems))
    return index


def _write(folder: Path, path: str, text: str) -> str:
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_text(text, encoding="ascii", newline="\n")
    return path


def _entry(vector: Vector, stems: dict[str, str], shape: tuple[int, ...]) -> dict[str, Any]:
    entry = {"file": f"{stems[vector.name]}.hex", "shape": list(shape), "bits": vector.bits, "steps": vector.steps}
    return {**entry, "odd": True} if vector.odd else entry


def _stems(names: list[str]) -> dict[str, str]:
    """File names without suffix: letters of tensor names that a file system may refuse become `_`, never twice the same."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem = plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        number = 1
        while stem.lower() in taken:
            number += 1
            stem = f"{plain}_{number}"
        taken.add(stem.lower())
        stems[name] = stem
    return stems


def accumulators(op: Op, arrays: list[np.ndarray]) -> np.ndarray | None:
    """What `op` holds before it rescales, see accumulator_bits; None where that is its output, or it has none."""
    if isinstance(op, AddRequantise):
        return np.asarray(sum(x.astype(np.int64) * m for x, m in zip(arrays, op.multipliers, strict=True)))
    if getattr(op, "rescale", None) is None:
        return None
    if isinstance(op, (MatMul, Conv2d, DepthwiseConv2d)):
        return op.accumulate(arrays[0])
    if isinstance(op, Multiply):
        return arrays[0] * arrays[1]
    if isinstance(op, SumPool):
        return op.window.views(arrays[0]).sum(axis=(4, 5))
    return None


def accumulator_bits(op: Op) -> int:
    """Bits of what `op` holds before it rescales."""
    return _SUM_BITS if isinstance(op, AddRequantise) else _ACCUMULATOR_BITS


def _steps(graph: IntegerGraph, clips: int) -> int | None:
    """Time steps that are written of the tensors inside scans; None where there are no scans."""
    scans = [op for op in graph.ops if isinstance(op, Scan)]
    if not scans:
        return None
    step = sum(
        tensor.size * (tensor.bits // 4 + 1 + (_ACCUMULATOR_BITS // 4 + 1))
        for scan in scans
        for tensor in scan.body.tensors.values()
    )
    longest = max(graph.tensors[scan.inputs[0]].shape[0] for scan in scans)
    return max(1, min(STEPS, longest, LARGEST_TEXT // max(1, step * clips)))


def _tensors(graph: IntegerGraph, trace: dict[str, np.ndarray], steps: int | None) -> Iterator[Vector]:
    """Every tensor in the order of the graph, with the accumulators of an op before its output."""
    makers = {name: (op, scan) for op, scan in graph.all_ops() for name in op.outputs}
    for name, tensor, scan in graph.all_tensors():
        op, _ = makers.get(name, (None, None))
        found = None if op is None else accumulators(op, [_folded(trace[x], scan, steps) for x in op.inputs])
        if op is not None and found is not None:
            bits = accumulator_bits(op)
            yield Vector(f"{name}.acc", _unfolded(found, len(trace[name]), scan), bits, _kept(scan, steps))
        values = trace[name] if scan is None else trace[name][:, :steps]
        yield Vector(name, values, tensor.bits, _kept(scan, steps))


def _kept(scan: Scan | None, steps: int | None) -> int | None:
    return None if scan is None else steps


def _folded(values: np.ndarray, scan: Scan | None, steps: int | None) -> np.ndarray:
    """[clips, time, ...] of a tensor inside a scan -> [clips * steps, ...], as ops take them."""
    return values if scan is None else values[:, :steps].reshape(-1, *values.shape[2:])


def _unfolded(values: np.ndarray, clips: int, scan: Scan | None) -> np.ndarray:
    return values if scan is None else values.reshape(clips, -1, *values.shape[1:])


def _constants(graph: IntegerGraph) -> Iterator[Vector]:
    """Weights, biases, tables, multipliers and offsets of every op, and initial values of states."""
    for op, _ in graph.all_ops():
        for field, value in vars_of(op).items():
            name = f"{op.outputs[0]}.{field}"
            if isinstance(value, Constant):
                yield _constant(name, value)
            elif isinstance(value, Rescale):
                yield Vector(f"{op.outputs[0]}.multipliers", np.array(value.multipliers, np.int64), 32)
                yield Vector(f"{op.outputs[0]}.offsets", np.array(value.offsets, np.int64), 32)
            elif field == "multipliers":
                yield Vector(name, np.array(value, np.int64), 32)
        if isinstance(op, Scan):
            for state in op.states:
                if state.initial is not None:
                    yield _constant(f"{state.name}.initial", state.initial)


def _constant(name: str, constant: Constant) -> Vector:
    storage = constant.storage
    odd = storage.startswith("odd") and storage != "odd1"
    if storage in _PACKED_BITS or storage == "odd1":
        return Vector(name, constant.values, _PACKED_BITS.get(storage, 1))
    return Vector(name, constant.values, whole_bits(storage), odd=odd)


def _op(op: Op, scan: Scan | None) -> dict[str, Any]:
    """An op for index.json: what it reads and makes, and its whole numbers; arrays stand in the constants."""
    entry: dict[str, Any] = {"type": type(op).__name__, "inputs": list(op.inputs), "outputs": list(op.outputs)}
    if scan is not None:
        entry["scan"] = scan.outputs[0]
    for field, value in vars_of(op).items():
        if isinstance(value, Rescale):
            entry["rescale"] = {"shift": value.shift, "low": value.low, "high": value.high}
        elif isinstance(value, Constant):
            entry.setdefault("constants", []).append(f"{op.outputs[0]}.{field}")
        elif field not in ("inputs", "outputs", "scale", "multipliers", "error") and _plain(value):
            entry[field] = list(value) if isinstance(value, tuple) else value
        elif type(value).__name__ == "Window":
            entry[field] = {key: list(pair) for key, pair in vars_of(value).items()}
    if isinstance(op, Scan):
        entry["steps"] = list(op.steps)
        entry["states"] = [{"name": state.name, "next": state.next} for state in op.states]
        entry["emitted"], entry["last"] = list(op.emitted), list(op.last)
    return entry


def _plain(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(part, int) for part in value))


def _readme(graph: IntegerGraph, steps: int | None, tensors: list[Vector], stems: dict[str, str]) -> str:
    product = next((op for op, _ in graph.all_ops() if isinstance(op, MatMul) and op.rescale is not None), None)
    scanned = (
        f"Tensors inside a scan (recurrence over time) have time as their first axis; the first {steps} steps are kept. A "
        "state holds what the step begins with. The last states, and all that follows them, belong to the whole clip.\n\n"
        if steps is not None
        else ""
    )
    return (
        "# Test vectors\n\n"
        "Every tensor of the integer model for a few clips. The arithmetic of each op is stated in docs/integer.md of "
        "Kestrel; ../integer/integer.json is the whole model.\n\n"
        "## Files\n\n"
        "* index.json: the clips; the ops in the order of their execution with what they read and make; for each tensor and "
        "constant its text file, shape and bits; SHA-256 of the text files.\n"
        "* clip<k>/<tensor>.hex: values of one tensor for one clip. <tensor>.acc.hex: its accumulators, before rescaling: "
        "int32, or for AddRequantise the int64 sum of products with multipliers.\n"
        "* constants/<tensor>.<field>.hex: weights, biases and tables of the op that makes <tensor>; `multipliers` and "
        "`offsets` of its rescaling (one for all, or one for each index of the last axis). Shift and limits stand in "
        "index.json.\n"
        "* vectors.npz: the same under the same names, as arrays [clips, (time,) shape], constants as they are.\n\n"
        "## Text files\n\n"
        "One value per line, row-major (the last axis is the fastest), two's complement in hex with ceil(bits / 4) digits: "
        "-1 is `f` at 4 bits, `3f` at 6, `ff` at 8, `ffffffff` at 32. `bits` is the storage: 8, 16 or 32 for tensors, 32 or 64 for "
        "accumulators, 32 for multipliers and offsets, the trained bits for weights. Ternary weights take 2 bits. A binary weight is "
        "1 bit, set for -1. Where index.json says `odd`, a line is k and the value is 2k + 1.\n\n"
        f"{scanned}"
        "## Example\n\n" + (_matmul_example(product, tensors, stems) if product else _plain_example(tensors, stems))
    )


def _plain_example(tensors: list[Vector], stems: dict[str, str]) -> str:
    vector = tensors[0]
    size = vector.values[0].size
    return (
        f"```verilog\nreg signed [{vector.bits - 1}:0] x [0:{size - 1}];\n"
        f'initial $readmemh("clip0/{stems[vector.name]}.hex", x);\n```\n'
    )


def _matmul_example(op: MatMul, tensors: list[Vector], stems: dict[str, str]) -> str:
    """How to load and check one product."""
    assert op.rescale is not None
    by_name = {vector.name: vector for vector in tensors}
    x, y = by_name[op.inputs[0]], op.outputs[0]
    weight = _constant("weight", op.weight)
    outputs, width = op.weight.shape
    size = x.values[0].size
    channels = len(op.rescale.multipliers)
    index = "[o]" if channels > 1 else "[0]"
    offset = "[o]" if len(op.rescale.offsets) > 1 else "[0]"
    first = weight.lines(op.weight.values[:1, :1]).strip()
    weights, bias = stems[f"{y}.weight"], " + bias[o]" if op.bias is not None else ""
    return (
        f"`{y}` = rescaled product of `{op.inputs[0]}` with {outputs} x {width} weights of {weight.bits} bits (the first line of "
        f"constants/{weights}.hex, `{first}`, is {int(op.weight.values[0, 0])}):\n\n"
        f"```verilog\nreg signed [{x.bits - 1}:0] x [0:{size - 1}];\n"
        f"reg signed [{weight.bits - 1}:0] w [0:{outputs * width - 1}];\n"
        f'initial $readmemh("clip0/{stems[op.inputs[0]]}.hex", x);\n'
        f'initial $readmemh("constants/{weights}.hex", w);\n```\n\n'
        f"    acc[o] = sum over i of w[{width} o + i] x[i]{bias}            = clip0/{stems[y]}.acc.hex\n"
        f"    p = acc[o] m{index} + n{offset}    (m, n: constants/{stems[y]}.multipliers.hex, .offsets.hex; p has 64 bits)\n"
        f"    s = {op.rescale.shift}\n"
        "    r = (p + 2^(s-1) - 1 + ((p >> s) & 1)) >> s    (arithmetic shifts; for s = 0 simply p)\n"
        f"    y[o] = min(max(r, {op.rescale.low}), {op.rescale.high})        = clip0/{stems[y]}.hex\n"
    )
