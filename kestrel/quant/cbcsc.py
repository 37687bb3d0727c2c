"""Column-balanced compressed sparse columns (CBCSC): sparse weights for an accelerator, without column pointers.

A matrix of R rows is spread over M processing elements (PEs): row r belongs to PE r mod M as its local row r div M. Every
PE stores the same number K of weights for every column, so that a column is a burst of K beats of M words, whose place
follows from its index, and a delta of zero skips the whole burst (Gao et al., Spartus, 2022):

    VAL[column][beat][PE], LIDX[column][beat][PE]        global row = LIDX * M + PE

LIDX has ceil(log2(R / M)) bits. A PE with fewer weights in a column is padded with zeros at local row 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kestrel.quant.packing import pack, unpack


@dataclass(frozen=True)
class Cbcsc:
    """An encoded matrix. `values` and `local` are int64 [columns, K, M]; `value_bits` hold two's complement."""

    values: np.ndarray
    local: np.ndarray
    rows: int
    value_bits: int

    @property
    def pes(self) -> int:
        """M, the processing elements."""
        return self.values.shape[2]

    @property
    def beats(self) -> int:
        """K, weights of a processing element in a column."""
        return self.values.shape[1]

    @property
    def index_bits(self) -> int:
        """Bits of a local row."""
        return index_bits(self.rows, self.pes)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.rows, self.values.shape[0]

    def value_bytes(self) -> bytes:
        """VAL as stored: fields of `value_bits` without gaps, in the order of the burst."""
        return pack(self.values, self.value_bits)

    def index_bytes(self) -> bytes:
        """LIDX as stored: fields of `index_bits` without gaps, in the order of the burst."""
        return pack_unsigned(self.local, self.index_bits)

    def words(self) -> np.ndarray:
        """Words (value << index_bits) | index, int64 [columns, K, M]; a value's sign takes part."""
        return (self.values << self.index_bits) | self.local

    @classmethod
    def of_words(cls, words: npt.ArrayLike, rows: int, value_bits: int) -> Cbcsc:
        """The inverse of `words`."""
        array = np.asarray(words, np.int64)
        bits = index_bits(rows, array.shape[2])
        return cls(array >> bits, array & ((1 << bits) - 1), rows, value_bits)

    @classmethod
    def of_bytes(cls, values: bytes, local: bytes, shape: tuple[int, int, int], rows: int, value_bits: int) -> Cbcsc:
        """The inverse of `value_bytes` and `index_bytes`; `shape` is (columns, K, M). Raises ValueError."""
        count = int(np.prod(shape))
        found = unpack(values, value_bits, count).astype(np.int64).reshape(shape)
        return cls(found, unpack_unsigned(local, index_bits(rows, shape[2]), count).reshape(shape), rows, value_bits)


def index_bits(rows: int, pes: int) -> int:
    """Bits of a local row: ceil(log2(rows / pes)); 0 where a processing element has a single row."""
    return (rows // pes - 1).bit_length()


def pack_unsigned(codes: npt.ArrayLike, bits: int) -> bytes:
    """Unsigned `codes` in fields of `bits`, least significant bit first. Raises ValueError where one does not fit."""
    flat = np.asarray(codes).reshape(-1).astype(np.int64)
    if flat.size and (flat.min() < 0 or flat.max() >= 1 << bits):
        raise ValueError(f"an index does not fit in {bits} bits")
    digits = (flat[:, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack_unsigned(data: bytes, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of `data`, int64. Raises ValueError where its length is another."""
    if len(data) != -(-count * bits // 8):
        raise ValueError(f"{count} indices of {bits} bits need {-(-count * bits // 8)} bytes, not {len(data)}")
    digits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    return (digits.astype(np.int64) << np.arange(bits)).sum(axis=1)


def encode(matrix: npt.ArrayLike, pes: int, value_bits: int = 8, beats: int | None = None) -> Cbcsc:
    """Encode integer codes [R, C] for `pes` processing elements.

    `beats` K, by default the most weights that a processing element has in any column (at least 1). Weights of a burst
    stand in the order of their local rows. Raises ValueError where rows cannot be spread evenly, where a column has more
    than K weights in a processing element, and where a code does not fit in `value_bits`.
    """
    codes = np.asarray(matrix)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError("a matrix of integer codes is encoded")
    rows, columns = codes.shape
    if pes < 1 or rows % pes:
        raise ValueError(f"{rows} rows cannot be spread over {pes} processing elements")
    half = 1 << (value_bits - 1)
    if codes.size and (codes.min() < -half or codes.max() >= half):
        raise ValueError(f"a code does not fit in {value_bits} bits")
    by_pe = codes.astype(np.int64).reshape(rows // pes, pes, columns).transpose(2, 0, 1)  # [C, L, M]
    most = int((by_pe != 0).sum(axis=1).max(initial=0))
    count = max(most, 1) if beats is None else beats
    if count < max(most, 1) or count > rows // pes:
        raise ValueError(f"bursts of {count} beats; columns have up to {most} of {rows // pes} weights in an element")
    order = np.argsort(by_pe == 0, axis=1, kind="stable")[:, :count]  # weights first, by their local rows
    values = np.take_along_axis(by_pe, order, axis=1)
    return Cbcsc(values, np.where(values != 0, order, 0), rows, value_bits)


def decode(packed: Cbcsc) -> np.ndarray:
    """The matrix again, int64 [R, C]."""
    columns, _, pes = packed.values.shape
    matrix = np.zeros((columns, packed.rows), np.int64)
    row = packed.local * pes + np.arange(pes)
    np.add.at(matrix, (np.arange(columns)[:, None], row.reshape(columns, -1)), packed.values.reshape(columns, -1))
    return matrix.T


def product(packed: Cbcsc, delta: npt.ArrayLike) -> np.ndarray:
    """W d as the accelerator computes it: columns of zero deltas are skipped. `delta` int [C] -> int64 [R]."""
    deltas = np.asarray(delta, np.int64)
    memory = np.zeros(packed.rows, np.int64)
    row = packed.local * packed.pes + np.arange(packed.pes)
    for column in np.flatnonzero(deltas):
        np.add.at(memory, row[column], packed.values[column] * deltas[column])
    return memory
