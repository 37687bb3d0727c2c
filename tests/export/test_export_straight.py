"""Straight-line code: statements that are run as Python, what sets of multiples cost, and odd weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.export.straight import LARGEST, MOST, can_be_straight, sets_of, statements, straight


def computed(weights: np.ndarray, bias: np.ndarray | None, x: np.ndarray) -> list[int]:
    """`sums` of the statements."""
    lines = [line.strip() for line in statements(weights, None if bias is None else bias.tolist())]
    code = [line for line in lines if not line.startswith("int32_t") and line not in "{}"]
    names = {"sums": [None] * len(weights), "x_in": x.tolist()}
    exec("\n".join(line.replace("in[", "x_in[") for line in code), {}, names)
    return names["sums"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 12), st.booleans(), st.sampled_from([1, 3, 8, 15]))
@settings(max_examples=40, deadline=None)
def test_statements_are_the_product(seed: int, outputs: int, inputs: int, biased: bool, largest: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-largest, largest + 1, (outputs, inputs))
    if largest == 15:
        weights = np.where(weights & 1, weights, weights + 1).clip(-15, 15)
    assert can_be_straight(weights)
    bias = rng.integers(-5000, 5000, outputs) if biased else None
    for x in (rng.integers(-128, 128, inputs), np.full(inputs, -128), np.full(inputs, 127)):
        assert computed(weights, bias, x) == (weights @ x + (0 if bias is None else bias)).tolist()


@pytest.mark.parametrize("weights", [np.zeros((3, 4)), np.ones((3, 4)), -np.ones((1, 1)), np.full((2, 2), -15)])
def test_extreme_matrices(weights: np.ndarray) -> None:
    weights = weights.astype(np.int64)
    x = np.arange(weights.shape[1]) - 128
    assert (
        computed(weights, np.array([3, -4000, 7])[: len(weights)], x)
        == (weights @ x + np.array([3, -4000, 7])[: len(weights)]).tolist()
    )


def test_larger_weights_are_left_to_others() -> None:
    assert can_be_straight(np.array([[8, -8]])) and can_be_straight(np.array([[15, -15]]))
    assert not can_be_straight(np.array([[9, 2]])) and not can_be_straight(np.array([[17, 1]]))


@pytest.mark.parametrize("registers", [1, 2, 3])
def test_sets_of_multiples_are_made_in_their_registers(registers: int) -> None:
    sets = sets_of(registers)
    assert len(set(sets.made)) == len(sets.made) and sets.made[0] == (1,)
    for made, steps, fixed, terms in zip(sets.made, sets.steps, sets.fixed, sets.terms.T, strict=True):
        held, values = {0: 1}, {1}
        for step in steps:
            value = held[step.left] << step.shift if step.shift else held[step.left] + step.sign * held[step.right]
            assert value == step.value and 0 <= step.to < registers
            held[step.to] = value
            values.add(value)
        assert values == set(made) and fixed == len(steps)
        assert {m for m in range(1, LARGEST + 1) if terms[m] == 1} == values


def test_the_search_is_worth_it_and_gives_the_same_each_time() -> None:
    rng = np.random.default_rng(1)
    weights = (np.rint(rng.standard_normal((16, 16)) * 6).astype(np.int64) | 1).clip(-15, 15)
    plan = straight(weights)
    assert plan.cost < 1.9 * weights.size
    assert sorted(output for block in plan.blocks for output in block) in (list(range(16)), list(range(17)))
    assert max(map(len, plan.blocks)) <= MOST
    assert plan.signs is not None and plan.shared is not None
    assert (np.outer(plan.signs, plan.shared) + 2 * plan.rows[:16] == weights).all()
    assert list(statements(weights)) == list(statements(weights.copy()))
