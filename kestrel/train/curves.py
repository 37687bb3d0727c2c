"""Training curves as a picture: loss and accuracy against step, with marks at learning-rate drops and phases."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from kestrel.store.atomic import atomic_path
from kestrel.train.history import Row

# Okabe-Ito colours, told apart with any colour vision; line styles tell them apart in grey.
_TRAIN, _VALIDATION, _MARK = "#0072B2", "#D55E00", "#666666"
_LOG_SPAN = 8.0  # losses that differ by more than this factor are shown on a logarithmic axis


def _series(history: list[Row], key: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key] * factor) for row in history if isinstance(row.get(key), (int, float))]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def marks(history: list[Row]) -> list[tuple[int, str]]:
    """(step, text) of changes of phase and of learning rate; more than six rates are a curve and get no marks."""
    found: list[tuple[int, str]] = []
    rates = list(dict.fromkeys(row["lr"] for row in history if row.get("lr") is not None))
    for before, after in itertools.pairwise(history):
        if after["phase"] != before["phase"]:
            found.append((before["step"], after["phase"]))
        elif after["lr"] != before["lr"] and len(rates) <= 6:
            found.append((before["step"], f"lr {after['lr']:g}"))
    return found


def draw_curves(path: Path, history: list[Row], title: str) -> None:
    """Write a PNG of the rows of metrics.csv, atomically. The same rows give the same bytes, no rows no file."""
    if not history:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 6.2), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    point = "o" if len(history) < 30 else ""
    for axis, key, factor in ((upper, "loss", 1.0), (lower, "accuracy", 100.0)):
        for part, colour, style in (("train", _TRAIN, "--"), ("validation", _VALIDATION, "-")):
            steps, values = _series(history, f"{part}_{key}", factor)
            if steps:
                axis.plot(steps, values, style, color=colour, marker=point, markersize=3, linewidth=1.6, label=part)
        axis.grid(True, alpha=0.3)
    upper.set_ylabel("cross-entropy (nats)")
    lower.set_ylabel("accuracy (%)")
    lower.set_xlabel("step (batches)")
    upper.set_title(title, loc="left", fontsize=11)
    losses = [value for part in ("train", "validation") for value in _series(history, f"{part}_loss")[1]]
    if losses and min(losses) > 0 and max(losses) / min(losses) > _LOG_SPAN:
        upper.set_yscale("log")
        upper.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        upper.yaxis.set_minor_formatter(NullFormatter())
    _mark_best(lower, history)
    for step, text in marks(history):
        for axis in (upper, lower):
            axis.axvline(step, color=_MARK, linewidth=0.9, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "xytext": (3, -4), "textcoords": "offset points"}
        upper.annotate(text, (step, 1), **place, rotation=90, va="top", ha="left", fontsize=8, color=_MARK)
    for axis in (upper, lower):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best", fontsize=9, framealpha=0.8)
    with atomic_path(path) as temporary:
        canvas.print_png(str(temporary), metadata={"Software": None})


def _mark_best(axis: Any, history: list[Row]) -> None:
    """A ring around the validation that best.pt holds."""
    rows = [row for row in history if row.get("validation_accuracy") is not None]
    if rows:
        best = max(rows, key=lambda row: (row["validation_accuracy"], -row["validation_loss"], -row["step"]))
        height = 100 * best["validation_accuracy"]
        label = f"best {height:.2f} % at step {best['step']:,}"
        axis.plot([best["step"]], [height], "o", markersize=9, markerfacecolor="none", color=_VALIDATION, label=label)
