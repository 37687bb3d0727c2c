"""The difference of two models on the same clips, with a paired interval."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.models.evaluate import Z95


@dataclass(frozen=True)
class Difference:
    """Accuracy of b minus accuracy of a (shares, not per cent) on `n` clips, and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The mean of b - a over clips, with the normal interval of paired differences.

    Args:
        a, b: [seeds, clips] right answers (0 or 1) of each model; the numbers of seeds may differ.

    Each clip counts once, with its mean over the seeds: more seeds do not make more clips. For one seed each the
    variance is that of McNemar's table, (b + c - (c - b)^2 / n) / n^2 times n / (n - 1).
    """
    if a.shape[1] != b.shape[1] or a.shape[1] < 2:
        raise ValueError("a and b need the same clips, at least two")
    difference = b.mean(axis=0) - a.mean(axis=0)  # [clips]
    n = len(difference)
    value = float(difference.mean())
    half = Z95 * float(difference.std(ddof=1)) / math.sqrt(n)
    return Difference(value, max(-1.0, value - half), min(1.0, value + half), n)


def read_right(paths: Sequence[Path]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """((utt_id, position) of the clips, right answers int64 [files, clips]) of several scores.csv.

    Raises KestrelError where one cannot be read or they do not list the same clips.
    """
    clips: list[tuple[str, str]] = []
    rows = []
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                table = list(csv.DictReader(file))
            found = [(row["utt_id"], row["position"]) for row in table]
            rows.append([int(row["correct"]) for row in table])
        except OSError as error:
            raise KestrelError(f"cannot read {path}: {error.strerror}") from None
        except (KeyError, ValueError, TypeError) as error:
            raise KestrelError(f"{path} is damaged ({error}); run stage 5 again") from None
        clips = clips or found
        if found != clips:
            raise KestrelError(f"{path} lists other clips than {paths[0]}: a paired interval needs the same ones")
    return clips, np.array(rows, dtype=np.int64)


def compare(a: Sequence[Path], b: Sequence[Path]) -> Difference:
    """The paired difference of two models from their scores.csv, one of each seed."""
    clips, right = read_right([*a, *b])
    if len(clips) < 2:
        raise KestrelError(f"{a[0]} has {len(clips)} clips: a paired interval needs at least two")
    return paired_difference(right[: len(a)], right[len(a) :])
