import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kestrel.score.metrics import Confusion, confusion, per_class, worst_confusions

NAMES = ["yes", "no", "go"]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=60))
def test_confusion_and_class_figures_equal_counting_by_hand(pairs):
    labels = np.array([label for label, _ in pairs], np.int64)
    answers = np.array([answer for _, answer in pairs], np.int64)
    matrix = confusion(labels, answers, 3)
    assert matrix.sum() == len(pairs) and matrix.trace() == sum(label == answer for label, answer in pairs)
    for index, (name, figures) in enumerate(per_class(matrix, NAMES).items()):
        n = sum(label == index for label, _ in pairs)
        answered = sum(answer == index for _, answer in pairs)
        right = sum(label == answer == index for label, answer in pairs)
        assert (name, figures["n"], figures["correct"]) == (NAMES[index], n, right)
        assert figures["recall"] == (None if n == 0 else pytest.approx(right / n, abs=1e-6))
        assert figures["precision"] == (None if answered == 0 else pytest.approx(right / answered, abs=1e-6))
        if right:
            precision, recall = right / answered, right / n
            assert figures["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)


def test_a_class_without_clips_and_answers_has_no_shares():
    figures = per_class(np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]]), NAMES)
    assert figures["go"] == {
        "n": 0,
        "correct": 0,
        "precision": None,
        "recall": None,
        "f1": None,
        "recall_ci95": None,
    }
    assert figures["no"]["precision"] is None and figures["no"]["recall"] == 0 and figures["no"]["f1"] == 0


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(ValueError, match="outside"):
        confusion(np.array([label]), np.array([0]), 3)


def test_worst_confusions_first_and_only_wrong_ones():
    matrix = np.array([[90, 5, 1], [0, 50, 7], [5, 0, 20]])
    assert worst_confusions(matrix, NAMES, 3) == [
        Confusion("no", "go", 7, 57),
        Confusion("yes", "no", 5, 96),
        Confusion("go", "yes", 5, 25),
    ]
    assert worst_confusions(np.diag([3, 2, 1]), NAMES) == []
