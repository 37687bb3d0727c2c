"""Pictures of what a delta network transmits."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from kestrel.nn.delta_trace import DeltaTrace
from kestrel.score.plots import BLUE, GREY, ORANGE, save

_BINS = 40


def shares(clips: np.ndarray, path: Path) -> None:
    """How the share of zero deltas is spread over clips: `clips` [clips, 3], of inputs, states and both, 0-1."""
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        edges = np.linspace(0, 100, 2 * _BINS + 1)
        styles = (("inputs", ORANGE, "--"), ("states", BLUE, ":"), ("both", "black", "-"))
        for (name, colour, style), column in zip(styles, 100 * clips.T, strict=True):
            label = f"{name}, mean {column.mean():.1f} %"
            axes.hist(
                column, edges.tolist(), histtype="step", color=colour, linestyle=style, linewidth=1.6, label=label
            )
        axes.set_xlabel("deltas that are 0, % of a clip")
        axes.set_ylabel("clips")
        axes.set_xlim(0, 100)
        axes.grid(which="major", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
        save(figure, path)


def deltas(trace: list[DeltaTrace], title: str, path: Path) -> None:
    """The deltas of a clip over time: a column per frame, a row per input and unit, dark where one was transmitted."""
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 10}):
        figure = Figure(figsize=(7.2, 0.6 + 3.4 * len(trace)), layout="constrained")
        grid = figure.subplots(len(trace), 1, squeeze=False, sharex=True)[:, 0]
        colours = ListedColormap(["white", BLUE])
        for axes, layer in zip(grid, trace, strict=True):
            frames = len(layer.active)
            axes.imshow(
                layer.active.T, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest", origin="lower",
                extent=(-0.5, frames - 0.5, -0.5, layer.inputs + layer.hidden - 0.5),
            )  # fmt: skip
            axes.axhline(layer.inputs - 0.5, color=ORANGE, linewidth=1.4)
            places = (layer.inputs / 2, layer.inputs + layer.hidden / 2)
            axes.set_yticks(places, (f"{layer.inputs} inputs", f"{layer.hidden} states"), rotation=90, va="center")
            axes.tick_params(axis="y", length=0)
            share = 100 * (1 - layer.active.mean())
            axes.set_title(f"{layer.layer}: {share:.1f} % are 0", fontsize=10, color=GREY)
        grid[-1].set_xlabel("frame")
        figure.suptitle(title, fontsize=11)
        save(figure, path)
