"""A study over programmed chips: the same weights on many chips, each with deviations of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from kestrel.models.evaluate import Accuracy, ProgressCallback, accuracy, device_of, evaluation_noise, predict
from kestrel.models.inventory import describe_devices, device_figures
from kestrel.score import plots
from kestrel.score.metrics import DIGITS
from kestrel.store.markdown import percent, table

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter
    from kestrel.store.hdf5 import FeatureFile

PICTURE = "chips.png"
_MOST_BYTES = 2**30  # of features that are kept in memory between chips


class _Kept:
    """A feature file whose rows are read once."""

    def __init__(self, data: FeatureFile) -> None:
        self.shape = tuple(data.shape)
        self._data = data
        small = int(np.prod(self.shape)) * 4 <= _MOST_BYTES
        self._rows = data.rows(np.arange(self.shape[0])) if small else None

    def rows(self, rows: np.ndarray, /) -> np.ndarray:
        return self._data.rows(rows) if self._rows is None else self._rows[rows]


@dataclass(frozen=True)
class Study:
    """Accuracy of every chip; `figures` says what deviates (kestrel.models.inventory.device_figures)."""

    first: int
    results: tuple[Accuracy, ...]
    figures: dict[str, float | str]

    @property
    def values(self) -> list[float]:
        """Accuracies, 0-1, in the order of the chips."""
        return [result.value for result in self.results]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the accuracies."""
        return statistics.stdev(self.values) if len(self.results) > 1 else 0.0

    @property
    def worst(self) -> int:
        """Number of the worst chip (the first of equals)."""
        return self.first + int(np.argmin(self.values))

    def record(self) -> dict[str, Any]:
        """The entry `chips` of result.json."""
        return {
            "count": len(self.results),
            "mean": round(self.mean, DIGITS),
            "sd": round(self.deviation, DIGITS),
            "worst": min(self.values),
            "worst_chip": self.worst,
            "best": max(self.values),
            "deviations": self.figures,
            "accuracy": {str(self.first + place): value for place, value in enumerate(self.values)},
        }


def study(
    spotter: KeywordSpotter,
    data: FeatureFile,
    *,
    chips: int,
    first: int,
    seed: int,
    batch_size: int,
    next_pass: Callable[[], ProgressCallback],
    known: Accuracy | None = None,
) -> Study:
    """Score the chips `first`, `first` + 1, ...; each gives exactly what scoring it alone gives. `known`: the first one's."""
    features, results = _Kept(data), []
    for chip in range(first, first + chips):
        if chip == first and known is not None:
            results.append(known)
            continue
        with evaluation_noise(seed, chip, device_of(spotter)):
            results.append(accuracy(predict(spotter, features, batch_size, next_pass()), data.labels))
    return Study(first, tuple(results), device_figures(spotter.net))


def section(found: Study | None) -> str:
    """The report's section."""
    if found is None:
        return "## Chips\n\nOne chip was scored; `--set score.chips=25` shows the spread over 25."
    n = found.results[0].n
    rows: list[Sequence[Any]] = [
        ("mean", percent(found.mean, 2)),
        ("standard deviation", f"{100 * found.deviation:.2f} points"),
        ("worst", f"{percent(min(found.values), 2)} (chip {found.worst})"),
        ("best", percent(max(found.values), 2)),
    ]
    last = found.first + len(found.results) - 1
    text = f"Chips {found.first} to {last} on the same {n:,} clips, each with {describe_devices(found.figures)}."
    if not found.figures:
        text += " All chips are alike: set score.noise_program, score.noise_read or score.adc_*."
    return f"## Chips\n\n{text}\n\n{table(('', 'accuracy'), rows)}\n\n![spread over chips]({PICTURE})"


def picture(found: Study, path: Path) -> None:
    """Draw a dot per chip, beside each other where they are alike, over mean and standard deviation."""
    values = 100 * np.array(found.values)
    spread = float(values.max() - values.min()) or 0.2
    cell = spread / 24  # dots nearer than this stand above each other
    heights = np.zeros(len(values))
    taken: dict[int, int] = {}
    for place in np.argsort(values, kind="stable"):
        column = int(np.floor((values[place] - values.min()) / cell))
        heights[place] = taken.get(column, 0)
        taken[column] = taken.get(column, 0) + 1
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.subplots()
        mean = 100 * found.mean
        axes.axvspan(mean - 100 * found.deviation, mean + 100 * found.deviation, color="#dddddd", label="mean ± sd")
        axes.axvline(mean, color=plots.GREY, linewidth=1.2)
        axes.plot(values, heights + 0.5, "o", color=plots.BLUE, markersize=6, label="a chip")
        worst = int(np.argmin(values))
        axes.plot(values[worst], heights[worst] + 0.5, "o", color=plots.ORANGE, markersize=6, label="worst chip")
        axes.set_ylim(0, max(3.0, heights.max() + 1.5))
        axes.set_xlim(values.min() - 0.15 * spread, values.max() + 0.15 * spread)
        axes.set_yticks([])
        axes.set_xlabel("accuracy, %")
        axes.set_title(
            f"{len(values)} chips: {mean:.2f} ± {100 * found.deviation:.2f} %, worst {values[worst]:.2f} %", fontsize=11
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=3)
        plots.save(figure, path)
