"""Feature post-processing: each step against a naive one, statistics, errors, ONNX."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct
from torch import Tensor

from kestrel.errors import KestrelError, UsageError
from kestrel.frontend.post import Post


def features(clips: int = 30, frames: int = 11, width: int = 6, seed: int = 0) -> Tensor:
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(clips, frames, width)) * draw.uniform(0.1, 20, width) + draw.uniform(-50, 50, width)
    return torch.from_numpy(values).float()


def test_no_steps_change_nothing() -> None:
    post = Post([], (11, 6))
    x = features()
    assert post.fitted and post.output_shape == (11, 6) and post(x) is x
    post.fit(iter([x]))
    assert post.state_dict() == {}


def test_stack_puts_neighbours_side_by_side() -> None:
    x = features()
    post = Post([{"stack": 3}], (11, 6))
    wanted = torch.stack([torch.cat([x[:, 3 * t], x[:, 3 * t + 1], x[:, 3 * t + 2]], dim=1) for t in range(3)], dim=1)
    assert post.output_shape == (3, 18) and torch.equal(post(x), wanted)


def test_bands_takes_the_mean_of_neighbouring_channels() -> None:
    x = torch.randn(3, 11, 7)
    post = Post([{"bands": 3}], (11, 7))
    assert post.output_shape == (11, 2)
    assert torch.allclose(post(x)[..., 1], x[..., 3:6].mean(2))


def test_average_takes_the_mean_of_neighbours() -> None:
    x = features()
    post = Post([{"average": 2}], (11, 6))
    wanted = torch.stack([(x[:, 2 * t] + x[:, 2 * t + 1]) / 2 for t in range(5)], dim=1)
    assert post.output_shape == (5, 6) and torch.allclose(post(x), wanted, atol=1e-5)


def test_crop_keeps_start_to_stop() -> None:
    x = features()
    post = Post([{"crop": [2, 9]}], (11, 6))
    assert post.output_shape == (7, 6) and torch.equal(post(x), x[:, 2:9])


def test_dct_is_scipys() -> None:
    x = features()
    post = Post([{"dct": 4}], (11, 6))
    wanted = dct(x.double().numpy(), type=2, norm="ortho", axis=-1)[..., :4]
    assert post.output_shape == (11, 4) and np.abs(post(x).numpy() - wanted).max() < 1e-4


def test_local_dct_is_scipys_in_each_group() -> None:
    x = torch.randn(5, 11, 10)
    post = Post([{"local_dct": [3, 2]}], (11, 10))
    parts = [dct(part.double().numpy(), type=2, norm="ortho", axis=-1)[..., :2] for part in x.split([3, 4, 3], 2)]
    assert post.output_shape == (11, 6) and np.abs(post(x).numpy() - np.concatenate(parts, -1)).max() < 1e-5


@pytest.mark.parametrize("scope", ["channel", "global"])
def test_normalise_uses_statistics_of_all_batches(scope: str) -> None:
    x = features(70)
    post = Post([{"normalise": scope}], (11, 6))
    assert not post.fitted
    post.fit(x.split([1, 40, 29]))
    values = x.double().numpy()
    axes = (0, 1) if scope == "channel" else (0, 1, 2)
    wanted = (values - values.mean(axes)) / values.std(axes)
    assert post.fitted and np.abs(post(x).numpy() - wanted).max() < 1e-4


def test_statistics_do_not_suffer_from_a_large_mean() -> None:
    x = 1e4 + 0.01 * torch.randn(500, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    post = Post([{"normalise": "channel"}], (11, 6))
    post.fit(x.split(7))
    assert torch.allclose(post.steps[0].deviation.double(), x.std((0, 1), correction=0), rtol=1e-5)


def test_steps_run_in_their_order() -> None:
    x = features()
    post = Post(
        [{"normalise": "channel"}, {"crop": [1, 11]}, {"dct": 3}, {"stack": 2}, {"normalise": "global"}], (11, 6)
    )
    post.fit([x[:10], x[10:]])
    y = (x - x.mean((0, 1))) / x.std((0, 1), correction=0)
    y = torch.from_numpy(dct(y[:, 1:].numpy(), type=2, norm="ortho")[..., :3]).reshape(30, 5, 6)
    y = (y - y.mean()) / y.std(correction=0)
    assert post.output_shape == (5, 6) and torch.allclose(post(x), y, atol=1e-4)


def test_second_normalise_needs_batches_twice() -> None:
    post = Post([{"normalise": "channel"}, {"normalise": "global"}], (11, 6))
    with pytest.raises(ValueError, match="more than once"):
        post.fit(iter([features()]))


def test_constant_channels_become_zero() -> None:
    x = features()
    x[..., 2], x[..., 4] = 0.1, 0.0
    post = Post([{"normalise": "channel"}], (11, 6))
    post.fit([x])
    y = post(x)
    assert y[..., 2].abs().max() < 1e-5 and (y[..., 4] == 0).all() and y[..., 0].std() > 0.5


def test_statistics_travel_with_the_state_dict() -> None:
    x, steps = features(), [{"stack": 2}, {"normalise": "channel"}]
    first, second = Post(steps, (11, 6)), Post(steps, (11, 6))
    with pytest.raises(KestrelError, match="statistics"):
        second(x)
    first.fit([x])
    second.load_state_dict(first.state_dict())
    assert second.fitted and torch.equal(second(x), first(x))
    parent = torch.nn.Sequential(Post(steps, (11, 6)))
    parent.load_state_dict({f"0.{key}": value for key, value in first.state_dict().items()})
    assert torch.equal(parent(x), first(x))


def test_unfitted_state_stays_unfitted_when_loaded() -> None:
    post = Post([{"normalise": "channel"}], (11, 6))
    post.load_state_dict(Post([{"normalise": "channel"}], (11, 6)).state_dict())
    assert not post.fitted


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 11, 6)]])
def test_no_training_features_are_an_error(batches: list[Tensor]) -> None:
    with pytest.raises(KestrelError, match="no training features"):
        Post([{"normalise": "channel"}], (11, 6)).fit(batches)


def test_values_that_are_not_finite_are_an_error() -> None:
    x = features()
    x[3, 2, 1] = torch.nan
    with pytest.raises(KestrelError, match="not finite"):
        Post([{"normalise": "global"}], (11, 6)).fit([x])


def test_features_of_another_front_end_are_refused() -> None:
    with pytest.raises(KestrelError, match="11 frames x 6, these have 10 x 6"):
        Post([{"stack": 2}], (11, 6))(torch.zeros(1, 10, 6))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("stack", "expected one step"),
        ({"stack": 2, "dct": 1}, "expected one step"),
        ({}, "expected one step"),
        ({"normalize": "channel"}, "did you mean 'normalise'"),
        ({"normalise": "chanel"}, "did you mean 'channel'"),
        ({"dct": 7}, "out of bounds (1..6)"),
        ({"dct": 0}, "out of bounds"),
        ({"dct": "x"}, "whole number"),
        ({"local_dct": 3}, "expected [GROUPS, COEFFICIENTS]"),
        ({"local_dct": [7, 1]}, "out of bounds (1..6)"),
        ({"local_dct": [2, 4]}, "out of bounds (1..3)"),
        ({"stack": True}, "whole number"),
        ({"stack": 12}, "out of bounds (1..11)"),
        ({"average": 0}, "out of bounds"),
        ({"crop": 3}, "expected [START, STOP]"),
        ({"crop": [1, 2, 3]}, "expected [START, STOP]"),
        ({"crop": [5, 5]}, "out of bounds (6..11)"),
        ({"crop": [0, 12]}, "out of bounds"),
        ({"crop": [-1, 5]}, "out of bounds"),
    ],
)
def test_wrong_steps_are_refused_in_one_line(step: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Post([{"crop": [0, 11]}, step], (11, 6))
    assert message in str(caught.value) and "feature.post[1]" in str(caught.value) and "\n" not in str(caught.value)


_STEP = st.one_of(
    st.builds(lambda n: {"stack": n}, st.integers(1, 4)),
    st.builds(lambda n: {"average": n}, st.integers(1, 4)),
    st.builds(lambda n: {"dct": n}, st.integers(1, 6)),
    st.builds(lambda g, n: {"local_dct": [g, n]}, st.integers(1, 3), st.integers(1, 2)),
    st.builds(lambda a, b: {"crop": [a, a + b]}, st.integers(0, 4), st.integers(1, 6)),
    st.builds(lambda s: {"normalise": s}, st.sampled_from(["channel", "global"])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_STEP, max_size=5))
def test_output_shape_is_the_shape_of_the_output(steps: list[dict]) -> None:
    x = features(4)
    try:
        post = Post(steps, (11, 6))
    except UsageError:
        return
    post.fit([x])
    assert tuple(post(x).shape) == (4, *post.output_shape)
    assert torch.allclose(post(x)[1:3], post(x[1:3]), rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exports_to_onnx_for_any_batch() -> None:
    x = features()
    steps = [{"normalise": "channel"}, {"crop": [1, 10]}, {"average": 2}, {"dct": 5}, {"stack": 2}]
    post = Post(steps, (11, 6))
    post.fit([x])
    file = io.BytesIO()
    torch.onnx.export(
        post,
        (x[:2],),
        file,
        dynamo=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert np.abs(found - post(x).numpy()).max() < 1e-5


def test_fit_reads_one_batch_at_a_time() -> None:
    held: list[int] = []

    def batches() -> Iterator[Tensor]:
        for index in range(5):
            held.append(index)
            yield features(3, seed=index)

    post = Post([{"normalise": "channel"}], (11, 6))
    post.fit(batches())
    assert held == [0, 1, 2, 3, 4] and post.fitted
