"""What flows between the ops of an integer graph, and the constants that they hold."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kestrel.errors import KestrelError
from kestrel.lower.columns import BALANCED, BITS, GROUPS, best_layout
from kestrel.quant.integer import INT32, twos_complement

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A named array of integer codes: `shape` without the batch, values proven to lie in `low` .. `high`.

    `scale` documents the real value, code * scale, where there is one scale.
    """

    shape: Shape
    low: int
    high: int
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.low > self.high or self.low < INT32[0] or self.high > INT32[1]:
            raise KestrelError(f"values {self.low}..{self.high} do not fit in 32 bits: use fewer bits")

    @property
    def bits(self) -> int:
        """Bits of a stored element: 8, 16 or 32, two's complement."""
        return next(b for b in (8, 16, 32) if twos_complement(b)[0] <= self.low and self.high <= twos_complement(b)[1])

    @property
    def size(self) -> int:
        """Elements of one clip."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of one clip."""
        return self.size * self.bits // 8

    @property
    def magnitude(self) -> int:
        """Largest |value|."""
        return max(abs(self.low), abs(self.high))


# Bits that an element takes when it is stored packed. `int<b>` is two's complement; `odd<b>` holds k of the odd value
# 2k + 1, k two's complement of b bits (half-integer grids such as +-0.5, +-1.5, at twice their value); binary = odd1,
# -1 and +1; ternary -1, 0, +1, five values to a byte; power4 +-2^e, e = 0..7. `sparse<b>` holds a bit for every element, and
# int<b> for those that are not zero, in rows of one length; `masked<b>` and `maskedodd<b>` are the same of a whole matrix, with
# int<b> or odd<b>, so that rows have lengths of their own. The bits here are those of an element that is zero. `balanced` and `groups`
# (kestrel.lower.columns) are for the columns of Accumulate; an element that is left out takes no bits.
STORAGE_BITS: dict[str, float] = {
    **{f"int{bits}": bits for bits in (*range(2, 9), 16, 32)},
    **{f"odd{bits}": bits for bits in range(2, 9)},
    **{f"sparse{bits}": 1 for bits in range(2, 9)},
    **{f"masked{bits}": 1 for bits in range(2, 9)},
    **{f"maskedodd{bits}": 1 for bits in range(2, 8)},
    "binary": 1,
    "ternary": 1.6,
    "power4": 4,
    BALANCED: 0,
    GROUPS: 0,
}
COLUMN_STORAGES = (BALANCED, GROUPS)
MASKED_ROWS = 16  # rows of a matrix in storage `masked<b>` after which the number of fields so far is stored (KESTREL_MASKED_ROWS)
_MOST_FIELDS = (1 << 16) - 1  # that such a number counts


def storage_of(values: np.ndarray, bits: int | None = None) -> str:
    """`int<b>` with b = `bits`, rounded up to 16 above 8, or the fewest of 8, 16 and 32 bits that hold `values`."""
    if bits is None:
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        bits = next((b for b in (8, 16, 32) if twos_complement(b)[0] <= low and high <= twos_complement(b)[1]), 64)
    return f"int{bits if bits <= 8 else 16 if bits <= 16 else bits}"


def leaves_out_zeros(storage: str) -> bool:
    """Whether elements that are zero take less than others."""
    return storage in COLUMN_STORAGES or storage.startswith(("sparse", "masked"))


def _odd_or_zero(values: np.ndarray) -> bool:
    return bool(((values & 1) | (values == 0)).all())


_NO_LETTERS = {ord(letter): None for letter in string.ascii_lowercase}


def field_bits(storage: str) -> int:
    """Bits of a stored field of `int<b>`, `odd<b>`, `sparse<b>`, `masked<b>`, `maskedodd<b>` or the storages of columns."""
    return BITS if storage in COLUMN_STORAGES else int(storage.translate(_NO_LETTERS))


def whole_bits(storage: str) -> int:
    """Bits of two's complement that hold every value of a storage that has `field_bits`, but for `odd<b>` of k of 2k + 1."""
    return field_bits(storage) + int(storage.startswith("maskedodd"))


def sparse_row_bytes(values: np.ndarray, bits: int) -> int:
    """Bytes of each row of `values` [rows, length] in storage `sparse<bits>`: a bitmap, then as many fields as the fullest row has."""
    rows, length = values.shape
    fields = int(np.count_nonzero(values, axis=1).max(initial=0)) if rows else 0
    return -(-length // 8) + -(-fields * bits // 8)


def masked_bytes(values: np.ndarray, bits: int) -> int:
    """Bytes of a matrix `values` [rows, length] in storage `masked<bits>` or `maskedodd<bits>`."""
    starts = max(len(values) - 1, 0) // MASKED_ROWS
    return 2 * starts + -(-values.size // 8) + -(-int(np.count_nonzero(values)) * bits // 8)


@dataclass(frozen=True, eq=False)
class Constant:
    """Integer values of any shape, with how they are stored (a key of STORAGE_BITS)."""

    values: np.ndarray  # int64
    storage: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.ascontiguousarray(self.values, dtype=np.int64))
        if self.storage not in STORAGE_BITS:
            raise KestrelError(f"a constant needs more than 32 bits or an unknown storage {self.storage!r}")
        low, high = self.range_of(self.storage)
        fits = self.values.size == 0 or (self.values.min() >= low and self.values.max() <= high)
        odd = self.storage.startswith(("odd", "binary")) and not (self.values & 1).all()
        odd |= self.storage.startswith("maskedodd") and not _odd_or_zero(self.values)
        magnitude = np.abs(self.values)
        power = self.storage == "power4" and ((magnitude & (magnitude - 1)) | (magnitude == 0)).any()
        if not fits or odd or power:
            raise KestrelError(f"a constant's values do not fit its storage {self.storage}: use more weight bits")

    @staticmethod
    def range_of(storage: str) -> tuple[int, int]:
        """Smallest and largest value of a storage."""
        if storage in ("binary", "ternary"):
            return -1, 1
        if storage == "power4":
            return -128, 128
        low, high = twos_complement(field_bits(storage))
        return (2 * low + 1, 2 * high + 1) if storage.startswith(("odd", "maskedodd")) else (low, high)

    @classmethod
    def of(cls, values: np.ndarray, bits: int | None = None) -> Constant:
        """`values` in fields of `bits`, or the fewest of 8, 16 and 32 that hold them."""
        values = np.asarray(values)
        return cls(values, storage_of(values, bits))

    def compact(self, rows: np.ndarray, columns: bool = False) -> Constant:
        """These values with their zeros left out where that makes them a quarter smaller, else as they are.

        `rows`: the values as C stores them, [rows, length]. For weights of few bits (`int2`..`int8`, `ternary`).
        `columns`: `rows` are the columns of an `Accumulate`, which start where their number says. Their storages `balanced` and
        `groups` are taken where they are a quarter smaller than a dense one and no more than a quarter larger than `sparse<b>`:
        kernels are faster with them.
        """
        if self.storage not in {*(f"int{bits}" for bits in range(2, 9)), "ternary"}:
            return self
        bits = 2 if self.storage == "ternary" else field_bits(self.storage)
        dense = math.ceil(rows.shape[1] / 5) if self.storage == "ternary" else math.ceil(rows.shape[1] * bits / 8)
        sparse = sparse_row_bytes(rows, bits)
        if columns:
            best = best_layout(rows)
            if best is not None and 4 * best.column_bytes <= min(3 * dense, 5 * sparse):
                return Constant(self.values, best.storage)
            return Constant(self.values, f"sparse{bits}") if 4 * sparse <= 3 * dense else self
        sizes = {f"sparse{bits}": len(rows) * sparse}
        if self.storage != "ternary" and np.count_nonzero(rows) <= _MOST_FIELDS:
            sizes[f"masked{bits}"] = masked_bytes(rows, bits)
            if bits > 2 and _odd_or_zero(rows):
                sizes[f"maskedodd{bits - 1}"] = masked_bytes(rows, bits - 1)
        storage = min(sizes, key=lambda name: sizes[name])
        return Constant(self.values, storage) if 4 * sizes[storage] <= 3 * len(rows) * dense else self

    @property
    def shape(self) -> Shape:
        return self.values.shape

    @cached_property
    def reach(self) -> int:
        """The largest sum of magnitudes over an output (first axis): bounds a product with inputs of magnitude 1."""
        return int(np.abs(self.values.reshape(len(self.values), -1)).sum(axis=1).max(initial=0))

    @cached_property
    def float32(self) -> np.ndarray:
        """The values as float32, for products that are exact in it."""
        return self.values.astype(np.float32)

    @cached_property
    def float64(self) -> np.ndarray:
        """The values as float64, for products that are exact in it."""
        return self.values.astype(np.float64)
