"""Integer constants as C reads them: weight rows packed at their bits, each row from a byte on (runtime/include/kestrel.h)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kestrel.lower.columns import BALANCED, GROUPS, layout_of
from kestrel.lower.memory import DIRECT
from kestrel.lower.tensor import COLUMN_STORAGES, MASKED_ROWS, field_bits, sparse_row_bytes
from kestrel.quant import cbcsc
from kestrel.quant.packing import pack, pack_storage

KINDS = {"int4": "KESTREL_INT4", "int2": "KESTREL_INT2", "ternary": "KESTREL_TERNARY", "binary": "KESTREL_BINARY"}
_TERNARY_WEIGHTS = 3 ** np.arange(4, -1, -1)  # of five digits, the first value is the most significant


@dataclass(frozen=True)
class Packed:
    """`array` int8, int16, int32 or uint8 [rows, elements or bytes of a row], and the fields of kestrel_weights.

    Of a masked matrix there is one row of all bytes, `length` elements make a row of weights, and `start` bytes come before
    the place that `data` points to.
    """

    array: np.ndarray
    kind: str
    bits: int
    field_bits: int
    bitmap_bytes: int = 0
    lanes: int = 0
    start: int = 0
    length: int | None = None

    @property
    def row_bytes(self) -> int:
        return self.array.shape[1] * self.array.itemsize if self.length is None else self.length


def pack_rows(values: np.ndarray, storage: str) -> Packed:
    """Integer `values` [rows, length] in their storage (a key of STORAGE_BITS)."""
    if storage in DIRECT:
        bits = DIRECT[storage]
        return Packed(values.astype(f"int{bits}"), "KESTREL_DIRECT", bits, 0)
    if storage == "ternary":
        return Packed(_ternary(values), KINDS[storage], 8, 0)
    if storage in COLUMN_STORAGES:
        return _balanced(values) if storage == BALANCED else _groups(values)
    if storage.startswith("sparse"):
        return _sparse(values, field_bits(storage))
    if storage.startswith("masked"):
        return _masked(values, field_bits(storage), storage.startswith("maskedodd"))
    if storage == "power4":
        rows = [np.frombuffer(pack_storage(row, storage), np.uint8) for row in values]
        return Packed(np.stack(rows) if rows else np.zeros((0, 0), np.uint8), "KESTREL_POWER", 16, 0)
    odd = storage.startswith("odd")
    bits = 1 if storage == "binary" else field_bits(storage)
    fields = (values - 1) // 2 if odd else values
    rows = [np.frombuffer(pack(row, bits), np.uint8) for row in fields]
    array = np.stack(rows) if rows else np.zeros((0, 0), np.uint8)
    kind = "KESTREL_ODD" if odd else KINDS.get(storage, "KESTREL_FIELDS")
    return Packed(array, kind, 8, 0 if kind in KINDS.values() else bits)


def _ternary(values: np.ndarray) -> np.ndarray:
    """Five values to a byte: with q = their number in base 3, ceil(256 q / 243), from which products with 3 give back
    one digit after the other as whole parts.
    """
    rows, length = values.shape
    digits = np.zeros((rows, -(-length // 5) * 5), np.int64)
    digits[:, :length] = values + 1
    numbers = digits.reshape(rows, -1, 5) @ _TERNARY_WEIGHTS
    return (-(-numbers * 256 // 243)).astype(np.uint8)


def _sparse(values: np.ndarray, bits: int) -> Packed:
    """A bit for every element, least significant first, then fields of those that are not zero; rows of one length."""
    rows, length = values.shape
    array = np.zeros((rows, sparse_row_bytes(values, bits)), np.uint8)
    bitmap = -(-length // 8)
    for row, found in zip(array, values, strict=True):
        row[:bitmap] = np.packbits(found != 0, bitorder="little")
        fields = np.frombuffer(pack(found[found != 0], bits), np.uint8)
        row[bitmap : bitmap + len(fields)] = fields
    return Packed(array, "KESTREL_SPARSE", 8, bits, bitmap)


def _masked(values: np.ndarray, bits: int, odd: bool) -> Packed:
    """Before `data`, backwards, uint16: the fields of all rows before row 16, 32, ...; then a bit for every element of the matrix,
    and fields of those that are not zero; neither begins anew with a row.
    """
    kept = values[values != 0]
    starts = np.cumsum(np.count_nonzero(values, axis=1))[MASKED_ROWS - 1 : len(values) - 1 : MASKED_ROWS]
    parts = [
        starts[::-1].astype("<u2").tobytes(),
        np.packbits(values.reshape(-1) != 0, bitorder="little").tobytes(),
        pack((kept - 1) // 2 if odd else kept, bits),
    ]
    array = np.frombuffer(b"".join(parts), np.uint8)[None]
    kind = "KESTREL_MASKED_ODD" if odd else "KESTREL_MASKED"
    return Packed(array, kind, 8, bits, len(parts[1]), start=len(parts[0]), length=values.shape[1])


def _balanced(values: np.ndarray) -> Packed:
    """Values [K, M] of a column, then local rows [K, M]: low bytes, and high ones where they need two."""
    layout = layout_of(values, BALANCED)
    encoded = cbcsc.encode(values.T, layout.lanes, beats=layout.kept // layout.lanes)
    local = encoded.local.reshape(len(values), -1)
    parts = [encoded.values.reshape(len(values), -1), *(local >> 8 * byte for byte in range(layout.index_bytes))]
    array = (np.concatenate(parts, axis=1) & 255).astype(np.uint8)
    return Packed(array, "KESTREL_BALANCED", 8, 0, lanes=layout.lanes)


def _groups(values: np.ndarray) -> Packed:
    """Numbers of the groups that a column keeps, then their values; padded with group 0 and zeros."""
    layout = layout_of(values, GROUPS)
    count, rows = values.shape
    blocks = values.reshape(count, rows // layout.lanes, layout.lanes)
    used = blocks.any(axis=2)
    order = np.argsort(~used, axis=1, kind="stable")[:, : layout.kept]
    kept = np.take_along_axis(used, order, axis=1)
    found = np.take_along_axis(blocks, order[..., None], axis=1)
    parts = [np.where(kept, order, 0), found.reshape(count, -1)]
    array = (np.concatenate(parts, axis=1) & 255).astype(np.uint8)
    return Packed(array, "KESTREL_GROUPS", 8, 0, lanes=layout.lanes)
