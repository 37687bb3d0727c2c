from __future__ import annotations

import numpy as np
import pytest
from lower_kit import FEATURE_SCALE, FRAMES, WIDTH, MixedNet, codes_of, features, graph_of, settled, spotter_of

from kestrel.errors import UsageError
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.shift_add import shift_add_form
from kestrel.lower.spotter import lower
from kestrel.quant.integer import signed_digits


def multipliers(graph: IntegerGraph) -> list[tuple[int, ...]]:
    found = []
    for op, _ in graph.all_ops():
        rescale = getattr(op, "rescale", None)
        found.append(getattr(op, "multipliers", rescale.multipliers if rescale else ()))
    return [values for values in found if values]


@pytest.mark.parametrize("terms", [1, 3])
def test_every_multiplier_is_a_sum_of_few_powers_of_two(terms: int) -> None:
    for graph in (lower(spotter_of([{"normalise": "channel"}]), FEATURE_SCALE), graph_of(settled(MixedNet()))):
        found = shift_add_form(graph, terms)
        flat = [m for values in multipliers(found) for m in values]
        assert max(len(signed_digits(m)) for m in flat) == terms
        assert max(len(signed_digits(m)) for values in multipliers(graph) for m in values) > terms
        assert found.outputs == graph.outputs


def test_more_terms_come_closer() -> None:
    graph = lower(spotter_of(), FEATURE_SCALE)
    codes = codes_of(graph, features(7, 200))
    exact = graph.run(codes)["logits"]
    errors = [float(np.abs(shift_add_form(graph, k).run(codes)["logits"] - exact).mean()) for k in (1, 3, 6, 20)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    assert errors[3] == 0


def test_ranges_hold_for_extreme_inputs() -> None:
    graph = shift_add_form(lower(spotter_of([{"normalise": "channel"}]), FEATURE_SCALE), 2)
    trace: dict[str, np.ndarray] = {}
    codes = np.random.default_rng(0).choice([-(1 << 15), 0, (1 << 15) - 1], (20, FRAMES, WIDTH))
    graph.run(codes, trace=trace)
    graph.check_trace(trace)
    assert graph.notes["shift_add_terms"] == 2
    with pytest.raises(UsageError, match="terms: 0"):
        shift_add_form(graph, 0)
