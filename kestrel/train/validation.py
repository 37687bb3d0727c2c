"""Validation during training: accuracy and loss over clips, under evaluation noise that never changes."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from kestrel.models.evaluate import evaluation_noise, refuse_not_finite
from kestrel.models.spotter import KeywordSpotter
from kestrel.train.data import Split
from kestrel.train.signals import StopFlag

VALIDATION_CHIP = 0  # every validation meets the same noise, so that candidates differ by their weights alone


@dataclass(frozen=True)
class Evaluation:
    """Sums over the clips of a split."""

    clips: int
    correct: int
    loss_sum: float

    @property
    def accuracy(self) -> float:
        """Share of correct clips, 0-1."""
        return self.correct / self.clips

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a clip, in nats."""
        return self.loss_sum / self.clips


def evaluate(
    spotter: KeywordSpotter, split: Split, seed: int, device: torch.device, stop: StopFlag | None = None
) -> Evaluation | None:
    """Accuracy and cross-entropy of `spotter` in the evaluation phase; None where `stop` was set meanwhile.

    Leaves the spotter in the evaluation phase and the random generators as they were. Raises KestrelError with the name of a
    clip whose features are not finite.
    """
    spotter.eval()
    spotter.net.set_phase("eval")
    clips = correct = 0
    loss_sum = 0.0
    with (
        contextlib.closing(split.batches()) as batches,
        torch.no_grad(),
        evaluation_noise(seed, VALIDATION_CHIP, device),
    ):
        for batch in batches:
            if stop:
                return None
            logits = spotter(batch.features)  # [B, T, F] -> [B, C]
            loss = float(functional.cross_entropy(logits, batch.labels, reduction="sum"))
            if not math.isfinite(loss):
                refuse_not_finite(split.source, batch.features, batch.rows)
            loss_sum += loss
            correct += int((logits.argmax(1) == batch.labels).sum())
            clips += len(batch.labels)
    return Evaluation(clips, correct, loss_sum)
