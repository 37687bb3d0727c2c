from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lower_kit import FEATURE_SCALE, FRAMES, WIDTH, features

from kestrel.errors import KestrelError
from kestrel.frontend.post import Post
from kestrel.lower.graph import IntegerGraph, Trace, input_codes
from kestrel.lower.post import View, lower_post
from kestrel.lower.tensor import Tensor

STEPS: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "normalise channel": [{"normalise": "channel"}],
    "normalise global": [{"normalise": "global"}],
    "crop": [{"crop": [2, 9]}],
    "stack": [{"stack": 5}],
    "average": [{"average": 5}],
    "average of two": [{"average": 2}],
    "bands of three": [{"bands": 3}],
    "bands, then normalised": [{"normalise": "global"}, {"bands": 2}, {"average": 2}, {"normalise": "channel"}],
    "dct": [{"dct": 6}],
    "local dct": [{"local_dct": [3, 2]}],
    "all": [
        {"normalise": "global"},
        {"crop": [1, 12]},
        {"dct": 7},
        {"normalise": "channel"},
        {"average": 2},
        {"stack": 2},
    ],
}


def lowered(steps: list[dict[str, Any]]) -> tuple[IntegerGraph, View, Post]:
    post = Post(steps, (FRAMES, WIDTH))
    post.fit([features(2, 256) + torch.arange(WIDTH)])
    graph = IntegerGraph()
    view = lower_post(
        graph, post, graph.input("features", Tensor((FRAMES, WIDTH), -(1 << 15), (1 << 15) - 1, FEATURE_SCALE))
    )
    graph.output(view.name)
    return graph, view, post


@pytest.mark.parametrize("name", STEPS)
def test_codes_stand_for_the_processed_features(name: str) -> None:
    graph, view, post = lowered(STEPS[name])
    codes = input_codes((features(3) + torch.arange(WIDTH)).numpy(), graph.tensors["features"])
    real = post(torch.from_numpy(codes * FEATURE_SCALE).float()).numpy()
    trace: Trace = {}
    found = graph.run(codes, trace=trace)[view.name]
    graph.check_trace(trace)
    assert found.shape == real.shape
    error = np.abs(found * view.gain + view.offset - real).max()
    # Affine steps lose nothing; a mean half a feature code; a DCT adds the rounding of its coefficients and results.
    exact = not any({"average", "bands", "dct", "local_dct"} & set(step) for step in STEPS[name])
    assert error <= (1e-5 if exact else 2e-3) * np.abs(real).max()


def test_steps_that_are_affine_are_no_ops() -> None:
    graph, _, _ = lowered([{"normalise": "channel"}, {"stack": 3}])
    assert [type(op).__name__ for op in graph.ops] == ["Reshape"]


@pytest.mark.parametrize(("name", "bits"), [("normalise channel", 8), ("all", 4), ("crop", 6)])
def test_the_quantised_view_has_one_rounding(name: str, bits: int) -> None:
    _, view, _ = lowered(STEPS[name])
    half, range_ = 1 << (bits - 1), 2.5
    rescale = view.rescale(range_, bits, (1 - half, half - 1))
    codes = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (100, len(view.gain)))
    real = codes * view.gain + view.offset
    exact = np.clip(real / range_, 1 / half - 1, 1 - 1 / half) * half
    assert np.abs(rescale.apply(codes) - exact).max() <= 0.5 + 0.01
    assert (rescale.apply(codes) == np.rint(exact)).mean() > 0.99


def test_extreme_features_cannot_overflow_a_dct() -> None:
    graph, view, post = lowered([{"dct": WIDTH}])
    rng = np.random.default_rng(0)
    codes = rng.choice([-(1 << 15), (1 << 15) - 1], (200, FRAMES, WIDTH))
    trace: Trace = {}
    found = graph.run(codes, trace=trace)[view.name]
    graph.check_trace(trace)
    real = post(torch.from_numpy(codes * FEATURE_SCALE).float()).numpy()
    assert np.abs(found * view.gain + view.offset - real).max() <= 2e-3 * np.abs(real).max()  # nothing saturates


def test_unknown_steps_are_refused() -> None:
    post = Post([], (FRAMES, WIDTH))
    post.steps.append(torch.nn.Tanh())
    graph = IntegerGraph()
    name = graph.input("features", Tensor((FRAMES, WIDTH), -9, 9, FEATURE_SCALE))
    with pytest.raises(KestrelError, match="Tanh has no integer form: leave it out of feature.post"):
        lower_post(graph, post, name)
