import functools
import json

import numpy as np
import pytest
import torch
from score_kit import FEATURE_SCALE, IDENTITY, PROVENANCE, analog, feature_file, spotter

from kestrel.frontend.post import Post
from kestrel.lower.answers import Answers, Peaks, answers, float64_answers, lowered, predict_decoded, widest_accumulator
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.memory import plan_memory
from kestrel.lower.ops import ArgMax, DepthwiseConv2d, MatMul, Requantise, Reshape, Window
from kestrel.lower.spotter import lower, predict_codes
from kestrel.lower.tensor import Constant, Tensor
from kestrel.models.evaluate import Accuracy, predict, wilson
from kestrel.models.inventory import noise_off
from kestrel.models.network import Network
from kestrel.models.spotter import KeywordSpotter
from kestrel.quant.integer import Rescale
from kestrel.score.report import _explanation
from kestrel.score.run import score

ARGUMENTS = {
    "identity": IDENTITY,
    "split": "test",
    "seed": 3,
    "chip": 0,
    "batch_size": 50,
    "provenance": PROVENANCE,
    "feature_scale": FEATURE_SCALE,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module", params=[0.0, 0.3])
def scored(request, data, tmp_path_factory):
    """Scored without and with device noise in evaluation."""
    folder = tmp_path_factory.mktemp("exp") / "score"
    return folder, score(spotter(noise_eval=request.param), data, folder, **ARGUMENTS)


def test_the_integer_model_is_scored_on_the_same_clips(scored, data):
    folder, result = scored
    heard = predict_codes(lower(spotter(), FEATURE_SCALE), data).argmax(axis=1)
    right = heard == data.labels
    assert json.loads((folder / "result.json").read_text())["integer_accuracy"] == right.mean()
    assert result["integer_ci95"] == [round(bound, 6) for bound in wilson(int(right.sum()), 130)]


def test_it_is_compared_with_the_noise_free_network_of_the_same_codes(scored, data):
    _, result = scored
    logits = predict_decoded(spotter(noise_eval=0.3), data, 8, 50)
    np.testing.assert_array_equal(logits, predict_decoded(spotter(), data, 8, 50))
    integer = predict_codes(lower(spotter(), FEATURE_SCALE), data)
    agreement = (integer.argmax(axis=1) == logits.argmax(axis=1)).mean()
    assert result["integer_agreement"] == round(agreement, 6) and agreement > 0.95
    compared = result["integer"]
    assert compared["fake_quant_accuracy"] == (logits.argmax(axis=1) == data.labels).mean()
    points = 100 * (result["integer_accuracy"] - compared["fake_quant_accuracy"])
    assert compared["difference_points"] == pytest.approx(points, abs=1e-4)
    step = compared["logit_step"]
    assert compared["largest_logit_difference"] == np.abs(integer * step - logits).max()


def test_peak_ram_is_the_arena_of_the_c_model(scored):
    folder, result = scored
    graph = lower(spotter(), FEATURE_SCALE)
    arena = plan_memory(graph).size
    assert arena >= max(tensor.bytes for _, tensor, scan in graph.all_tensors() if scan is not None)
    assert result["peak_ram_bytes"] == arena
    assert f"| {arena:,} bytes |" in (folder / "report.md").read_text()


def test_the_report_says_what_is_compared_with_what(scored):
    folder, result = scored
    text = (folder / "report.md").read_text()
    section = text.split("## Integer model")[1].split("## ")[0]
    for accuracy in (result["integer_accuracy"], result["integer"]["fake_quant_accuracy"]):
        assert f"{100 * accuracy:.2f} %" in section
    assert "without device noise" in section and "same weight codes" in section
    assert f"Difference: {result['integer']['difference_points']:+.2f} points" in section
    assert ("under device noise of 0.3" in section) == (result["evaluation_noise"] > 0)
    assert "| accuracy of the integer model |" in text.split("## ")[0]


def test_bits_of_analog_weights_reach_the_integer_model(tmp_path, data):
    coarse = score(spotter(), data, tmp_path / "score", analog_bits=2, **ARGUMENTS)
    graph = lower(spotter(), FEATURE_SCALE, 2)
    right = predict_codes(graph, data).argmax(axis=1) == data.labels
    assert coarse["integer_accuracy"] == right.mean() < coarse["accuracy"]


def test_a_network_without_integer_form_is_scored_and_the_setting_named(tmp_path, data):
    result = score(analog(), data, tmp_path / "score", **ARGUMENTS)
    assert result["peak_ram_bytes"] is None
    assert "integer_accuracy" not in result and "model.quant_inp" in result["integer_obstacle"]
    text = (tmp_path / "score" / "report.md").read_text()
    assert "model.quant_inp" in text.split("## Integer model")[1].split("##")[0]
    assert "accuracy of the integer model" not in text
    with noise_off(analog().net):
        expected = (predict(analog(), data, 50).argmax(axis=1) == data.labels).mean()
    assert result["accuracy"] == expected


def test_without_a_feature_scale_the_integer_model_is_left_out(tmp_path, data):
    result = score(spotter(), data, tmp_path / "score", **{**ARGUMENTS, "feature_scale": None})
    assert "validation.h5" in result["integer_obstacle"]
    assert "validation.h5" in (tmp_path / "score" / "report.md").read_text()


def test_a_scale_that_is_too_fine_saturates_and_is_counted(data):
    scale = 2.0**-14  # int16 codes end at 2
    graph, obstacle = lowered(spotter(), scale, 8)
    assert graph is not None and obstacle == ""
    found = answers(graph, data, data.labels, predict_decoded(spotter(), data, 8, 50))
    codes = np.rint(data.rows(np.arange(130)).astype(np.float64) / scale)
    assert found.peaks.clipped_features == ((codes > 32767) | (codes < -32768)).sum() > 0
    assert found.peaks.feature == min(32768, np.abs(codes).max())
    assert found.integer.value < found.fake_quant.value


def test_ties_and_disagreements_are_counted_clip_by_clip():
    graph = _graph([[1, 0], [0, 1]])
    features = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [0.0, 1.0]], np.float32)
    reference = np.array([[3.0, 1.0], [3.0, 1.0], [1.0, 2.0], [1.0, 0.0]], np.float32)
    rows = _Rows(features)
    exact = functools.partial(float64_answers, _identity(), graph, rows, weight_bits=8)
    found = answers(graph, rows, np.array([0, 1, 1, 0]), reference, exact=exact)  # integers answer 0 1 0 1
    assert (found.same, found.gained, found.lost, found.float32) == (1, 1, 2, 3)
    assert (found.integer, found.fake_quant) == (Accuracy(2, 4), Accuracy(3, 4))
    assert found.points == -25 and found.agreement == 0.25 and found.largest_difference == 2
    assert found.peaks == Peaks(32768, 17, "logits", 3, 0, 3)


class _Scores(Network):
    """The features are the logits."""

    def forward(self, x):
        assert x.dtype == torch.float64
        return x[:, 0]

    def weight_groups(self):
        return []


def _identity():
    return KeywordSpotter(Post([], (1, 2)), _Scores())


class _Rows:
    def __init__(self, features):
        self.features = features[:, None, :]
        self.shape = self.features.shape

    def rows(self, rows):
        return self.features[rows]


def _graph(weights):
    graph = IntegerGraph()
    x = graph.input("features", Tensor((1, 2), -32768, 32767, 1.0))
    x = graph.add(Reshape(inputs=(x,), outputs=("flat",), shape=(2,)))
    graph.output(graph.add(MatMul(inputs=(x,), outputs=("logits",), weight=Constant.of(np.array(weights)), scale=1.0)))
    graph.output(graph.add(ArgMax(inputs=("logits",), outputs=("class",))))
    return graph


def test_the_widest_accumulator_is_reached_by_some_input():
    rng = np.random.default_rng(0)
    graph = IntegerGraph()
    x = graph.input("x", Tensor((3, 4, 2), -5, 9))
    kernel = rng.integers(-7, 8, (2, 3, 2))
    clamp = Rescale.of(1.0, (-9, 9))
    convolution = DepthwiseConv2d(
        inputs=(x,), outputs=("y",), weight=Constant.of(kernel), window=Window((2, 3)), rescale=clamp
    )
    graph.add(convolution)
    graph.add(Requantise(inputs=("y",), outputs=("z",), rescale=clamp))
    name, reach = widest_accumulator(graph)
    worst = []
    for sign in (1, -1):
        image = np.zeros((1, 3, 4, 2), np.int64)
        image[0, :2, :3] = np.where(sign * kernel > 0, 9, -5)
        worst.append(np.abs(convolution.accumulate(image)).max())
    assert name == "y" and reach >= max(worst)
    # A partial sum may leave out terms of the other sign, which an input cannot: the bound is that of partial sums.
    partial = max((kernel.clip(0) * 9 - kernel.clip(None, 0) * 5).sum(axis=(0, 1)))
    other = max((kernel.clip(0) * 5 - kernel.clip(None, 0) * 9).sum(axis=(0, 1)))
    assert reach == max(partial, other)


def test_a_large_difference_is_explained_by_clips():
    peaks = Peaks(1, 2, "logits", 1, 0, 1)
    found = Answers(np.zeros((50, 2)), Accuracy(40, 50), Accuracy(42, 50), 45, 1, 3, 4, 0.5, 0.25, peaks)
    text = _explanation(found)
    assert "1 clips are right in integers alone, 3 in the fake-quant network alone" in text and "2.00 points" in text
    assert "Of the 5 other answers 4 are rounding errors of float32" in text and "For 1 the integer model" in text
    close = Answers(np.zeros((50, 2)), Accuracy(42, 50), Accuracy(42, 50), 50, 0, 0, 0, 0.0, 0.25, peaks)
    assert _explanation(close) == ""


def test_float64_tells_rounding_errors_from_another_model(data):
    """Where the float64 network answers as the integer model does, and never for a model with other weights."""
    graph = lower(spotter(), FEATURE_SCALE)
    heard = predict_codes(graph, data).argmax(axis=1)
    rows = np.arange(130)
    same = float64_answers(spotter(), graph, data, rows, 8) == heard
    coarse = float64_answers(spotter(), graph, data, rows, 2) == heard
    assert same.mean() > 0.98 and coarse.mean() < 0.9
    assert float64_answers(spotter(), graph, data, rows[:0], 8).shape == (0,)
