"""Memory images of a delta network for accelerators: CBCSC of pruned layers (Spartus), dense columns (EdgeDRNN).

All hold the weight codes of codes.npz. Every file is read back and compared before the stage ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.form import Part, Work
from kestrel.hw.delta_spec import load_machine
from kestrel.lower.graph import Scan
from kestrel.lower.ops import DeltaUpdate
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.inventory import weight_codes
from kestrel.quant import cbcsc, edgedrnn
from kestrel.quant.cbcsc import Cbcsc
from kestrel.quant.memory_image import c_arrays, hex_image, read_c_array, read_hex_image
from kestrel.quant.packing import WeightCodes, pack, unpack
from kestrel.store.atomic import write_json, write_text
from kestrel.store.markdown import percent, table

FOLDER, TITLE = "memory", "Accelerator memory"
WORD_BITS = 32  # of a register of EdgeDRNN


@dataclass(frozen=True)
class _Layer:
    """Codes of a layer; `columns` is [W_x, W_h], int64 [G H, I + H]."""

    name: str
    inputs: int
    hidden: int
    w_x: WeightCodes
    w_h: WeightCodes
    bias: tuple[WeightCodes, WeightCodes]

    @property
    def columns(self) -> np.ndarray:
        return np.concatenate([self.w_x.codes, self.w_h.codes], axis=1).astype(np.int64)


def accelerator_form(work: Work, folder: Path) -> Part:
    """memory/: images and C arrays of the delta layers. Raises KestrelError where one does not read back as it was."""
    net = work.spotter.net
    assert isinstance(net, DeltaNetwork)
    target = folder / FOLDER
    target.mkdir()
    layers = _layers(net, work.settings.weight_bits)
    files: dict[str, str] = {}
    sections: list[dict[str, Any]] = []
    pruned = bool(net.masks())
    if pruned:
        for layer in layers:
            sections.append(_write_cbcsc(target, layer, net.pruner_pes, files))
    sections.append(_write_edgedrnn(work, target, layers, _thresholds(work), files))
    write_json(target / "memory.json", {"layers": sections, "scales": "codes.npz, <group>.scale"})
    files["memory.json"] = "shapes, bits and bytes of the images"
    named = {f"{FOLDER}/{name}": text for name, text in files.items()}
    figures: dict[str, Any] = {"accelerator_memory": sections}
    facts = {}
    if pruned:
        dense = (folder / "weights.bin").stat().st_size
        figures["packed_bytes"] = _packed_bytes(dense, layers, sections)
        facts["bytes of all weights"] = (
            f"{figures['packed_bytes']:,} with pruned layers as CBCSC, {dense:,} as dense codes"
        )
    return Part(TITLE, _text(sections, layers, pruned), named, figures=figures, facts=facts)


def _packed_bytes(dense: int, layers: Sequence[_Layer], sections: Sequence[dict[str, Any]]) -> int:
    """Bytes of weights.bin, with the CBCSC images in place of the codes of the matrices that they hold."""
    replaced = sum(len(part.packed()) for layer in layers for part in (layer.w_x, layer.w_h))
    return dense - replaced + sum(section["bytes"] for section in sections if section["layout"] == "cbcsc")


def _layers(net: DeltaNetwork, bits: int) -> list[_Layer]:
    codes = weight_codes(net, bits)
    found = []
    for index in range(net.rnn.num_layers):
        parts = [codes[f"rnn.{part}_l{index}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        size = parts[0].codes.shape[1]
        found.append(_Layer(f"rnn_l{index}", size, net.rnn.hidden_size, parts[0], parts[1], (parts[2], parts[3])))
    return found


def _thresholds(work: Work) -> tuple[int, int]:
    """Thresholds of inputs and states of the first layer as codes; 0 where all is sent, or there is no integer model."""
    if work.graph is None:
        return 0, 0
    scan = next(op for op in work.graph.ops if isinstance(op, Scan))
    found = {op.outputs[0].split(".")[-2]: op.threshold for op in scan.body.ops if isinstance(op, DeltaUpdate)}
    return found.get("ih", 0), found.get("hh", 0)


def _write_cbcsc(folder: Path, layer: _Layer, pes: int, files: dict[str, str]) -> dict[str, Any]:
    matrix, bits = layer.columns, max(layer.w_x.bits, layer.w_h.bits)
    packed = cbcsc.encode(matrix, pes, bits)
    name = layer.name
    count, shape = packed.values.size, packed.values.shape
    values, local = packed.value_bytes(), packed.index_bytes()
    (folder / f"{name}.cbcsc.bin").write_bytes(values + local)
    index_bits = max(packed.index_bits, 1)
    write_text(folder / f"{name}.val.hex", hex_image(packed.values, bits))
    write_text(folder / f"{name}.lidx.hex", hex_image(packed.local, index_bits))
    constants = {f"{name.upper()}_{key}": value for key, value in zip(("K", "M"), (packed.beats, pes), strict=True)}
    arrays = {f"{name}_val": (packed.values, bits), f"{name}_lidx": (packed.local, index_bits + 1)}
    header, source = c_arrays(f"{name}_cbcsc", arrays, constants)
    write_text(folder / f"{name}_cbcsc.h", header)
    write_text(folder / f"{name}_cbcsc.c", source)
    files[f"{name}.cbcsc.bin"] = f"{name}: VAL, then LIDX, at their bits"
    files[f"{name}.val.hex"], files[f"{name}.lidx.hex"] = "VAL, a word a line", "LIDX, a word a line"
    files[f"{name}_cbcsc.h"], files[f"{name}_cbcsc.c"] = "both as C arrays: names and sizes", "both as C arrays"

    stored = (folder / f"{name}.cbcsc.bin").read_bytes()
    text = (folder / f"{name}_cbcsc.c").read_text(encoding="utf-8")
    read = {
        "bin": Cbcsc.of_bytes(stored[: len(values)], stored[len(values) :], shape, packed.rows, bits),
        "hex": Cbcsc(
            read_hex_image((folder / f"{name}.val.hex").read_text(), bits).reshape(shape),
            read_hex_image((folder / f"{name}.lidx.hex").read_text(), index_bits, signed=False).reshape(shape),
            packed.rows,
            bits,
        ),
        "c": Cbcsc(
            read_c_array(text, f"{name}_val", shape), read_c_array(text, f"{name}_lidx", shape), packed.rows, bits
        ),
    }
    _same(name, {key: cbcsc.decode(one) for key, one in read.items()}, matrix)
    return {
        "layer": name,
        "layout": "cbcsc",
        "rows": packed.rows,
        "columns": shape[0],
        "pes": pes,
        "beats": packed.beats,
        "value_bits": bits,
        "index_bits": packed.index_bits,
        "words": count,
        "bytes": (folder / f"{name}.cbcsc.bin").stat().st_size,
        "dense_bytes": -(-matrix.size * bits // 8),
        "padding": count - int(np.count_nonzero(matrix)),
    }


def _write_edgedrnn(
    work: Work, folder: Path, layers: Sequence[_Layer], thresholds: tuple[int, int], files: dict[str, str]
) -> dict[str, Any]:
    pes = load_machine("edgedrnn").compute.pes
    bits = max(part.bits for layer in layers for part in (layer.w_x, layer.w_h, *layer.bias))
    matrices = [_edge_matrix(layer, pes) for layer in layers]
    stream = np.concatenate([matrix.reshape(-1, order="F") for matrix in matrices])
    (folder / "edgedrnn.bin").write_bytes(pack(stream, bits))
    write_text(folder / "edgedrnn.hex", hex_image(stream, bits))
    registers = edgedrnn.registers(0, *thresholds, layers[0].inputs, [layer.hidden for layer in layers], pes)
    write_text(folder / "edgedrnn.registers.hex", hex_image(registers, WORD_BITS))
    constants = {"EDGEDRNN_PES": pes, "EDGEDRNN_LAYERS": len(layers)}
    header, source = c_arrays("edgedrnn_params", {"edgedrnn_params": (stream, bits)}, constants)
    write_text(folder / "edgedrnn_params.h", header)
    write_text(folder / "edgedrnn_params.c", source)
    files |= {
        "edgedrnn.bin": "all layers, column after column [bias | W_x | 0 | W_h], at their bits",
        "edgedrnn.hex": "the same, a word a line",
        "edgedrnn.registers.hex": "the configuration, 32 registers",
        "edgedrnn_params.h": "the weights as a C array: name and sizes",
        "edgedrnn_params.c": "the weights as a C array",
    }
    text = (folder / "edgedrnn_params.c").read_text(encoding="utf-8")
    read = {
        "bin": unpack((folder / "edgedrnn.bin").read_bytes(), bits, stream.size).astype(np.int64),
        "hex": read_hex_image((folder / "edgedrnn.hex").read_text(), bits),
        "c": read_c_array(text, "edgedrnn_params", stream.shape),
    }
    _same("edgedrnn", read, stream)
    return {
        "layer": "all",
        "layout": "edgedrnn",
        "rows": len(matrices[0]),
        "columns": sum(matrix.shape[1] for matrix in matrices),
        "pes": pes,
        "value_bits": bits,
        "words": int(stream.size),
        "bytes": (folder / "edgedrnn.bin").stat().st_size,
    }


def _edge_matrix(layer: _Layer, pes: int) -> np.ndarray:
    """[bias | W_x | 0 | W_h]; both biases as one, in codes of the first."""
    first, second = layer.bias
    total = first.codes.astype(np.int64) + np.rint(second.codes * (second.scale[0] / first.scale[0])).astype(np.int64)
    limit = (1 << (first.bits - 1)) - 1
    return edgedrnn.layer_matrix(np.clip(total, -limit, limit), layer.w_x.codes, layer.w_h.codes, pes)


def _same(name: str, read: dict[str, np.ndarray], expected: np.ndarray) -> None:
    for form, found in read.items():
        if not np.array_equal(found, expected):
            raise KestrelError(f"memory image {name} ({form}) does not read back as the weights that it was made of")


def _text(sections: Sequence[dict[str, Any]], layers: Sequence[_Layer], pruned: bool) -> str:
    rows = []
    for section in sections:
        size = f"{section['rows']} x {section['columns']}"
        beats = section.get("beats")
        share = percent(section["bytes"] / section["dense_bytes"]) if "dense_bytes" in section else None
        rows.append((section["layer"], section["layout"], size, section["pes"], beats, section["bytes"], share))
    header = ("layer", "layout", "matrix", "PEs", "weights of a column and PE", "bytes", "of dense codes")
    lines = [
        f"{FOLDER}/ holds the codes of the delta layers for accelerators, as packed bytes, hex images (a word a line, two's "
        "complement) and C arrays. Each was read back and is the weights of codes.npz, bit by bit.",
        "",
        table(header, rows),
        "",
    ]
    if pruned:
        lines.append(
            "cbcsc (Spartus): VAL[column][beat][PE] and LIDX[column][beat][PE] of [W_x, W_h] without pointers; row = LIDX x PEs + PE. A "
            "padded word is 0."
        )
    else:
        lines.append("There is no cbcsc image, since no weights were pruned.")
    single = all(len(part.scale) == 1 for layer in layers for part in (layer.w_x, layer.w_h))
    lines.append(
        "edgedrnn: dense columns [bias | W_x | 0 | W_h], with both biases added up; 0 pads the inputs to a multiple of the PEs."
        + (
            ""
            if single
            else " Weights have a scale by row (codes.npz); a machine with one format for all needs `fixed` training."
        )
    )
    return "\n".join(lines)
