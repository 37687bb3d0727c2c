"""A search as a picture: what each block would be over time, expected cost, entropy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kestrel.models.architecture import Choice
from kestrel.store.atomic import atomic_path

_COST, _BEST, _LIMIT, _ENTROPY = "#0072B2", "#D55E00", "#666666", "#009E73"


def draw_search(path: Path, history: Sequence[dict[str, Any]], limits: Sequence[int | None]) -> None:
    """Write a PNG of the rows of a search, atomically; `limits` of multiply-adds and of bytes. No rows, no file.

    Colour says the expansion, the number in a cell the kernel; a cell is written where a block's choice changes.
    """
    if not history:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    choices = [[Choice.parse(text, "block") for text in row["blocks"].split()] for row in history]
    steps = [row["step"] for row in history]
    blocks = len(choices[0])
    figure = Figure(figsize=(9.5, 3.0 + 0.28 * blocks + 2.4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, middle, lower = figure.subplots(3, 1, height_ratios=(0.28 * blocks, 1.5, 1.0))
    image = [[row[block].expansion for row in choices] for block in range(blocks)]
    most = max(6, *(max(row) for row in image))
    shown = upper.imshow(image, aspect="auto", cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
    for block in range(blocks):
        for place, row in enumerate(choices):
            if place == 0 or row[block] != choices[place - 1][block]:
                text = "Z" if row[block].skips else str(row[block].kernel)
                dark = row[block].expansion < 0.55 * most
                upper.text(place, block, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    upper.set_yticks(range(blocks), [str(block + 1) for block in range(blocks)], fontsize=8)
    upper.set_ylabel("block")
    marks = list(range(0, len(steps), max(1, len(steps) // 8)))
    upper.set_xticks(marks, [f"{history[place]['epoch']:g}" for place in marks], fontsize=8)
    upper.set_xlabel("epoch")
    upper.set_title(
        "likeliest network within the budget (colour: expansion, number: kernel, Z: skipped)", loc="left", fontsize=10
    )
    figure.colorbar(shown, ax=upper, label="expansion", pad=0.01)
    epochs = [row["epoch"] for row in history]
    middle.plot(epochs, [row["expected_macs"] / 1e6 for row in history], color=_COST, label="expected")
    middle.plot(epochs, [row["macs"] / 1e6 for row in history], "--", color=_BEST, label="of that network")
    if limits[0] is not None:
        middle.axhline(limits[0] / 1e6, color=_LIMIT, linestyle=":", label="limit")
    middle.set_ylabel("M multiply-adds")
    middle.legend(fontsize=8, framealpha=0.8)
    lower.plot(epochs, [row["entropy"] for row in history], color=_ENTROPY)
    lower.set_ylabel("entropy, nats")
    lower.set_xlabel("epoch")
    warm = [row["epoch"] for row in history if row["phase"] == "warm-up"]
    for axes in (middle, lower):
        axes.grid(True, alpha=0.3)
        axes.set_xlim(min(epochs), max(max(epochs), min(epochs) + 1e-6))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if warm and len(warm) < len(history):
            axes.axvline(max(warm), color=_LIMIT, linewidth=0.9, linestyle=":")
    with atomic_path(path) as temporary:
        canvas.print_png(str(temporary), metadata={"Software": None})
