"""Pictures of the score: confusion matrix, training curves and energy.

Colours are told apart with any common form of colour blindness (blue against orange, after Okabe and Ito), and lines
also by their style. Files hold no date and no version, so the same numbers give the same bytes.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_path

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
_SPLITS = (("train", BLUE, "--"), ("validation", ORANGE, "-"))
_COLUMNS = ("step", "train_accuracy", "train_loss", "validation_accuracy", "validation_loss")
_SMALLEST_ERROR = 1e-4  # drawn in place of 0, which a logarithmic axis does not have


def save(figure: Figure, path: Path) -> None:
    """Write a picture whose bytes depend on nothing but what it shows, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary, dpi=120, metadata={"Software": None}, facecolor="white", bbox_inches="tight", pad_inches=0.12
        )


def confusion_matrix(matrix: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """Draw `matrix` (rows: true class, columns: answer): counts, right ones on blue and wrong ones on orange.

    Colours are shares of the row on a power law, so that one per cent of errors is visible beside ninety-nine right.
    """
    classes = len(names)
    many = classes > 20
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        side = max(3.4, (0.38 if many else 0.5) * classes)
        figure = Figure(figsize=(side + 2, side + 1.6), layout="constrained")
        axes = figure.subplots()
        n = matrix.sum(axis=1)
        share = matrix / np.maximum(n, 1)[:, None]
        right = np.eye(classes, dtype=bool)
        for colours, hidden in (("Blues", ~right), ("Oranges", right)):
            axes.imshow(np.ma.masked_array(share, hidden | (matrix == 0)), cmap=colours, norm=PowerNorm(0.5, 0, 1.2))
        size = min(9.5, 27 / max(len(str(int(matrix.max()))), 3))
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if share[row, column] > 0.4 else "black"
            weight = "bold" if row == column else "normal"
            text = str(matrix[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size, fontweight=weight)
        slant = {"rotation": 90} if many else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(classes), names, **slant)
        axes.set_yticks(range(classes), names)
        axes.set_xticks(np.arange(0.5, classes - 1), minor=True)
        axes.set_yticks(np.arange(0.5, classes - 1), minor=True)
        axes.grid(which="minor", color="#dddddd", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        recall = axes.secondary_yaxis("right")
        recall.set_yticks(
            range(classes), [f"{100 * share[index, index]:.1f} %" if n[index] else "-" for index in range(classes)]
        )
        recall.tick_params(length=0)
        axes.annotate(
            "recall", (1, 1), (6, 4), xycoords="axes fraction", textcoords="offset points", va="bottom", color=GREY
        )
        axes.set_xlabel("answer")
        axes.set_ylabel("true class")
        axes.set_title(title, fontsize=11)
        save(figure, path)


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns step and {train,validation}_{accuracy,loss} of a metrics.csv; an empty field is NaN.

    Raises KestrelError where the file cannot be read or lacks one of them.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in _COLUMNS}
    except OSError as error:
        raise KestrelError(f"cannot read {path}: {error.strerror}; run its training stage again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise KestrelError(f"{path} is damaged ({error}); run its training stage again") from None


def best_row(columns: dict[str, np.ndarray]) -> int | None:
    """The validation whose weights were kept: most right answers, then the smallest loss, then the first."""
    known = np.flatnonzero(np.isfinite(columns["validation_accuracy"]))
    if not len(known):
        return None
    order = np.lexsort((known, columns["validation_loss"][known], -columns["validation_accuracy"][known]))
    return int(known[order[0]])


def error_percent(share: np.ndarray) -> np.ndarray:
    """Error in per cent of an accuracy (0-1)."""
    return 100 * np.maximum(1 - share, _SMALLEST_ERROR)


def _draw(axes: Axes, x: np.ndarray, lines: dict[str, np.ndarray]) -> None:
    for split, colour, style in _SPLITS:
        known = np.isfinite(lines[split])
        marker = "o" if known.sum() <= 60 else None
        axes.plot(
            x[known], lines[split][known], style, color=colour, label=split, linewidth=1.6, marker=marker, markersize=3
        )


def curves(stages: Sequence[tuple[str, Path]], path: Path) -> None:
    """Draw the error (logarithmic) and the loss of every stage side by side, from its metrics.csv.

    The best validation of each stage is marked: its weights were kept.
    """
    tables = [(name, read_metrics(file)) for name, file in stages]
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(max(6.4, 4.8 * len(tables)), 6.2), layout="constrained")
        grid = figure.subplots(2, len(tables), sharey="row", sharex="col", squeeze=False)
        drawn: list[np.ndarray] = []
        for column, (name, columns) in enumerate(tables):
            error, loss = grid[0, column], grid[1, column]
            errors = {split: error_percent(columns[f"{split}_accuracy"]) for split, _, _ in _SPLITS}
            drawn.extend(errors.values())
            _draw(error, columns["step"], errors)
            _draw(loss, columns["step"], {split: columns[f"{split}_loss"] for split, _, _ in _SPLITS})
            best = best_row(columns)
            if best is not None:
                step = columns["step"]
                error.axvline(step[best], color=GREY, linewidth=0.9, linestyle=":")
                late = step[best] > (step.min() + step.max()) / 2
                error.annotate(
                    f"best: {100 * columns['validation_accuracy'][best]:.1f} % right\nat step {step[best]:,.0f}",
                    (step[best], 0.97),
                    xycoords=("data", "axes fraction"),
                    xytext=(-5 if late else 5, 0),
                    textcoords="offset points",
                    ha="right" if late else "left",
                    va="top",
                    fontsize=9,
                    color=GREY,
                )
            error.set_title(name)
            loss.set_xlabel("step")
        grid[0, 0].set_ylabel("error, % of clips")
        values = np.concatenate(drawn)
        percent_axis(grid[0, 0], values[np.isfinite(values)])
        grid[1, 0].set_ylabel("loss")
        for axes in grid.flat:
            axes.grid(which="major", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        grid[1, -1].legend(frameon=False, loc="upper right")
        save(figure, path)


def percent_axis(axes: Axes, errors: np.ndarray) -> None:
    """A logarithmic axis that begins and ends at 1, 2 or 5 times a power of ten, so that it always has two ticks."""
    low, high = (float(errors.min()), float(errors.max())) if len(errors) else (1.0, 100.0)
    marks = np.array([mantissa * 10.0**power for power in range(-3, 3) for mantissa in (1, 2, 5)])
    bottom, top = marks[marks <= low].max(initial=marks[0]), marks[marks >= high].min(initial=100.0)
    if bottom == top:
        bottom = top / 2
    axes.set_yscale("log")
    axes.set_ylim(bottom, top * 1.06)
    ticks = marks[(marks >= bottom) & (marks <= top)]
    axes.yaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


# After Okabe and Ito; a second round takes hatching, so that neighbours differ without colour as well.
_PARTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_VISIBLE = 0.002  # share of the longest bar below which a component is no wider than a line
_DOMINANT = 0.5  # share of all energy from which the largest component hides the others


def energy_bars(rows: Sequence[tuple[str, Mapping[str, float]]], path: Path, title: str = "") -> None:
    """Draw the energy of one decision as stacked bars: a row each of `rows` (label, µJ by component).

    Where one component takes most of the energy of all rows, a second panel shows the others on a scale of their own.
    Raises KestrelError where there are no rows, or no energy in them.
    """
    sums: dict[str, float] = {}
    for _, parts in rows:
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value
    order = sorted((name for name in sums if sums[name] > 0), key=lambda name: -sums[name])
    if not order:
        raise KestrelError("there is no energy to draw: give at least one row with a component above 0 µJ")
    hidden = sums[order[0]] > _DOMINANT * sum(sums.values()) and len(order) > 2
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10, "hatch.linewidth": 0.8}):
        columns = 2 if hidden else 1
        figure = Figure(figsize=(4.2 + 3.6 * columns, 1.7 + 0.42 * len(rows)), layout="constrained")
        grid = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
        _bars(grid[0], rows, order)
        grid[0].set_yticks(range(len(rows)), [label for label, _ in rows])
        grid[0].invert_yaxis()
        grid[0].set_title("all components", fontsize=10)
        if hidden:
            _bars(grid[1], rows, order, skipped=order[0])
            grid[1].set_title(f"without {order[0]}", fontsize=10)
            grid[1].tick_params(axis="y", length=0)
        handles, labels = grid[0].get_legend_handles_labels()
        visible = _VISIBLE * max(
            sum(parts.values()) - (parts.get(order[0], 0.0) if hidden else 0.0) for _, parts in rows
        )
        small = {name for name in order if max(parts.get(name, 0.0) for _, parts in rows) < visible}
        labels = [f"{name} (too small to see)" if name in small else name for name in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4 * columns), frameon=False)
        if title:
            figure.suptitle(title, fontsize=11)
        save(figure, path)


def _bars(
    axes: Axes, rows: Sequence[tuple[str, Mapping[str, float]]], order: Sequence[str], skipped: str | None = None
) -> None:
    """One bar per row, its components in `order`, and its sum in µJ behind it."""
    left = np.zeros(len(rows))
    for index, name in enumerate(order):
        if name == skipped:
            continue
        values = np.array([parts.get(name, 0.0) for _, parts in rows])
        colour, hatch = _PARTS[index % len(_PARTS)], ("", "///", "...")[index // len(_PARTS) % 3]
        axes.barh(
            range(len(rows)), values, left=left, height=0.68, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0.4, label=name,
        )  # fmt: skip
        left += values
    for row, total in enumerate(left):
        text = f"{total:,.0f}" if total >= 1000 else f"{total:#.3g}".rstrip(".")
        axes.annotate(text, (total, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.16 * max(float(left.max()), 1e-12))
    axes.set_xlabel("µJ per decision (model)")
    axes.grid(which="major", axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
