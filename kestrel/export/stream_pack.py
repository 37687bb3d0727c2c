"""Weights of streamed networks: packed for the table kernel, or as straight-line code (runtime/include/kestrel_stream.h)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kestrel.digits import signed_digits
from kestrel.errors import KestrelError
from kestrel.export.straight import can_be_straight, statements, straight
from kestrel.lower.tensor import whole_bits

QUAD, PAIR, WIDE, POWER = "KESTREL_STREAM_QUAD", "KESTREL_STREAM_PAIR", "KESTREL_STREAM_WIDE", "KESTREL_STREAM_POWER"
BLOCK = 8  # outputs whose sums stay in registers, of the twelve that RV32E has to spare
_LINE = "    "


@dataclass(frozen=True)
class PackedMatrix:
    """uint16 words of weights, and how the kernel reads them."""

    words: np.ndarray
    kind: str
    odd: bool

    @property
    def bytes(self) -> int:
        return 2 * self.words.size


def pack_matrix(weights: np.ndarray, storage: str) -> PackedMatrix:
    """Weights int [outputs, inputs] of a storage (a key of STORAGE_BITS), in the fewest of 2, 4 and 8 bits that hold them."""
    kind, odd = kind_of(storage)
    numbers = (weights - 1) // 2 if odd else weights
    if kind == QUAD:
        padded = _padded(numbers, 4)
        groups = padded.reshape(len(padded), -1, 4)
        fields = [((groups >> bit & 1) << np.arange(4)).sum(axis=2) for bit in range(4)]
    elif kind == PAIR:
        padded = _padded(numbers, 2) + 2
        fields = [padded[:, ::2] + 4 * padded[:, 1::2]]
    elif kind == WIDE:
        fields = [numbers & 15, (numbers >> 4) + 8]
    else:
        exponents = np.log2(np.abs(numbers)).astype(np.int64)
        fields = [exponents + 8 * (numbers < 0)]
    nibbles = _padded(np.stack(fields, axis=2).reshape(len(weights), -1), 4)
    words = (nibbles.reshape(len(weights), -1, 4) << (4 * np.arange(4))).sum(axis=2)  # [outputs, groups]
    return PackedMatrix(words.T.astype(np.uint16), kind, odd)


def _padded(values: np.ndarray, multiple: int) -> np.ndarray:
    """Rows filled up with numbers that are never used: behind the last input the tables hold 0."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % multiple)))


def kind_of(storage: str) -> tuple[str, bool]:
    """How the table kernel reads a storage, and whether it holds odd values 2k + 1. Raises KestrelError where it cannot."""
    if storage == "ternary":
        return PAIR, False
    if storage == "binary":
        return PAIR, True
    if storage.startswith("power"):
        return POWER, False
    bits = whole_bits(storage)
    if bits > 8:
        raise KestrelError(f"weights of {bits} bits cannot run column by column, 8 are the most")
    return PAIR if bits <= 2 else QUAD if bits <= 4 else WIDE, storage.startswith("odd")


# ------------------------------------------------------------------------------------------------------ straight lines


def straight_lines(weights: np.ndarray, bias: np.ndarray | None = None, block: int = BLOCK) -> Iterator[str]:
    """Statements that give `sums` W x + bias, of x int8 and weights int [outputs, inputs]; a block of outputs at a time.

    Small weights: kestrel.export.straight. Of others each value of a block's weights is made once for an input, by shifts and
    additions, and added to the sums that it belongs to. Odd weights are 2 k + 1: the sum of all inputs is shared, and k has fewer
    digits, many of them none.
    """
    if can_be_straight(weights):
        yield from statements(weights, None if bias is None else bias.tolist())
        return
    starts = np.zeros(len(weights), np.int64) if bias is None else bias
    halves = _halves(weights)
    if halves is not None:
        yield "int32_t all = 0;"
        yield from (f"all += in[{place}];" for place in range(weights.shape[1]))
        weights = halves
    for start, rows in _blocks(weights, block):
        yield "{"
        sums = ", ".join(f"a{o} = {0 if halves is not None else starts[start + o]}" for o in range(len(rows)))
        yield f"{_LINE}int32_t {sums}, x;"
        for place in range(weights.shape[1]):
            column = rows[:, place]
            if not column.any():
                continue
            yield f"{_LINE}x = in[{place}];"
            yield from (_LINE + line for line in _additions(column))
        for o in range(len(rows)):
            found = f"all + 2 * a{o} + {starts[start + o]}" if halves is not None else f"a{o}"
            yield f"{_LINE}sums[{start + o}] = {found};"
        yield "}"


def _blocks(weights: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first output, rows) of blocks of nearly the same size."""
    count = -(-len(weights) // block)
    starts = [len(weights) * place // count for place in range(count + 1)]
    yield from ((first, weights[first:last]) for first, last in itertools.pairwise(starts))


def _halves(weights: np.ndarray) -> np.ndarray | None:
    """k of weights that are all 2 k + 1, where that is worth it."""
    return (weights - 1) // 2 if (weights & 1).all() and np.abs(weights).max() > 1 else None


def _additions(column: np.ndarray) -> Iterator[str]:
    """The sums of one input: its multiples from small to large, so that few are alive at a time."""
    by_odd: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for output, weight in enumerate(column.tolist()):
        if weight:
            size = abs(weight)
            shift = (size & -size).bit_length() - 1
            by_odd.setdefault(size >> shift, {}).setdefault(shift, []).append((output, 1 if weight > 0 else -1))
    for odd in sorted(by_odd):
        name = "x"
        if odd > 1:
            name = "y"
            yield f"{{ const int32_t y = {multiple(odd)};"
        for shift, uses in sorted(by_odd[odd].items()):
            term = name
            if shift:
                yield f"{{ const int32_t z = {name} * {1 << shift};"
                term = "z"
            for output, sign in uses:
                yield f"a{output} {'+' if sign > 0 else '-'}= {term};"
            if shift:
                yield "}"
        if odd > 1:
            yield "}"


def multiple(factor: int) -> str:
    """x times an odd factor > 1 by shifts and additions: a product with a power of two is a shift to every compiler."""
    terms: list[str] = []
    for sign, exponent in signed_digits(factor):
        word = f"x * {1 << exponent}" if exponent else "x"
        terms.append((" + " if sign > 0 else " - ") + word if terms else word)
    return "".join(terms)


def straight_cost(weights: np.ndarray, block: int = BLOCK) -> int:
    """Instructions of the straight lines, by their operations: loads, shifts, additions."""
    if can_be_straight(weights):
        return straight(weights).cost
    total = 0
    halves = _halves(weights)
    if halves is not None:
        weights, total = halves, 2 * weights.shape[1] + 2 * len(weights)
    for _, rows in _blocks(weights, block):
        total += 2 * len(rows)
        for column in rows.T:
            total += int(column.any())
            for size in {abs(int(w)) for w in column if w}:
                odd = size // (size & -size)
                total += 2 * (len(signed_digits(odd)) - 1) + (size != odd)
            total += int(np.count_nonzero(column))
    return total
