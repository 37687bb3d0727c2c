"""Cost of the networks of a search, its expectation under chances of candidates, and the best choice under limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kestrel.errors import UsageError
from kestrel.models.architecture import SKIP, Choice, Family, Layer, Pair, Rule

_UNITS = 1024  # steps in which the budget of one resource is counted where its costs have no larger common divisor


@dataclass(frozen=True)
class Resource:
    """One kind of cost: what every network pays, and what each candidate of each block adds.

    `limit` None = no limit. `unit` for people.
    """

    name: str
    unit: str
    fixed: int
    blocks: tuple[tuple[int, ...], ...]
    limit: int | None = None

    def of(self, choice: Sequence[int]) -> int:
        """Cost of the network that takes candidate choice[i] in block i."""
        return self.fixed + sum(costs[k] for costs, k in zip(self.blocks, choice, strict=True))

    def expected(self, chances: Sequence[Tensor]) -> Tensor:
        """Expectation where block i takes candidate k with chances[i][k], differentiable."""
        total = torch.as_tensor(float(self.fixed), dtype=chances[0].dtype, device=chances[0].device)
        for costs, p in zip(self.blocks, chances, strict=True):
            total = total + (p * torch.tensor(costs, dtype=p.dtype, device=p.device)).sum()
        return total

    @property
    def smallest(self) -> int:
        """Cost of the cheapest network."""
        return self.fixed + sum(min(costs) for costs in self.blocks)

    @property
    def largest(self) -> int:
        """Cost of the most expensive network."""
        return self.fixed + sum(max(costs) for costs in self.blocks)


def candidates(family: Family, kernels: Sequence[int], expansions: Sequence[int]) -> list[list[Choice]]:
    """The candidates of each block: every kernel with every expansion, and to skip it where it has a shortcut."""
    every = [Choice(kernel, expansion) for kernel in kernels for expansion in expansions]
    skip = Choice.parse(SKIP, "")
    return [[*every, skip] if place.shortcut else every for place in family.places()]


def resource(
    name: str,
    unit: str,
    family: Family,
    choices: Sequence[Sequence[Choice]],
    size: Pair,
    classes: int,
    cost: Callable[[Layer], int],
    limit: int | None = None,
) -> Resource:
    """The resource that sums `cost` over the layers with weights, for features of `size` (coefficients, frames).

    Raises UsageError where no network of the family stays within `limit`.
    """
    sizes = family.sizes(size)
    fixed = sum(map(cost, [family.first_layer(size), *family.last_layers(sizes[-1], classes)]))
    blocks = tuple(
        tuple(sum(map(cost, place.layers(choice, sizes[index], place.name(index)))) for choice in choices[index])
        for index, place in enumerate(family.places())
    )
    found = Resource(name, unit, fixed, blocks, limit)
    if limit is not None and found.smallest > limit:
        raise UsageError(
            f"model.search.budget_{name}: {limit:,} {unit} are less than the smallest network takes, {found.smallest:,}"
        )
    return found


def operations(rule: Rule) -> Callable[[Layer], int]:
    """Multiply-adds of a layer by a rule."""
    return lambda layer: layer.macs(rule)


def stored_bytes(bits_of: Callable[[str], int]) -> Callable[[Layer], int]:
    """Bytes of a layer's weights at `bits_of(name)` bits each, every layer padded to whole bytes."""
    return lambda layer: -(-layer.weights * bits_of(layer.name) // 8)


def expected_entropy(chances: Sequence[Tensor]) -> float:
    """Mean entropy of the blocks, in nats."""
    return float(sum(-(p * p.clamp(min=1e-30).log()).sum() for p in chances) / len(chances))


def best_choice(scores: Sequence[Sequence[float]], resources: Sequence[Resource]) -> list[int]:
    """The candidates of the largest sum of `scores` (log chances) within the limits of the resources.

    Exact where the costs have a common divisor of at least limit / 1024, else costs are rounded up to that unit, so that a
    limit is never exceeded. Of equal sums the cheaper one of the first resource is taken.
    """
    bound = [each for each in resources if each.limit is not None]
    free = [max(range(len(row)), key=lambda k, row=row: (row[k], -k)) for row in scores]  # type: ignore[misc]
    if all(each.of(free) <= int(each.limit or 0) for each in bound):
        return free
    costs, room = zip(*(_in_units(each) for each in bound), strict=True)
    shape = tuple(units + 1 for units in room)
    best = np.full(shape, -math.inf)
    best[(0,) * len(shape)] = 0.0
    taken: list[np.ndarray] = []
    for block, row in enumerate(scores):
        following, chosen = np.full(shape, -math.inf), np.full(shape, -1, dtype=np.int16)
        for k, score in enumerate(row):
            shift = tuple(cost[block][k] for cost in costs)
            if any(step > units for step, units in zip(shift, room, strict=True)):
                continue
            into = tuple(slice(step, None) for step in shift)
            source = best[tuple(slice(0, units + 1 - step) for step, units in zip(shift, room, strict=True))] + score
            better = source > following[into]
            following[into][better] = source[better]
            chosen[into][better] = k
        best = following
        taken.append(chosen)
    if not np.isfinite(best).any():
        return [min(range(len(row)), key=lambda k, b=b: bound[0].blocks[b][k]) for b, row in enumerate(scores)]  # type: ignore[misc]
    place = tuple(int(i) for i in np.unravel_index(int(best.argmax()), shape))
    choice: list[int] = []
    for block in reversed(range(len(scores))):
        k = int(taken[block][place])
        choice.append(k)
        place = tuple(at - cost[block][k] for at, cost in zip(place, costs, strict=True))
    return choice[::-1]


def _in_units(each: Resource) -> tuple[list[list[int]], int]:
    """(costs of the candidates, room for them), both in units that a limit holds at most 1024 of."""
    room = int(each.limit or 0) - each.fixed
    divisor = math.gcd(*(cost for row in each.blocks for cost in row)) or 1
    unit = max(divisor, -(-room // _UNITS), 1)
    return [[-(-cost // unit) for cost in row] for row in each.blocks], room // unit
