"""Expected cost against enumeration; the best network within limits against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from kestrel.errors import UsageError
from kestrel.models.architecture import Architecture, Family, family_of
from kestrel.models.search_cost import Resource, best_choice, candidates, operations, resource, stored_bytes

FAMILY = Family(width_mult=0.25, n_cell_stages=[3])
SIZE, CLASSES = (10, 51), 5
CHOICES = candidates(FAMILY, [3, 7], [1, 2])


def _macs(limit: int | None = None) -> Resource:
    return resource("macs", "multiply-adds", FAMILY, CHOICES, SIZE, CLASSES, operations("exact"), limit)


def _paths() -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(row)) for row in CHOICES)))


def test_zero_is_a_candidate_where_there_is_a_shortcut() -> None:
    assert [len(row) for row in CHOICES] == [4, 5, 5]
    assert [str(choice) for choice in CHOICES[1]] == ["3e1", "3e2", "7e1", "7e2", "Z"]


def test_cost_of_a_path_is_that_of_its_network() -> None:
    macs = _macs()
    stored = resource("bytes", "bytes", FAMILY, CHOICES, SIZE, CLASSES, stored_bytes(lambda name: 4))
    for path in _paths():
        blocks = [str(row[k]) for row, k in zip(CHOICES, path, strict=True)]
        net = Architecture(**family_of(FAMILY), blocks=blocks)
        assert macs.of(path) == net.macs(SIZE, CLASSES)
        assert stored.of(path) == sum(-(-layer.weights // 2) for layer in net.layers(SIZE, CLASSES))


def test_expected_cost_equals_the_enumeration() -> None:
    macs = _macs()
    torch.manual_seed(0)
    alphas = [torch.randn(len(row), dtype=torch.float64, requires_grad=True) for row in CHOICES]
    chances = [torch.softmax(alpha, 0) for alpha in alphas]
    expected = macs.expected(chances)
    by_path = sum(
        torch.stack([p[k] for p, k in zip(chances, path, strict=True)]).prod() * macs.of(path) for path in _paths()
    )
    torch.testing.assert_close(expected, by_path)  # type: ignore[arg-type]
    for mine, other in zip(
        torch.autograd.grad(expected, alphas, retain_graph=True),
        torch.autograd.grad(by_path, alphas),
        strict=True,  # type: ignore[arg-type]
    ):
        torch.testing.assert_close(mine, other)


def test_expected_operations_of_the_paper() -> None:
    """Uniform chances, largest and smallest network at width 1 and 10 coefficients, by the original's rule."""
    family = Family()
    choices = candidates(family, [3, 5, 7], [1, 2, 3, 4, 5, 6])
    macs = resource("macs", "", family, choices, (10, 51), 12, operations("floor"))
    uniform = [torch.full((len(row),), 1 / len(row)) for row in choices]
    assert float(macs.expected(uniform)) / 1e6 == pytest.approx(36.5, abs=0.05)
    assert macs.largest / 1e6 == pytest.approx(72.8, abs=0.05)
    assert macs.smallest / 1e6 == pytest.approx(2.04, abs=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_best_choice_within_limits_is_that_of_brute_force(seed: int) -> None:
    torch.manual_seed(seed)
    scores = [torch.log_softmax(2 * torch.randn(len(row)).double(), 0).tolist() for row in CHOICES]
    plain = _macs()
    limit = plain.smallest + (plain.largest - plain.smallest) * (seed + 1) // 8
    macs = _macs(limit)
    stored = resource("bytes", "bytes", FAMILY, CHOICES, SIZE, CLASSES, stored_bytes(lambda name: 8))
    half = resource(
        "bytes",
        "bytes",
        FAMILY,
        CHOICES,
        SIZE,
        CLASSES,
        stored_bytes(lambda name: 8),
        (stored.smallest + stored.largest) // 2,
    )
    for resources in ([macs], [macs, half]):
        inside = [path for path in _paths() if all(each.of(path) <= (each.limit or 0) for each in resources)]
        best = max(sum(row[k] for row, k in zip(scores, path, strict=True)) for path in inside)
        found = best_choice(scores, resources)
        assert all(each.of(found) <= (each.limit or 0) for each in resources)
        assert sum(row[k] for row, k in zip(scores, found, strict=True)) == pytest.approx(best)


def test_limits_hold_in_the_whole_space() -> None:
    """With 12 blocks and odd limits, where costs are rounded to units."""
    family = Family()
    choices = candidates(family, [3, 5, 7], [1, 2, 3, 4, 5, 6])
    torch.manual_seed(1)
    for limit in (2_200_001, 3_400_000, 19_999_999):
        macs = resource("macs", "", family, choices, (10, 49), 12, operations("exact"), limit)
        scores = [torch.log_softmax(torch.randn(len(row)), 0).tolist() for row in choices]
        found = macs.of(best_choice(scores, [macs]))
        assert 0.97 * limit - 130_000 <= found <= limit


def test_a_limit_below_the_smallest_network_is_refused() -> None:
    with pytest.raises(UsageError, match="model.search.budget_macs: 1,000 multiply-adds are less than"):
        _macs(1000)
