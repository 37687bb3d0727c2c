"""What training measured: one row per validation, written as metrics.csv."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from kestrel.store.atomic import write_text

Row = dict[str, Any]
FRONT = ("step", "epoch", "phase", "lr", "train_loss", "train_accuracy")
BACK = ("validation_loss", "validation_accuracy")
PENALTY = "penalty_"


class Running:
    """Sums over the training clips since the last validation; means are over clips, not over batches."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {"clips": 0, "correct": 0, "loss": 0.0, "penalty": {}}
        self.clips: int = state["clips"]
        self.correct: int = state["correct"]
        self.loss: float = state["loss"]
        self.penalty: dict[str, float] = dict(state["penalty"])

    def add(self, clips: int, correct: int, loss: float, penalty: dict[str, float]) -> None:
        """Count a batch; `loss` is the sum over its clips, `penalty` the values of the batch."""
        self.clips += clips
        self.correct += correct
        self.loss += loss
        for name, value in penalty.items():
            self.penalty[name] = self.penalty.get(name, 0.0) + value * clips

    def state(self) -> dict[str, Any]:
        """Plain types for the checkpoint."""
        return {"clips": self.clips, "correct": self.correct, "loss": self.loss, "penalty": dict(self.penalty)}

    def row(self) -> Row:
        """Means of train_loss (cross-entropy), train_accuracy and each penalty; empty before the first batch."""
        if not self.clips:
            return {}
        row = {"train_loss": self.loss / self.clips, "train_accuracy": self.correct / self.clips}
        return row | {PENALTY + name: value / self.clips for name, value in self.penalty.items()}


def columns(history: list[Row]) -> list[str]:
    """Columns of metrics.csv; penalties stand between the training and the validation columns."""
    penalties = dict.fromkeys(key for row in history for key in row if key.startswith(PENALTY))
    return [*FRONT, *penalties, *BACK]


def write_metrics(path: Path, history: list[Row]) -> None:
    """Write metrics.csv atomically. Losses are cross-entropies in nats, accuracies 0-1; a missing value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(history), restval="", lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    write_text(path, text.getvalue())
