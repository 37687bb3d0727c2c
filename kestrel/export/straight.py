"""Straight-line code of small matrices: which values each input makes, which outputs share them, and the C statements.

A block of outputs has its sums in registers, its inputs are loaded one after the other. Of an input x a few multiples are made, each
by one shift, addition or subtraction, and added to the sums that need them; a magnitude that is not made is the sum or difference of two
that are. For every column of a block the cheapest set of multiples is found, by trying all of them. Which outputs make a block, and of odd
weights the signs below, follow from a search that only takes what saves instructions; it gives the same for the same weights.

Odd weights are w[o][i] = s[o] t[i] + 2 k[o][i] with signs s and t, so that y = s (sum of t x) + 2 (sum of k x): k has half the
magnitudes and zeros, and the sum of t x is shared by all outputs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LARGEST = 8  # magnitude of a weight, or of k
REGISTERS = 9  # that compilers leave a function on RV32E beside two pointers
MOST = 10  # outputs of a block: more registers cost loads and stores
_TEMPORARIES = 3  # most values of an input that are held at a time
_SPILL = 2  # instructions that a register too many takes for an input, about
_TRIALS = 600  # exchanges of outputs, and of signs, in the search
_MISSING = 99  # instructions of a magnitude that a set of multiples does not give
_NAMES = "xyz"
_IMMEDIATE = 1 << 11  # constants below it are part of an instruction


@dataclass(frozen=True)
class Make:
    """Register `to` = multiple `value` of the input: `left` << `shift`, or `left` plus `sign` times `right` (registers)."""

    to: int
    value: int
    left: int
    shift: int = 0
    right: int = 0
    sign: int = 0


@dataclass(frozen=True)
class Sets:
    """Sets of multiples that some registers can make: `steps` of each; instructions = fixed + counts of magnitudes @ terms."""

    made: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[Make, ...], ...]
    fixed: np.ndarray  # [sets]
    terms: np.ndarray  # [magnitudes 0 .. LARGEST, sets]: additions for a weight


@dataclass(frozen=True)
class Straight:
    """A matrix as straight lines: blocks of outputs, k (or the weights), the signs of odd ones, and instructions by operations."""

    rows: np.ndarray  # [outputs, inputs], k of odd weights
    blocks: tuple[tuple[int, ...], ...]  # outputs; number `outputs` is the shared sum
    temporaries: tuple[int, ...]  # of each block: registers for the multiples of an input
    signs: np.ndarray | None  # s [outputs] of odd weights
    shared: np.ndarray | None  # t [inputs] of odd weights
    cost: int


@functools.cache
def sets_of(registers: int) -> Sets:
    """All sets of multiples 1 .. LARGEST of an input that `registers` can hold one after the other, in the fewest steps."""
    one = frozenset([1])
    found: dict[frozenset[int], tuple[Make, ...]] = {one: ()}
    seen = {(one, one)}  # values that are held, and all that were made
    front: list[tuple[tuple[tuple[int, ...], frozenset[int]], tuple[Make, ...]]] = [(((1,), one), ())]
    while front:
        following = []
        for (held, made), steps in front:
            for make in _makes(held, registers):
                now = list(held) + [0] * (make.to + 1 - len(held))
                now[make.to] = make.value
                state = (tuple(now), made | {make.value})
                if (key := (frozenset(now), state[1])) not in seen:
                    seen.add(key)
                    following.append((state, (*steps, make)))
                    found.setdefault(state[1], (*steps, make))
        front = following
    names = sorted(found, key=lambda made: (len(found[made]), sorted(made)))
    terms = np.full((LARGEST + 1, len(names)), _MISSING)
    terms[0] = 0
    for place, made in enumerate(names):
        for a, b in itertools.product(made, repeat=2):
            for magnitude in (a + b, a - b):
                if 0 < magnitude <= LARGEST:
                    terms[magnitude, place] = 2
        terms[sorted(made), place] = 1
    fixed = np.array([len(found[made]) for made in names])
    return Sets(tuple(tuple(sorted(made)) for made in names), tuple(found[made] for made in names), fixed, terms)


def _makes(held: Sequence[int], registers: int) -> Iterator[Make]:
    """What one instruction makes of the values in registers, to a free register or over one of them."""
    targets = range(min(len(held) + 1, registers))
    for left, a in enumerate(held):
        for to in targets:
            for shift in range(1, LARGEST.bit_length()):
                if a << shift <= LARGEST:
                    yield Make(to, a << shift, left, shift)
            for right, b in enumerate(held):
                if left < right and a + b <= LARGEST:
                    yield Make(to, a + b, left, right=right, sign=1)
                if a > b:
                    yield Make(to, a - b, left, right=right, sign=-1)


def can_be_straight(weights: np.ndarray) -> bool:
    """Whether weights int [outputs, inputs] are small enough: magnitudes up to LARGEST, of odd ones below twice that."""
    largest = int(np.abs(weights).max(initial=0))
    return largest <= LARGEST or (_odd(weights) and largest < 2 * LARGEST)


def _odd(weights: np.ndarray) -> bool:
    return bool((weights & 1).all()) and int(np.abs(weights).max(initial=0)) > 1


def straight(weights: np.ndarray) -> Straight:
    """The straight lines of weights int [outputs, inputs] that `can_be_straight`."""
    return _straight(np.ascontiguousarray(weights, np.int64).tobytes(), weights.shape)


@functools.lru_cache(maxsize=64)
def _straight(data: bytes, shape: tuple[int, int]) -> Straight:
    weights = np.frombuffer(data, np.int64).reshape(shape)
    count = len(weights)
    found: list[_Search] = []
    for inside in (True, False) if _odd(weights) else (False,):
        rows = count + int(inside)
        fewest = -(-rows // MOST)
        found += [_Search(weights, blocks, inside) for blocks in range(fewest, min(rows, fewest + 2) + 1)]
    found.sort(key=lambda search: search.cost)
    for search in found[:2]:
        search.improve()
    return min(found[:2], key=lambda search: search.cost).result()


class _Search:
    """Blocks and signs of a matrix, improved step by step."""

    def __init__(self, weights: np.ndarray, blocks: int, inside: bool) -> None:
        self.weights, self.inside, self.odd = weights, inside, _odd(weights)
        self.signs = np.ones(len(weights), np.int64)
        self.shared = np.ones(weights.shape[1], np.int64)
        rows = len(weights) + int(inside)
        ends = [rows * place // blocks for place in range(blocks + 1)]
        order = [len(weights), *range(len(weights))] if inside else list(range(len(weights)))
        self.blocks = [order[first:last] for first, last in itertools.pairwise(ends)]
        self.costs = self._costs()

    @property
    def cost(self) -> float:
        """Instructions by operations: loads, multiples, additions, and what an output takes at its end."""
        outputs, inputs = self.weights.shape
        own = 3 * outputs if self.odd else outputs  # a shift, the shared sum, a store
        return sum(self.costs) + own + (2 * inputs if self.odd and not self.inside else 0)

    def _costs(self) -> list[float]:
        rows = self.rows()
        return [_cost(np.abs(rows[block]), len(self.blocks) == 1)[0] for block in self.blocks]

    def rows(self) -> np.ndarray:
        """k, or the weights; last the row of the shared sum."""
        if not self.odd:
            return self.weights
        k = (self.weights - np.outer(self.signs, self.shared)) // 2
        return np.concatenate([k, self.shared[None]])

    def improve(self) -> None:
        """Flip signs and exchange outputs of blocks where that saves instructions."""
        rng = np.random.default_rng(0)
        for _ in range(2):
            if self.odd:
                signs = [(vector, place) for vector in (self.signs, self.shared) for place in range(len(vector))]
                for single in signs:
                    self._flip([single])
                for _ in range(_TRIALS):
                    self._flip([signs[place] for place in rng.choice(len(signs), 2, replace=False)])
            for _ in range(_TRIALS if len(self.blocks) > 1 else 0):
                one, other = rng.choice(len(self.blocks), 2, replace=False)
                self._swap(int(one), int(other), rng)

    def _flip(self, places: Sequence[tuple[np.ndarray, int]]) -> None:
        before = self.costs
        for vector, place in places:
            vector[place] *= -1
        self.costs = self._costs()
        if sum(self.costs) > sum(before):
            for vector, place in places:
                vector[place] *= -1
            self.costs = before

    def _swap(self, one: int, other: int, rng: np.random.Generator) -> None:
        first, second = self.blocks[one], self.blocks[other]
        a, b = int(rng.integers(len(first))), int(rng.integers(len(second)))
        if max(first[a], second[b]) == len(self.weights):  # the shared sum stays in the first block
            return
        first[a], second[b] = second[b], first[a]
        rows = self.rows()
        costs = [_cost(np.abs(rows[block]), len(self.blocks) == 1)[0] for block in (first, second)]
        if sum(costs) <= self.costs[one] + self.costs[other]:
            self.costs[one], self.costs[other] = costs
        else:
            first[a], second[b] = second[b], first[a]

    def result(self) -> Straight:
        """What was found."""
        signs, shared = (self.signs, self.shared) if self.odd else (None, None)
        rows = self.rows()
        blocks = tuple(tuple(block) for block in self.blocks)
        held = tuple(_cost(np.abs(rows[block]), len(self.blocks) == 1)[1] for block in self.blocks)
        return Straight(rows, blocks, held, signs, shared, round(self.cost))


def _cost(magnitudes: np.ndarray, single: bool) -> tuple[float, int]:
    """Least instructions of the columns of a block with |k| [outputs of the block, inputs], and registers for multiples.

    `single`: there is no other block, so what it needs at its end takes no registers before.
    """
    counts = (magnitudes[:, :, None] == np.arange(LARGEST + 1)).sum(axis=0)
    used = magnitudes.any(axis=0)
    found = []
    for registers in range(1, _TEMPORARIES + 1):
        sets = sets_of(registers)
        least = (counts @ sets.terms + sets.fixed).min(axis=1) + 1
        over = max(0, len(magnitudes) + registers - REGISTERS - 2 * int(single))
        found.append((float(least[used].sum()) + _SPILL * over * int(used.sum()), registers))
    return min(found)


# ---------------------------------------------------------------------------------------------------------- statements


def statements(weights: np.ndarray, bias: Sequence[int] | None = None) -> Iterator[str]:
    """Statements that give `sums` W x + bias, of `in` int8 and weights int [outputs, inputs] that `can_be_straight`."""
    plan = straight(weights)
    count, inputs = weights.shape
    constants = [0] * count if bias is None else [int(value) for value in bias]
    inside = any(count in block for block in plan.blocks)
    odd = sum(value & 1 for value in constants)
    extra = int(plan.shared is not None and 2 * odd > count)  # in the shared sum: an odd bias then has an even rest
    if plan.shared is not None:
        yield "int32_t all;"
        if not inside:
            yield from _sum(plan.shared, extra)
    for block, registers in zip(plan.blocks, plan.temporaries, strict=True):
        yield "{"
        starts = [_start(plan, constants, output, extra) for output in block]
        lines = _Block(registers, starts)
        body = [line for place in range(inputs) for line in lines.column(place, plan.rows[list(block), place])]
        yield f"    int32_t {', '.join([f'a{o}' for o in range(len(block))] + list(_NAMES[: lines.values]))};"
        yield from (f"    {line}" for line in body)
        yield from (f"    a{o} = 0;" for o in range(len(block)) if lines.left[o] is None)
        for o, output in enumerate(block):
            if output == count:
                yield f"    all = a{o} + {lines.left[o]};" if lines.left[o] else f"    all = a{o};"
        for o, output in enumerate(block):
            if output < count:
                sign = None if plan.signs is None else int(plan.signs[output])
                done = 0 if lines.left[o] is None else starts[o] - (lines.left[o] or 0)
                rest = constants[output] - done if sign is None else constants[output] - 2 * done - sign * extra
                yield f"    sums[{output}] = {_output(f'a{o}', sign, rest)};"
        yield "}"


def _start(plan: Straight, constants: Sequence[int], output: int, extra: int) -> int:
    """What a sum may start with: the bias, of odd weights its half."""
    if output == len(constants):
        return extra
    if plan.signs is None:
        return constants[output]
    return (constants[output] - int(plan.signs[output]) * extra) >> 1


def _sum(signs: np.ndarray, start: int) -> Iterator[str]:
    yield f"all = {start} {'+' if signs[0] > 0 else '-'} in[0];"
    yield from (f"all {'+' if sign > 0 else '-'}= in[{place}];" for place, sign in enumerate(signs) if place)


def _output(name: str, sign: int | None, bias: int) -> str:
    """The value of an output: its sum, of odd weights doubled and with the shared sum, and its bias."""
    found = name if sign is None else f"{name} * 2 {'+' if sign > 0 else '-'} all"
    return f"{found} {'+' if bias > 0 else '-'} {abs(bias)}" if bias else found


class _Block:
    """The columns of a block. A sum begins with a value that is added, together with a constant, in one instruction.

    `left`: of that constant, what a sum did not begin with; None of a sum that has not begun.
    """

    def __init__(self, registers: int, starts: Sequence[int]) -> None:
        self.sets = sets_of(registers)
        self.starts = starts
        self.left: list[int | None] = [None] * len(starts)
        self.values = 1  # registers of an input's values that are used

    def column(self, place: int, weights: np.ndarray) -> Iterator[str]:
        """Input `place` into the sums of a block with weights [outputs of the block]."""
        if not weights.any():
            return
        counts = np.bincount(np.abs(weights), minlength=LARGEST + 1)
        best = int((counts @ self.sets.terms + self.sets.fixed).argmin())
        made, steps = self.sets.made[best], self.sets.steps[best]
        uses: dict[int, list[tuple[int, int]]] = {}
        for output, weight in enumerate(weights.tolist()):
            for magnitude, sign in _parts(abs(weight), made):
                uses.setdefault(magnitude, []).append((output, sign if weight > 0 else -sign))
        yield f"x = in[{place}];"
        yield from self._add("x", uses.pop(1, []))
        for step in steps:
            self.values = max(self.values, step.to + 1)
            to, left, right = _NAMES[step.to], _NAMES[step.left], _NAMES[step.right]
            made_of = f"{left} * {1 << step.shift}" if step.shift else f"{left} {'+' if step.sign > 0 else '-'} {right}"
            yield f"{to} = {made_of};"
            yield from self._add(to, uses.pop(step.value, []))

    def _add(self, value: str, uses: Sequence[tuple[int, int]]) -> Iterator[str]:
        for output, sign in uses:
            if self.left[output] is not None:
                yield f"a{output} {'+' if sign > 0 else '-'}= {value};"
            elif sign > 0 and abs(start := self.starts[output]) < _IMMEDIATE:
                yield f"a{output} = {value} + {start};" if start else f"a{output} = {value};"
                self.left[output] = 0
            else:
                yield f"a{output} = {'' if sign > 0 else '-'}{value};"
                self.left[output] = self.starts[output]


def _parts(magnitude: int, made: Sequence[int]) -> list[tuple[int, int]]:
    """(multiple, sign) of one or two multiples that give a magnitude."""
    if not magnitude:
        return []
    if magnitude in made:
        return [(magnitude, 1)]
    for a, b in itertools.product(made, repeat=2):
        for sign in (1, -1):
            if a + sign * b == magnitude:
                return [(a, 1), (b, sign)]
    raise ValueError(f"{magnitude} is not made of {made}")
