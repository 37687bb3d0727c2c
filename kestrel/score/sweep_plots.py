"""Pictures of sweeps: accuracy against a setting, accuracy against energy, strips, error against step.

Colours come from Okabe and Ito and can be told apart with any colour vision; series differ by marker as well. The same
numbers give the same bytes.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from kestrel.score.plots import GREY, error_percent, percent_axis, read_metrics, save

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
_GRID = "#dddddd"
_COLLAPSE = 25.0  # points of accuracy between settings from which the axis goes by the ratio of errors
_LEAST_RATIO = 1.5  # of energies from the first to the last colour


@dataclass(frozen=True)
class Setting:
    """Results of one setting over its repeats (seeds, chips)."""

    x: Any  # its value on the axis of the picture
    series: str  # its values on the other axes as text, "" where there are none
    accuracy: tuple[float, ...]  # 0-1, one of each repeat
    energies: tuple[float, ...] = ()  # uJ per decision
    sparsities: tuple[float, ...] = ()  # shares of zero deltas, 0-1

    @property
    def mean(self) -> float:
        """Mean accuracy, 0-1."""
        return statistics.fmean(self.accuracy)

    @property
    def sd(self) -> float:
        """Sample standard deviation of the accuracy; 0 for a single repeat."""
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else 0.0

    @property
    def energy(self) -> float | None:
        """Mean energy in uJ."""
        return statistics.fmean(self.energies) if self.energies else None

    @property
    def sparsity(self) -> float | None:
        """Mean temporal sparsity, 0-1."""
        return statistics.fmean(self.sparsities) if self.sparsities else None


@dataclass(frozen=True)
class Line:
    """A published row: accuracy (0-1) at each x, drawn in the colour of `series`."""

    series: str
    x: tuple[Any, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Strip:
    """The settings of one sweep, shown as a row of cells for each series."""

    label: str
    settings: tuple[Setting, ...]


def _series(settings: Sequence[Setting]) -> list[str]:
    return list(dict.fromkeys(setting.series for setting in settings))


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(value: Any) -> str:
    if value is None:
        return "analog"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(axes: Axes) -> None:
    axes.grid(which="major", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)


class _Scale:
    """Places of the values of an axis: numbers where they belong, anything else (analog, names) one after the other."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(dict.fromkeys(values))
        self.numeric = all(_number(value) for value in self.values)
        if self.numeric:
            self.values.sort()

    def __call__(self, value: Any) -> float | None:
        if self.numeric:
            return float(value) if _number(value) else None
        return float(self.values.index(value)) if value in self.values else None

    def ticks(self, axes: Axes) -> None:
        if not self.numeric:
            axes.set_xticks(range(len(self.values)), [_name(value) for value in self.values])
        elif len(self.values) <= 12 and _even(self.values):
            axes.set_xticks(self.values, [_name(value) for value in self.values])


def _even(values: Sequence[float]) -> bool:
    """Whether labels at these places keep clear of each other."""
    gaps = np.diff(np.array(values, dtype=float))
    return len(gaps) == 0 or bool(gaps.min() > 0.05 * (values[-1] - values[0]))


def accuracy_against(
    settings: Sequence[Setting], label: str, title: str, references: Sequence[Line], source: str, path: Path
) -> None:
    """Draw accuracy against a setting: the mean of each series, a band of one standard deviation, a dot for each repeat.

    Published rows are dashed and hollow, in the colour of the series that they belong to.
    """
    names = _series(settings)
    scale = _Scale([setting.x for setting in settings])
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.subplots()
        width = len(names)
        span = (scale(scale.values[-1]) or 0.0) - (scale(scale.values[0]) or 0.0)
        for index, name in enumerate(names):
            mine = sorted((s for s in settings if s.series == name), key=lambda s: scale(s.x) or 0.0)
            x = np.array([scale(setting.x) for setting in mine], dtype=float)
            mean, sd = (100 * np.array([getattr(setting, key) for setting in mine]) for key in ("mean", "sd"))
            colour, marker = _colour(index), MARKERS[index % len(MARKERS)]
            axes.plot(
                x, mean, "-", color=colour, marker=marker, markersize=5.5, linewidth=1.8, label=name or "here", zorder=4
            )
            axes.fill_between(x, mean - sd, np.minimum(mean + sd, 100), color=colour, alpha=0.18, linewidth=0, zorder=2)
            shift = 0.012 * span * (index - (width - 1) / 2) if width > 1 else 0.0  # dots of series side by side
            for place, setting in zip(x, mine, strict=True):
                dots = 100 * np.array(setting.accuracy)
                axes.plot(
                    np.full(len(dots), place + shift), dots, ".", color=colour, markersize=4.5, alpha=0.75, zorder=3
                )
        for line in references:
            known = [(scale(x), 100 * y) for x, y in zip(line.x, line.accuracy, strict=True) if scale(x) is not None]
            if not known:
                continue
            colour = _colour(names.index(line.series)) if line.series in names else GREY
            axes.plot(
                *zip(*known, strict=True), "--", color=colour, marker="o", markerfacecolor="white", markersize=4.5, linewidth=1.1, alpha=0.8, zorder=3
            )  # fmt: skip
        scale.ticks(axes)
        published = [
            y for line in references for x, y in zip(line.x, line.accuracy, strict=True) if scale(x) is not None
        ]
        shown = [100 * share for share in (*(y for setting in settings for y in setting.accuracy), *published)]
        collapsed = max(shown) - min(shown) > _COLLAPSE
        if collapsed:
            _stretch(axes, min(shown), max(shown))
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, % (spaced by ratio of errors)" if collapsed else "accuracy, %")
        _plain(axes)
        handles = list(axes.get_legend_handles_labels()[0])
        repeats = sorted({len(setting.accuracy) for setting in settings})
        if repeats != [1]:
            count = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
            handles.append(Line2D([], [], color=GREY, marker=".", linestyle="", label=f"single run ({count} each)"))
            handles.append(Line2D([], [], color=GREY, alpha=0.25, linewidth=8, label="± one standard deviation"))
        if references:
            handles.append(
                Line2D([], [], color=GREY, linestyle="--", marker="o", markerfacecolor="white", markersize=4.5, linewidth=1.1, label="published (other test clips)")
            )  # fmt: skip
        axes.legend(handles=handles, frameon=False, loc="best", fontsize=9)
        _title(figure, title)
        if source:
            figure.supxlabel(_wrapped(source), x=0.01, ha="left", fontsize=8, color=GREY)
        save(figure, path)


def _stretch(axes: Axes, low: float, high: float) -> None:
    """An accuracy axis that goes by the ratio of errors: beside a setting that collapsed, 88 and 91 % stay apart."""
    limit = 99.9

    def forward(value: np.ndarray) -> np.ndarray:
        return -np.log10(100 - np.minimum(value, limit))

    def inverse(place: np.ndarray) -> np.ndarray:
        return 100 - 10.0**-place

    axes.set_yscale("function", functions=(forward, inverse))
    top = 100 - (100 - min(high, limit)) / 1.25
    axes.set_ylim(max(low - 5, 0), top)
    marks = [0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98, 99]
    axes.yaxis.set_major_locator(FixedLocator([mark for mark in marks if max(low - 5, 0) <= mark <= top]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(FixedLocator([]))


def _wrapped(text: str, width: int = 115) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def pareto_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper convex hull of (energy, accuracy) over log energy, from the cheapest point to the most accurate one.

    Points on it are the settings, or mixtures of settings, that no other beats in both; energies are above 0.
    """
    best: dict[float, float] = {}
    for energy, accuracy in points:
        best[energy] = max(accuracy, best.get(energy, -math.inf))
    top = max(best.values())
    last = min(energy for energy, accuracy in best.items() if accuracy == top)
    hull: list[tuple[float, float]] = []
    for energy in sorted(energy for energy in best if energy <= last):
        point = (energy, best[energy])
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) >= 0:
            hull.pop()
        hull.append(point)
    return hull


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Positive where a, b, c turn to the left (b lies below the line from a to c)."""
    ax, bx, cx = (math.log(point[0]) for point in (a, b, c))
    return (bx - ax) * (c[1] - a[1]) - (b[1] - a[1]) * (cx - ax)


@dataclass(frozen=True)
class Network:
    """A network by its size and its accuracy (0-1) over repeats."""

    label: str
    macs: float
    bytes: float
    accuracy: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy, 0-1."""
        return statistics.fmean(self.accuracy)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) that no other beats in both, from the cheapest to the most accurate one."""
    found: list[tuple[float, float]] = []
    for cost, right in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not found or right > found[-1][1]:
            found.append((cost, right))
    return found


def pareto(found: Sequence[Network], published: Sequence[Network], title: str, path: Path) -> None:
    """Draw accuracy against multiply-adds and bytes of weights (logarithmic), with the fronts of both.

    A cost that is the same for all has no panel. Published networks are hollow: they were measured on other clips.
    """
    costs = [
        (key, label)
        for key, label in (("macs", "multiply-adds"), ("bytes", "bytes of weights"))
        if len({getattr(each, key) for each in found}) > 1
    ]
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(1.7 + 4.65 * len(costs), 4.8), layout="constrained")
        for axes, (key, label) in zip(
            figure.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs, strict=True
        ):
            axes.set_xscale("log")
            points = [(getattr(each, key), 100 * each.mean) for each in found]
            axes.plot(*zip(*front(points), strict=True), "-", color=GREY, linewidth=4, alpha=0.3, label="best for their cost", zorder=1)  # fmt: skip
            axes.plot(*zip(*points, strict=True), "o", color=COLOURS[0], markersize=6, label="here", zorder=3)
            theirs = [getattr(each, key) for each in published]
            if published:
                axes.plot(
                    theirs, [100 * each.mean for each in published], "o", color=COLOURS[1], markerfacecolor="none",
                    markersize=5, alpha=0.7, label="published (other test clips)", zorder=2,
                )  # fmt: skip
            _round_ticks(axes, [cost for cost, _ in points] + theirs)
            axes.set_xlabel(label)
            _plain(axes)
        figure.axes[0].set_ylabel("accuracy, %")
        figure.axes[0].legend(frameon=False, loc="best", fontsize=9)
        _title(figure, title)
        if len(found) <= 12:
            for axes, (key, _) in zip(figure.axes, costs, strict=True):
                _write_beside(axes, [(getattr(each, key), 100 * each.mean, _wrapped(each.label, 28)) for each in found], 7.5)  # fmt: skip
        save(figure, path)


def accuracy_energy(settings: Sequence[Setting], label: str, title: str, path: Path) -> None:
    """Draw accuracy against energy (logarithmic): mean and standard deviation of each setting, and the Pareto hull."""
    names = _series(settings)
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.subplots()
        points = [(s.energy, 100 * s.mean) for s in settings if s.energy]
        hull = pareto_hull(points)
        axes.plot(*zip(*hull, strict=True), "-", color=GREY, linewidth=5, alpha=0.3, label="Pareto hull", zorder=1)
        axes.set_xscale("log")
        for index, name in enumerate(names):
            mine = [setting for setting in settings if setting.series == name and setting.energy]
            axes.errorbar(
                [setting.energy or math.nan for setting in mine],
                [100 * setting.mean for setting in mine],
                yerr=[100 * setting.sd for setting in mine],
                fmt=MARKERS[index % len(MARKERS)], color=_colour(index), markersize=6, capsize=2.5, elinewidth=1, label=name or None, zorder=3,
            )  # fmt: skip
        _round_ticks(axes, [energy for energy, _ in points])
        axes.set_xlabel("energy per decision, µJ (model)")
        axes.set_ylabel("accuracy, %")
        _plain(axes)
        axes.legend(frameon=False, loc="lower right", fontsize=9, title=f"numbers: {label}", title_fontsize=9)
        _title(figure, title)
        _write_beside(axes, [(s.energy, 100 * s.mean, _name(s.x)) for s in settings if s.energy], 9)
        save(figure, path)


def accuracy_sparsity(settings: Sequence[Setting], label: str, title: str, path: Path) -> None:
    """Draw accuracy against temporal sparsity: mean and standard deviation of each setting, and the frontier."""
    known = [setting for setting in settings if setting.sparsity is not None]
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.subplots()
        best = sorted(front([(-(setting.sparsity or 0.0), setting.mean) for setting in known]))
        axes.plot(
            [-100 * x for x, _ in best], [100 * y for _, y in best], "-", color=GREY, linewidth=5, alpha=0.3,
            label="frontier", zorder=1,
        )  # fmt: skip
        for index, name in enumerate(_series(known)):
            mine = [setting for setting in known if setting.series == name]
            axes.errorbar(
                [100 * (setting.sparsity or 0.0) for setting in mine],
                [100 * setting.mean for setting in mine],
                yerr=[100 * setting.sd for setting in mine],
                fmt=MARKERS[index % len(MARKERS)], color=_colour(index), markersize=6, capsize=2.5, elinewidth=1, label=name or None, zorder=3,
            )  # fmt: skip
        axes.set_xlabel("deltas that are 0, %")
        axes.set_ylabel("accuracy, %")
        _plain(axes)
        axes.legend(frameon=False, loc="lower left", fontsize=9, title=f"numbers: {label}", title_fontsize=9)
        _title(figure, title)
        _write_beside(axes, [(100 * (s.sparsity or 0.0), 100 * s.mean, _name(s.x)) for s in known], 9)
        save(figure, path)


def _write_beside(axes: Axes, labels: Sequence[tuple[float, float, str]], size: float) -> None:
    """Write the text of each point (x, y, text) on the first of its sides where, within the axes, it covers no point and no other text.

    From the highest point down, so that texts of close points stand in the order of the points. A text that finds no room is left out. To be called when all else is drawn.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform([spot[:2] for spot in labels])]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    for x, y, words in sorted(labels, key=lambda spot: -spot[1]):
        text = axes.annotate(words, (x, y), (0, 0), textcoords="offset points", fontsize=size, color=GREY)
        text.set_in_layout(False)  # or it would move what was measured
        for right, up in ((6, 4), (6, -4), (-6, 4), (-6, -4), (6, 13), (6, -13), (-6, 13), (-6, -13)):
            text.set(position=(right, up), ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")
            box = text.get_window_extent().padded(2)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            text.remove()


def _round_ticks(axes: Axes, costs: Sequence[float]) -> None:
    """Ticks at round numbers within the data, more of them on a short axis."""
    low, high = min(costs), max(costs)
    short = high / low < 15
    steps = (1, 1.5, 2, 3, 4, 5, 7) if short else (1, 2, 5) if high / low < 1000 else (1,)
    marks = [m * 10.0**p for p in range(-4, 12) for m in steps]
    margin = 1.12 if short else 1.3
    axes.set_xlim(low / margin, high * margin)
    inside = [mark for mark in marks if low / margin <= mark <= high * margin]
    if len(inside) < 2:
        inside = [float(f"{low:.3g}"), float(f"{high:.3g}")]
    axes.xaxis.set_major_locator(FixedLocator(inside))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(EngFormatter() if high >= 1e4 else plain)
    axes.xaxis.set_minor_formatter(NullFormatter())


def strips(found: Sequence[Strip], title: str, path: Path) -> None:
    """Draw a strip of cells for each series of each sweep: accuracy, and below it energy where it is known.

    All strips share one colour scale for each of the two, so that sweeps can be compared; it goes by ratio of error and of
    energy.
    """
    rows: list[tuple[str, str, list[Setting]]] = []
    for strip in found:
        for name in _series(strip.settings):
            scale = _Scale([setting.x for setting in strip.settings])
            mine = sorted((s for s in strip.settings if s.series == name), key=lambda s: scale(s.x) or 0.0)
            rows.append((strip.label, name, mine))
    energies = [setting.energy for _, _, mine in rows for setting in mine if setting.energy]
    columns = max(len(mine) for _, _, mine in rows)
    panels = 2 if energies else 1
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(2.2 + panels * (0.78 * columns + 2.2), 1.5 + 0.78 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), panels, squeeze=False)
        for panel in range(panels):
            values = [
                [100 * s.mean if panel == 0 else (s.energy if s.energy else math.nan) for s in mine]
                for _, _, mine in rows
            ]
            everything = [value for line in values for value in line if math.isfinite(value)]
            low, high = min(everything), max(everything)
            if panel == 1:
                high = max(high, _LEAST_RATIO * low)  # equal energies look equal
            for index, (label, name, mine) in enumerate(rows):
                axes = grid[index, panel]
                shades = [_shade(value, low, high, error=panel == 0) for value in values[index]]
                axes.imshow([shades], cmap="cividis" if panel == 0 else "YlOrBr", vmin=0, vmax=1, aspect="auto")
                axes.set_xlim(-0.5, columns - 0.5)  # cells of all strips have the same width
                for column, (value, shade, setting) in enumerate(zip(values[index], shades, mine, strict=True)):
                    text = _cell(value, setting, panel)
                    dark = shade < 0.55 if panel == 0 else shade > 0.6
                    axes.text(column, 0, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")  # fmt: skip
                axes.set_xticks(range(len(mine)), [_name(setting.x) for setting in mine], fontsize=9)
                axes.tick_params(length=0, pad=2)
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if panel == 0:
                    axes.set_ylabel(
                        _narrow(label) + (f"\n{_narrow(name)}" if name else ""),
                        rotation=0, ha="right", va="center", fontsize=9, labelpad=8,
                    )  # fmt: skip
            grid[0, panel].set_title(
                "accuracy, % (mean ± sd)" if panel == 0 else "energy per decision, µJ (model)", fontsize=10
            )
        _title(figure, title)
        save(figure, path)


def _narrow(text: str) -> str:
    return _wrapped(text, 30)


def _cell(value: float, setting: Setting, panel: int) -> str:
    if not math.isfinite(value):
        return "-"
    if panel == 1:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.1f}" + (f"\n±{100 * setting.sd:.1f}" if len(setting.accuracy) > 1 else "")


def _shade(value: float, low: float, high: float, *, error: bool) -> float:
    """Place of a value between the smallest and the largest, 0-1, by ratio: of energies, or of the errors of accuracies.

    By ratio of errors 85 and 90 % differ clearly even beside a setting that collapsed to 10 %.
    """
    if not math.isfinite(value) or high <= low:
        return 0.5
    place, first, last = (
        -math.log(max(100 - number, 0.1)) if error else math.log(number) for number in (value, low, high)
    )
    return (place - first) / (last - first) if last > first else 0.5


def _rates(path: Path) -> list[tuple[float, float]]:
    """(step of the row before, new rate) at each change of the learning rate in a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(float(row["step"]), float(row["lr"])) for row in csv.DictReader(file) if row.get("lr")]
    return [(before[0], after[1]) for before, after in itertools.pairwise(rows) if before[1] != after[1]]


def error_curves(runs: Sequence[tuple[str, Sequence[tuple[str, Path]]]], title: str, path: Path) -> None:
    """Draw error (1 - accuracy, logarithmic) against training step of one or several runs.

    A run is (label, [(phase, metrics.csv)]); its phases follow each other on one axis. Training is dashed (with
    DropConnect or noise where the phase has them), validation solid; vertical lines mark where the first run's
    learning rate drops and its next phase begins.
    """
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(7.6, 4.9), layout="constrained")
        axes = figure.subplots()
        drawn: list[np.ndarray] = []
        handles = []
        for index, (label, phases) in enumerate(runs):
            colour = (
                _colour(index)
                if len(runs) <= len(COLOURS)
                else mpl.colormaps["viridis"](0.92 * index / (len(runs) - 1))
            )
            start = 0.0
            joined: dict[str, tuple[list[float], list[float]]] = {"train": ([], []), "validation": ([], [])}
            for phase, file in phases:
                columns = read_metrics(file)
                if index == 0:
                    if start:
                        _mark(axes, start, phase, strong=True)
                    changes = _rates(file)
                    if len(changes) <= 4:
                        for step, rate in changes:
                            _mark(axes, start + step, f"lr {rate:g}")
                for split in joined:
                    errors = error_percent(columns[f"{split}_accuracy"])
                    known = np.isfinite(errors)
                    joined[split][0].extend(start + columns["step"][known])
                    joined[split][1].extend(errors[known])
                start += float(columns["step"].max(initial=0))
            for split, style in (("train", "--"), ("validation", "-")):
                x, y = joined[split]
                drawn.append(np.array(y))
                axes.plot(x, y, style, color=colour, linewidth=1.8 if split == "validation" else 1.0)
            handles.append(Line2D([], [], color=colour, linewidth=1.8, label=label))
        values = np.concatenate(drawn)
        percent_axis(axes, values[np.isfinite(values)])
        axes.set_xlim(left=0)
        axes.set_xlabel("training step")
        axes.set_ylabel("error, % of clips")
        _plain(axes)
        handles += [
            Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="train"),
            Line2D([], [], color=GREY, linewidth=1.8, label="validation"),
        ]
        figure.legend(handles=handles, frameon=False, loc="outside right center", fontsize=9)
        _title(figure, title)
        save(figure, path)


def _mark(axes: Axes, step: float, text: str, *, strong: bool = False) -> None:
    axes.axvline(step, color=GREY, linewidth=1.2 if strong else 0.8, linestyle="-" if strong else ":", zorder=1)
    axes.annotate(
        text, (step, 1), (-3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
        rotation=90, ha="right", va="top", fontsize=8, color=GREY,
    )  # fmt: skip
