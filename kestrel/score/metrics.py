"""Counts of right and wrong answers, by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kestrel.models.evaluate import Accuracy

DIGITS = 6  # of the shares in result.json


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes, classes]: clips of class row that were heard as class column.

    Raises ValueError where a label or a prediction is not one of the classes.
    """
    for what in (labels, predicted):
        if len(what) and (what.min() < 0 or what.max() >= classes):
            raise ValueError(f"a label is outside 0..{classes - 1}")
    return (
        np.bincount(labels * classes + predicted, minlength=classes * classes)
        .reshape(classes, classes)
        .astype(np.int64)
    )


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, DIGITS) if whole else None


def per_class(matrix: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """n, correct, precision, recall, F1 and the Wilson interval of recall of every class, from its confusion matrix.

    A share with nothing to divide by (a class without clips, or never answered) is None, not 0.
    """
    table = {}
    for index, name in enumerate(names):
        n, answered, correct = int(matrix[index].sum()), int(matrix[:, index].sum()), int(matrix[index, index])
        table[name] = {
            "n": n,
            "correct": correct,
            "precision": _share(correct, answered),
            "recall": _share(correct, n),
            "f1": _share(2 * correct, n + answered),
            "recall_ci95": [round(bound, DIGITS) for bound in Accuracy(correct, n).ci95] if n else None,
        }
    return table


@dataclass(frozen=True)
class Confusion:
    """`count` of the `n` clips of class `true` were heard as class `heard`."""

    true: str
    heard: str
    count: int
    n: int


def worst_confusions(matrix: np.ndarray, names: Sequence[str], limit: int = 10) -> list[Confusion]:
    """The most frequent wrong answers, most first; ties in the order of the classes."""
    pairs = [
        Confusion(names[true], names[heard], int(matrix[true, heard]), int(matrix[true].sum()))
        for true, heard in np.argwhere(matrix > 0)
        if true != heard
    ]
    return sorted(pairs, key=lambda pair: -pair.count)[:limit]
