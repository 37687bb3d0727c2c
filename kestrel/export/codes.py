"""Integer weight codes: codes.npz to read, weights.bin as stored, and the accuracy with these weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.export.form import Part, Work
from kestrel.models.evaluate import accuracy
from kestrel.models.inventory import other_parameters, weight_codes
from kestrel.quant.packing import SCALE_BYTES, WeightCodes
from kestrel.store.markdown import table
from kestrel.store.npz import write_npz

EXPORTED = "integer weights (codes.npz)"


@dataclass(frozen=True)
class Stored:
    """A weight group inside weights.bin: its packed codes at `offset`, its float32 scales right behind them."""

    name: str
    shape: tuple[int, ...]
    bits: int
    offset: int
    code_bytes: int
    scale_bytes: int
    zeros_left_out: bool  # a bit for every code, then those that are not zero in `storage`
    storage: str
    largest_error: float  # between the trained weight and the one that its code stands for


def code_arrays(codes: Mapping[str, WeightCodes], others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Content of codes.npz: `<group>.codes` (int8, or int16 above 8 bits), `<group>.scale` (float32; weight = code *
    scale, along the first axis where there are several), `<group>.bits`, and `others` under their own names.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, group in codes.items():
        arrays[f"{name}.codes"] = group.codes
        arrays[f"{name}.scale"] = group.scale
        arrays[f"{name}.bits"] = np.array(group.bits, np.int64)
    return {**arrays, **others}


def write_packed(path: Path, codes: Mapping[str, WeightCodes], trained: Mapping[str, np.ndarray]) -> list[Stored]:
    """Write weights.bin, group after group: packed codes (kestrel.quant.packing), then scales as little-endian float32.

    `trained` holds the weights that the codes were made of.
    Returns where each group lies and how far off its codes are.
    """
    places = []
    with path.open("wb") as file:
        for name, group in codes.items():
            packed, scales = group.packed(), group.scale_bytes()
            error = np.abs(group.decode() - trained[name]).max(initial=0.0)
            shape, without = tuple(group.codes.shape), group.leaves_out_zeros
            storage = group.kept if group.kept and without else group.stored_as
            sizes = file.tell(), len(packed), len(scales)
            places.append(Stored(name, shape, group.bits, *sizes, without, storage, float(error)))
            file.write(packed)
            file.write(scales)
    return places


def codes_form(work: Work, folder: Path) -> Part:
    """codes.npz and weights.bin, and the accuracy of the network with the weights that the codes stand for."""
    net, bits = work.spotter.net, work.settings.weight_bits
    codes = weight_codes(net, bits)
    trained = {group.name: group.tensor.detach().float().cpu().numpy() for group in net.weight_groups()}
    right = accuracy(work.decoded, work.data.labels)
    changed = int((work.decoded.argmax(axis=1) != work.logits.argmax(axis=1)).sum())
    post = {f"post.{name}": value.detach().cpu().numpy() for name, value in work.spotter.post.state_dict().items()}
    others = {**other_parameters(net), **post}
    write_npz(folder / "codes.npz", code_arrays(codes, others))
    places = write_packed(folder / "weights.bin", codes, trained)
    total, rest = (folder / "weights.bin").stat().st_size, sum(array.size for array in others.values())
    text = "\n".join(
        [
            "weights.bin holds the weights as they are stored: per group its codes packed at their bits (signed, least "
            "significant bit first, no gaps), then its scales (float32, little-endian). weight = code x scale, with "
            "one scale for all or one for each index of the first axis. Of groups marked with * zeros are left out: a bit "
            "for every code, set where it is not zero, filled up to a byte, then the others."
            if any(place.zeros_left_out for place in places)
            else "one scale for all or one for each index of the first axis.",
            "",
            _sections(places, total),
            "",
            "codes.npz holds the same codes as int8 or int16 arrays to read (`<group>.codes`, `.scale`, `.bits`), and "
            f"the {rest:,} other numbers of the network in float32 (clipping ranges, constants of post-processing). "
            f"Weights that were trained without quantisation have {bits} bits here.",
            "",
            f"With the weights that the codes stand for, {changed:,} of {right.n:,} answers change.",
        ]
    )
    figures = {
        "weight_bytes": total,
        "weight_sections": [{**vars(place), "shape": list(place.shape)} for place in places],
        "answers_changed_by_codes": changed,
    }
    files = {"weights.bin": "weights as stored", "codes.npz": "the codes as integer arrays, and the other constants"}
    return Part("Integer weights", text, files, {EXPORTED: right}, figures)


def _sections(places: Sequence[Stored], total: int) -> str:
    rows: list[Sequence[Any]] = []
    for place in places:
        shape = " x ".join(str(size) for size in place.shape)
        name = f"{place.name} *" if place.zeros_left_out else place.name
        rows.append((name, shape, place.bits, place.offset, place.code_bytes, f"{place.largest_error:.2g}"))
        scales = str(place.scale_bytes // SCALE_BYTES)
        rows.append((f"{place.name}, scales", scales, 32, place.offset + place.code_bytes, place.scale_bytes, "-"))
    rows.append(("all", "", None, None, total, ""))
    return table(("section", "shape", "bits", "offset", "bytes", "largest error of a weight"), rows)
