"""Delta networks on accelerators: the section of reports and cards, and the table of published figures."""

from __future__ import annotations

from collections.abc import Sequence

from kestrel.hw.delta_published import CASES, Row, implied_range
from kestrel.hw.delta_trace import Spread, TraceFigures
from kestrel.store.markdown import percent, table

TITLE = "## Cycles on an accelerator (model)"


def summary(figures: TraceFigures) -> str:
    """One line for a log."""
    return (
        f"{_number(figures.microseconds.mean)} µs per frame on {figures.machine} by its cycle model, "
        f"{_number(figures.speedup)} times as fast as dense, balance {figures.balance:.2f}, "
        f"{percent(1 - figures.occupancy)} temporal sparsity"
    )


def section(figures: TraceFigures | None, obstacle: str) -> str:
    """The section as Markdown; `obstacle` says why there are no figures."""
    if figures is None:
        return f"{TITLE}\n\nNot estimated: {obstacle}."
    lines = [
        TITLE,
        "",
        f"**{_number(figures.microseconds.mean)} µs per frame** on `{figures.machine}` by its cycle model (nothing was "
        f"measured), for the deltas of {_count(figures.clips, 'clip')}, {_count(figures.frames, 'frame')}; "
        f"{_number(figures.speedup)} times as fast as the same machine without any sparsity "
        f"({_number(figures.dense_microseconds)} µs).",
        "",
        table(("", "mean", "95th percentile", "worst"), _spreads(figures)),
        "",
        table(("", ""), _figures(figures)),
        "",
        table(("time goes to", "cycles per frame", "share"), _breakdown(figures)),
        "",
        table(
            (
                *("layer", "inputs", "units", "cycles", "active inputs", "active states"),
                *("columns of an array, mean", "of the fullest", "balance"),
            ),
            _layers(figures),
        ),
    ]
    notes = []
    if figures.assumed:
        notes.append(f"Constants that were not published, and are assumed: {', '.join(figures.assumed)}.")
    if any(layer.nonzeros is not None for layer in figures.layers):
        beats = ", ".join(str(layer.nonzeros) for layer in figures.layers)
        notes.append(f"Weights of a column in the fullest PE, by layer: {beats}; as many cycles as a column takes.")
    if not figures.fits:
        notes.append("The weights do not fit into the memory of this machine.")
    notes.append("Front end, class layer and waiting between frames are not counted.")
    return "\n".join([*lines, "", *(f"* {note}" for note in notes)])


def published_table(rows: Sequence[Row]) -> str:
    """The published figures beside the model's, and the occupancies behind them."""
    body = [
        (
            row.case.title,
            row.figure.what,
            f"{row.figure.value:g} {row.figure.unit}",
            f"{_number(row.model)} {row.figure.unit}",
            f"{100 * row.deviation:+.1f} %",
            row.figure.why,
        )
        for row in rows
    ]
    return table(("machine and network", "figure", "published", "model", "deviation", "remark"), body)


def occupancy_table() -> str:
    """The occupancies assumed for the published figures, and those that the published times imply."""
    body = []
    for case in CASES:
        least, most = implied_range(case)
        implied = f"{percent(least)} - {percent(most)}"
        body.append((case.title, percent(case.occupancy, 0), case.basis, implied))
    return table(("machine and network", "assumed occupancy", "from", "implied by the published throughput"), body)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _number(value: float) -> str:
    """Three significant digits, whole numbers from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spreads(figures: TraceFigures) -> list[tuple[str, ...]]:
    rows: list[tuple[str, Spread]] = [("cycles per frame", figures.cycles), ("µs per frame", figures.microseconds)]
    return [(name, _number(row.mean), _number(row.p95), _number(row.worst)) for name, row in rows]


def _figures(figures: TraceFigures) -> list[tuple[str, str | None]]:
    energy = None if figures.energy_uj is None else f"{_number(figures.energy_uj)} µJ"
    per_watt = None if figures.ops_per_watt is None else f"{_number(figures.ops_per_watt * 1e-9)} GOp/s/W"
    return [
        ("effective throughput", f"{_number(figures.effective_ops * 1e-9)} GOp/s"),
        ("over the machine's peak", f"{_number(figures.over_peak)} x {_number(figures.peak_ops * 1e-9)} GOp/s"),
        ("active columns", percent(figures.occupancy)),
        ("balance of the arrays", f"{figures.balance:.3f}"),
        ("utilisation of the PEs", percent(figures.utilisation)),
        ("weights read", f"{_number(figures.weight_bytes)} bytes (dense {_number(figures.dense_weight_bytes)})"),
        ("vectors read", f"{_number(figures.vector_bytes)} bytes"),
        ("weights stored", f"{_number(figures.stored_bytes)} bytes"),
        ("energy per frame", energy),
        ("efficiency", per_watt),
    ]


def _breakdown(figures: TraceFigures) -> list[tuple[str, str, str | None]]:
    total = figures.cycles.mean
    return [
        (cause, _number(cycles), percent(cycles / total if total else 0.0))
        for cause, cycles in figures.breakdown.items()
    ]


def _layers(figures: TraceFigures) -> list[tuple[int | str | None, ...]]:
    return [
        (
            number,
            layer.inputs,
            layer.hidden,
            _number(layer.cycles),
            percent(layer.input_occupancy),
            percent(layer.hidden_occupancy),
            f"{_number(layer.mean_load)}",
            f"{_number(layer.worst_load)}",
            f"{layer.balance:.3f}",
        )
        for number, layer in enumerate(figures.layers)
    ]
