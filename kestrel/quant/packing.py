"""Integer codes of weights, and the bytes that they take when they are stored at their bits.

A code is a signed integer; weight = code * scale. Codes of b bits are stored as b-bit fields one after the other, least
significant bit first, with no gap between them; the unused bits of the last byte are zero. Fields of 2 to 16 bits hold
two's complement; a field of 1 bit holds the sign of a code that is -1 (bit set) or +1. Other storages (the names of
kestrel.lower.tensor.STORAGE_BITS): `odd<b>` fields hold k of the code 2k + 1; `ternary` codes stand five to a byte, the first
as the least significant digit of code + 1 in base 3; `power4` fields hold the exponent e of +-2^e, with the sign above it.

Codes that pruning made zero can be left out: a bit for every code, set where it is not zero, then the codes that are not zero in
their storage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_BITS = 16
SCALE_BYTES = 4  # a scale is stored as one float32


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer that a field of `bits` can hold. Raises ValueError outside 1..16 bits."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"codes have 1 to {MAX_BITS} bits, not {bits}")
    return (-1, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def code_type(bits: int) -> npt.DTypeLike:
    """The NumPy integer type that holds codes of `bits`: int8 up to 8 bits, else int16."""
    return np.int8 if bits <= 8 else np.int16


def pack(codes: npt.ArrayLike, bits: int) -> bytes:
    """Store integer `codes` (any shape, row-major order) in fields of `bits`; ceil(count * bits / 8) bytes.

    Raises ValueError where a code does not fit.
    """
    low, high = code_range(bits)
    flat = np.asarray(codes).reshape(-1).astype(np.int64)
    if flat.size and (flat.min() < low or flat.max() > high or (bits == 1 and not flat.all())):
        raise ValueError(f"a code does not fit in {bits} bits")
    fields = (flat < 0).astype(np.int64) if bits == 1 else flat & ((1 << bits) - 1)
    digits = (fields[:, None] >> np.arange(bits)) & 1  # [count, bits]
    return np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack(data: bytes, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of `data`, the inverse of `pack`: int8 or int16 [count].

    Raises ValueError where `data` is not exactly as long as `count` fields need.
    """
    low, _ = code_range(bits)
    if len(data) != -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits need {-(-count * bits // 8)} bytes, not {len(data)}")
    digits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    fields = (digits.astype(np.int64) << np.arange(bits)).sum(axis=1)
    codes = 1 - 2 * fields if bits == 1 else np.where(fields >= -low, fields + 2 * low, fields)
    return codes.astype(code_type(bits))


_TRITS = 3 ** np.arange(5)  # of a byte


def pack_storage(codes: npt.ArrayLike, storage: str) -> bytes:
    """Integer `codes` (any shape, row-major order) as bytes in `storage`. Raises ValueError where a code does not fit."""
    flat = np.asarray(codes).reshape(-1).astype(np.int64)
    if storage == "binary":
        return pack(flat, 1)
    if storage == "ternary":
        if flat.size and np.abs(flat).max() > 1:
            raise ValueError("a code is not ternary")
        digits = np.zeros(-(-flat.size // 5) * 5, np.int64)
        digits[: flat.size] = flat + 1
        return (digits.reshape(-1, 5) @ _TRITS).astype(np.uint8).tobytes()
    if storage == "power4":
        exponents = np.log2(np.maximum(np.abs(flat), 1)).astype(np.int64)
        if (np.abs(flat) != 1 << exponents).any() or exponents.max(initial=0) > 7:
            raise ValueError("a code is not a signed power of two up to 128")
        return pack(np.where(flat < 0, exponents - 8, exponents), 4)
    bits = int(re.sub(r"\D", "", storage))
    if storage.startswith("odd"):
        if not (flat & 1).all():
            raise ValueError("a code of an odd grid is even")
        return pack((flat - 1) // 2, bits)
    return pack(flat, bits)


def unpack_storage(data: bytes, storage: str, count: int) -> np.ndarray:
    """The first `count` codes of `data`, the inverse of `pack_storage`: int8 or int16 [count]."""
    if storage == "ternary":
        numbers = np.frombuffer(data, np.uint8).astype(np.int64)
        return ((numbers[:, None] // _TRITS % 3).reshape(-1)[:count] - 1).astype(np.int8)
    if storage == "power4":
        fields = unpack(data, 4, count).astype(np.int64)
        return np.where(fields < 0, -(1 << (fields & 7)), 1 << (fields & 7)).astype(np.int16)
    bits = 1 if storage == "binary" else int(re.sub(r"\D", "", storage))
    codes = unpack(data, bits, count)
    return (2 * codes.astype(np.int16) + 1) if storage.startswith("odd") else codes


def pack_kept(codes: npt.ArrayLike, storage: str) -> bytes:
    """Integer `codes` (any shape, row-major order) without their zeros, the others in `storage`.

    Raises ValueError where one of them does not fit.
    """
    flat = np.asarray(codes).reshape(-1)
    kept = flat != 0
    return np.packbits(kept, bitorder="little").tobytes() + pack_storage(flat[kept], storage)


def unpack_kept(data: bytes, storage: str, count: int) -> np.ndarray:
    """The first `count` codes of `data`, the inverse of `pack_kept`: int8 or int16 [count]."""
    size = -(-count // 8)
    kept = np.unpackbits(np.frombuffer(data[:size], np.uint8), count=count, bitorder="little").astype(bool)
    found = unpack_storage(data[size:], storage, int(kept.sum()))
    codes = np.zeros(count, found.dtype)
    codes[kept] = found
    return codes


@dataclass(frozen=True)
class WeightCodes:
    """A weight array as integers: value = code * scale, with one scale for all or one per index of the first axis.

    `storage` says how codes are packed; None = two's complement fields of `bits`, or signs at 1 bit. `kept`: weights were
    pruned, and this is the storage of codes that are not zero; zeros are left out where that takes fewer bytes.
    """

    codes: np.ndarray  # int8 or int16, the shape of the weights
    scale: np.ndarray  # float32 [1] or [first axis]
    bits: int
    storage: str | None = None
    kept: str | None = None

    @property
    def stored_as(self) -> str:
        """The name of the storage (a key of kestrel.lower.tensor.STORAGE_BITS)."""
        if self.storage is not None:
            return self.storage
        return "binary" if self.bits == 1 else f"int{self.bits if self.bits <= 8 else 16}"

    def decode(self) -> np.ndarray:
        """The weights that the codes stand for, float32."""
        scale = self.scale.reshape((-1,) + (1,) * (self.codes.ndim - 1)) if self.codes.ndim else self.scale[0]
        return (self.codes.astype(np.float32) * scale).astype(np.float32)

    @property
    def leaves_out_zeros(self) -> bool:
        """Whether the codes are stored without their zeros."""
        return self.kept is not None and len(pack_kept(self.codes, self.kept)) < len(self._dense())

    def packed(self) -> bytes:
        """The codes at their bits, as stored."""
        return pack_kept(self.codes, self.kept) if self.kept is not None and self.leaves_out_zeros else self._dense()

    def _dense(self) -> bytes:
        return pack(self.codes, self.bits) if self.storage is None else pack_storage(self.codes, self.storage)

    def scale_bytes(self) -> bytes:
        """The scales as stored, little-endian float32."""
        return self.scale.astype("<f4").tobytes()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed codes and of their scales."""
        return len(self.packed()) + len(self.scale_bytes())


def encode(values: npt.ArrayLike, bits: int, full_scale: float | None = None) -> WeightCodes:
    """Integer codes of `values` at `bits`, rounded half to even and symmetric: |code| <= 2^(bits-1) - 1.

    With `full_scale` r the grid is the one of a quantiser with range r, code * r / 2^(bits-1), so weights that were
    trained on it are kept. Without it each index of the first axis (a block, or an output channel) gets the finest
    scale that holds its largest magnitude. Codes of 1 bit are signs, their scale is r or the mean magnitude.

    Raises ValueError where the values are not finite or the bits are outside 1..16.
    """
    high = code_range(bits)[1]
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("the values are not finite")
    rows = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)  # [first axis, others]
    if full_scale is not None:
        scale = np.array([full_scale / 2 ** (bits - 1)])
    else:
        magnitude = np.abs(rows)
        scale = magnitude.mean(axis=1) if bits == 1 else magnitude.max(axis=1) / high
        scale = np.where(scale > 0, scale, 1.0)
    scale = scale.astype(np.float32)
    scale[scale == 0] = np.finfo(
        np.float32
    ).tiny  # values too small for float32: their codes saturate, no division by 0
    codes = (
        np.where(rows < 0, -1, 1) if bits == 1 else np.rint(rows / scale[:, None].astype(np.float64)).clip(-high, high)
    )
    return WeightCodes(codes.reshape(array.shape).astype(code_type(bits)), scale, bits)
