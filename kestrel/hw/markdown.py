"""The section on energy, area and latency of reports and cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kestrel.hw.result import Component, Energy, Figures
from kestrel.store.markdown import table

TITLE = "## Energy, area and latency (model)"


def summary(figures: Figures) -> str:
    """One line for a log: energy, its largest part, and the digital comparison."""
    energy = figures.energy
    largest = max(energy.parts, key=lambda part: part.total_uj)
    share = 100 * largest.total_uj / energy.total_uj
    text = f"energy {_uj(energy.total_uj)} µJ per decision by model {figures.model} ({largest.name} {share:.1f} %)"
    return text if figures.digital is None else f"{text}, digital accelerator {_uj(figures.digital.total_uj)} µJ"


def section(figures: Figures | None, obstacle: str) -> str:
    """The section as Markdown; `obstacle` says why there are no figures."""
    if figures is None:
        return f"{TITLE}\n\nNot estimated: {obstacle}."
    lines = [
        TITLE,
        "",
        f"**{_uj(figures.energy.total_uj)} µJ per decision** by the model `{figures.model}` (nothing was measured). "
        f"{figures.setup}.",
        "",
        _table(figures.energy),
    ]
    if figures.digital is not None:
        ratio = figures.digital.total_uj / figures.energy.total_uj
        lines += [
            "",
            f"A digital accelerator would take {_uj(figures.digital.total_uj)} µJ ({ratio:.3g} times as much):",
            "",
            _table(figures.digital),
        ]
    rows = _others(figures)
    if rows:
        lines += ["", table(("", "", "how it is known"), rows)]
    if figures.notes:
        lines += ["", *(f"* {note}" for note in figures.notes)]
    return "\n".join(lines)


def _table(energy: Energy) -> str:
    rows: list[Sequence[Any]] = []
    parts = sorted(energy.parts, key=lambda part: -part.total_uj)
    for part in [*parts, Component("all", energy.total_uj, energy.step_pj, energy.readout_pj)]:
        share = f"{100 * part.total_uj / energy.total_uj:.2f} %"
        rows.append((part.name, _uj(part.total_uj), share, _pj(part.step_pj), _pj(part.readout_pj)))
    header = ("component", "µJ per decision", "share", "pJ per step and block", "pJ per read-out and block")
    return _aligned(table(header, rows))


def _aligned(text: str) -> str:
    """The same table with all columns but the first to the right: they are numbers with units of their own digits."""
    head, rule, *rows = text.splitlines()
    columns = rule.count("|") - 1
    return "\n".join([head, "|---|" + "--:|" * (columns - 1), *rows])


def _others(figures: Figures) -> list[tuple[str, str, str]]:
    known = {True: "estimate, scaled from one published point", False: "computed"}
    rows = []
    if figures.area is not None:
        text = f"{figures.area.mm2:.3g} mm², {figures.area.arrays:,} arrays"
        rows.append(("area", text, known[figures.area.estimate]))
    if figures.latency is not None:
        seconds = figures.latency.seconds
        text = f"{figures.latency.cycles:,} cycles" + ("" if seconds is None else f", {1e3 * seconds:.3g} ms")
        rows.append(("latency", text, known[figures.latency.estimate]))
    return rows


def _uj(value: float) -> str:
    """µJ with three decimals, small ones down to the pJ."""
    return f"{value:,.3f}" if value >= 0.1 else f"{value:.6f}"


def _pj(value: float | None) -> str | None:
    return None if value is None else f"{value:,.3f}"
