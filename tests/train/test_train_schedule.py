"""Length and learning rate of a phase."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import UsageError
from kestrel.train.schedule import phase_steps, schedule
from kestrel.train.spec import PhaseSpec


def test_length_is_given_in_epochs_or_steps() -> None:
    assert phase_steps(PhaseSpec(epochs=3), 7) == 21
    assert phase_steps(PhaseSpec(steps=5), 7) == 5
    assert phase_steps(PhaseSpec(epochs=0), 7) == 0
    for wrong in (PhaseSpec(), PhaseSpec(epochs=1, steps=1)):
        with pytest.raises(UsageError, match=r"exactly one of retrain\.epochs and retrain\.steps"):
            phase_steps(wrong, 7, "retrain")


def test_the_papers_segments() -> None:
    """10,000 steps at 0.002, 10,000 at 0.0005, the last 200 at 0.00008 (QuantizedLSTM, specification section 8)."""
    for lengths in ([10000, 10000], [10000, 10000, 200]):
        rate = schedule(PhaseSpec(steps=20200, lr=[0.002, 0.0005, 0.00008], lr_steps=lengths), 20200)
        assert [rate(step) for step in (0, 9999, 10000, 19999, 20000, 20199)] == [0.002, 0.002, 5e-4, 5e-4, 8e-5, 8e-5]


@given(st.integers(0, 300), st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6))
def test_equal_shares(total: int, rates: list[float]) -> None:
    rate = schedule(PhaseSpec(steps=total, lr=rates), total)
    used = [rate(step) for step in range(total)]
    naive = [rates[max(k for k in range(len(rates)) if total * k // len(rates) <= step)] for step in range(total)]
    assert used == naive
    for value in set(rates):
        share = total * rates.count(value) / len(rates)
        assert abs(used.count(value) - share) <= rates.count(value)


def test_cosine_starts_anew_in_each_segment() -> None:
    rate = schedule(PhaseSpec(epochs=6, lr=[0.1, 0.4], lr_epochs=[2], schedule="cosine"), 60, "train", 10)
    assert [rate(0), rate(20)] == [0.1, 0.4]
    assert rate(10) == pytest.approx(0.05)
    assert rate(40) == pytest.approx(0.2)
    assert rate(19) < 0.01 and rate(60) == pytest.approx(0)


def test_cosine_falls_from_the_rate_to_zero() -> None:
    rate = schedule(PhaseSpec(steps=100, lr=[0.1], schedule="cosine"), 100)
    assert rate(0) == 0.1
    assert rate(50) == pytest.approx(0.05)
    assert rate(25) == pytest.approx(0.05 * (1 + math.sqrt(0.5)))
    assert rate(99) < 3e-5
    assert all(rate(step) > rate(step + 1) for step in range(99))


def test_agreement_of_the_steps_already_made() -> None:
    def made(total: int, **options: object):
        return schedule(PhaseSpec(steps=total, **options), total)  # type: ignore[arg-type]

    assert made(10, lr=[0.1]).agrees(made(20, lr=[0.1]), 10)
    fixed = {"lr": [0.1, 0.01], "lr_steps": [8]}
    assert made(10, **fixed).agrees(made(20, **fixed), 10)
    shares = {"lr": [0.1, 0.01]}
    assert made(10, **shares).agrees(made(20, **shares), 5)
    assert not made(10, **shares).agrees(made(20, **shares), 6)
    cosine = {"lr": [0.1], "schedule": "cosine"}
    assert made(10, **cosine).agrees(made(10, **cosine), 7)
    assert not made(10, **cosine).agrees(made(11, **cosine), 7)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), max_size=40), st.integers(0, 4), st.floats(0.1, 0.9))
def test_plateau_is_that_of_pytorch(losses: list[float], patience: int, factor: float) -> None:
    options = {"schedule": "plateau", "plateau_patience": patience, "plateau_factor": factor}
    rate = schedule(PhaseSpec(steps=10, lr=[0.1, 0.02], **options), 10)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience, threshold=1e-4, min_lr=0.02, eps=0
    )
    for loss in losses:
        rate.observe(loss)
        theirs.step(loss)
        assert rate(3) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_plateau_takes_two_rates_and_no_lengths() -> None:
    for wrong in ({"lr": [0.1, 0.05, 0.01]}, {"lr": [0.1, 0.01], "lr_steps": [4]}):
        with pytest.raises(UsageError, match="plateau takes the first and the lowest learning rate"):
            schedule(PhaseSpec(steps=10, schedule="plateau", **wrong), 10)  # type: ignore[arg-type]
    longer = schedule(PhaseSpec(steps=20, schedule="plateau", lr=[0.1]), 20)
    assert schedule(PhaseSpec(steps=10, schedule="plateau", lr=[0.1]), 10).agrees(longer, 10)
    assert not schedule(PhaseSpec(steps=10, lr=[0.1]), 10).agrees(longer, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": []}, "at least one learning rate"),
        ({"lr": [0.1, 0.2], "lr_steps": [1, 2]}, r"2 learning rates need 1 lengths .* or 2 .* 10 steps, not"),
        ({"lr": [0.1, 0.2], "lr_steps": [1, 2, 7]}, r"2 learning rates need 1 lengths .*, not"),
        ({"lr": [0.1, 0.2], "lr_steps": [11], "schedule": "cosine"}, "11 steps before the last segment"),
        ({"lr": [0.1], "lr_steps": [5], "schedule": "cosine"}, "1 learning rates need 0 lengths"),
        ({"lr": [0.1, 0.2], "lr_epochs": [1], "lr_steps": [5]}, "give one of train.lr_steps and train.lr_epochs"),
    ],
)
def test_settings_that_contradict_each_other(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        schedule(PhaseSpec(steps=10, **options), 10)
    assert "\n" not in str(caught.value)
