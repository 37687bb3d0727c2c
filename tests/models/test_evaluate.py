import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from kestrel.errors import KestrelError
from kestrel.models.evaluate import Accuracy, accuracy, evaluation_noise, predict, softmax, ties, wilson
from kestrel.models.network import Network
from kestrel.models.spotter import KeywordSpotter


@given(st.integers(1, 12_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_scipys(case):
    correct, n = case
    expected = binomtest(correct, n).proportion_ci(0.95, "wilson")
    low, high = wilson(correct, n)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= low <= correct / n <= high <= 1


def test_wilson_half_width_at_97_per_cent_of_the_official_test():
    low, high = Accuracy(4743, 4890).ci95
    assert (high - low) / 2 == pytest.approx(0.0048, abs=0.0001)


def test_no_clips_say_nothing():
    assert Accuracy(0, 0).ci95 == (0.0, 1.0)
    assert Accuracy(0, 0).value == 0.0


def test_accuracy_takes_the_first_of_equal_logits():
    logits = np.array([[1.0, 1.0], [0.0, 2.0], [3.0, 1.0]])
    assert accuracy(logits, np.array([0, 1, 1])) == Accuracy(2, 3)
    assert ties(logits) == 1


def test_softmax_of_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]])), [[0.5, 0.5], [0.25, 0.75]])


class _Noisy(Network):
    """Logits with noise, and a record of what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, x):
        self.batches.append((len(x), self.phase, self.training, torch.is_grad_enabled()))
        return x.mean(1) * self.weight + torch.randn(len(x), x.shape[2])


class _Rows:
    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def rows(self, rows, /):
        return self.values[rows]


def _clips(n):
    return _Rows(np.random.default_rng(0).normal(size=(n, 4, 3)).astype(np.float32))


def test_noise_depends_on_seed_and_chip_alone_and_leaves_the_generator_as_it_was():
    spotter, data = KeywordSpotter(nn.Identity(), _Noisy()), _clips(10)

    def draw(seed, chip):
        with evaluation_noise(seed, chip, torch.device("cpu")):
            return predict(spotter, data, 4)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = draw(1, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert (draw(1, 0) == first).all()
    assert (draw(1, 1) != first).any() and (draw(2, 0) != first).any()


def test_predict_runs_in_order_in_the_evaluation_phase_and_reports_progress():
    net, data, seen = _Noisy(), _clips(10), []
    net.set_phase("pretrain")
    logits = predict(KeywordSpotter(nn.Identity(), net), data, 4, lambda done, total: seen.append((done, total)))
    assert logits.shape == (10, 3) and logits.dtype == np.float32
    assert net.batches == [(4, "eval", False, False), (4, "eval", False, False), (2, "eval", False, False)]
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_answers_that_are_not_finite_are_an_error_with_the_clip():
    data = _clips(10)
    data.values[7, 0, 0] = np.nan
    with pytest.raises(KestrelError, match="clip 7 are not finite"):
        predict(KeywordSpotter(nn.Identity(), _Noisy()), data, 4)


def test_features_that_are_not_finite_name_the_clip():
    data = _clips(10)
    data.utt_ids, data.path = [f"yes/clip{row}" for row in range(10)], "test.h5"
    data.values[7, 1, 0] = np.inf
    with pytest.raises(
        KestrelError, match=r"^test\.h5: features of clip 7 \(yes/clip7\) are not finite: make them again$"
    ):
        predict(KeywordSpotter(nn.Identity(), _Noisy()), data, 4)


def test_an_empty_split_is_an_error():
    with pytest.raises(KestrelError, match="no clips"):
        predict(KeywordSpotter(nn.Identity(), _Noisy()), _clips(0), 4)
