"""The published figures of delta-network accelerators beside those of the cycle model.

The papers' abstracts give results but not the share of columns that was active, so each case has an assumed occupancy. Where
the abstract gives no hint, it is set, to a whole percent, from the published time or throughput alone: the other figures of
that machine are then checks, as far as they do not follow from each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kestrel.errors import UsageError
from kestrel.hw.delta_cycles import GRU_GATES, LSTM_GATES, DeltaLayer
from kestrel.hw.delta_spec import ActivationSpec, DeltaSpec, load_machine
from kestrel.hw.delta_trace import TraceFigures, assumed_trace, trace_figures
from kestrel.hw.spec import FOLDER


@dataclass(frozen=True)
class Figure:
    """A published number: what it is, its value and unit, and the name of the model's figure (see `_value`)."""

    what: str
    value: float
    unit: str
    key: str
    why: str  # why the model deviates, or what the agreement is worth


@dataclass(frozen=True)
class Case:
    """A published measurement: network, machine, the occupancy assumed for it and where that comes from."""

    title: str
    machine: str
    layers: tuple[DeltaLayer, ...]
    occupancy: float
    basis: str
    figures: tuple[Figure, ...]
    microseconds: float  # of a step, as far as published figures tell


CASES = (
    Case(
        title="Spartus, 1,024 LSTM units, 123 inputs",
        machine="spartus",
        layers=(DeltaLayer(123, 1024, LSTM_GATES, nonzeros=4),),  # 15/16 of 64 rows of a PE pruned
        occupancy=0.18,
        basis="set from 9.4 TOp/s; K = 4 of 64 (93.75 % of the weights are zero) is assumed as well",
        figures=(
            Figure("time of a step", 1.0, "µs", "microseconds", "published as a round number"),
            Figure("effective throughput", 9.4, "TOp/s", "effective_tops", "sets the occupancy"),
            Figure("over peak throughput", 46, "x", "over_peak", "follows from 9.4 TOp/s and 512 PEs at 200 MHz"),
            Figure(
                "efficiency", 1.1, "TOp/s/W", "tops_per_watt", "power was computed from it: agrees as far as 9.4 TOp/s do"
            ),
        ),
        microseconds=2 * LSTM_GATES * 1024 * 1147 / 9.4e12 * 1e6,
    ),
    Case(
        title="DeltaRNN, 256 GRU units, 39 inputs",
        machine="deltarnn",
        layers=(DeltaLayer(39, 256, GRU_GATES),),
        occupancy=0.12,
        basis="set from 1.2 TOp/s; 39 inputs are assumed as well",
        figures=(
            Figure("effective throughput", 1.2, "TOp/s", "effective_tops", "sets the occupancy"),
            Figure(
                "speed-up over dense", 5.7, "x", "speedup",
                "1.2 TOp/s / 5.7 = 211 GOp/s would be more than the peak of 192 GOp/s: with 768 PEs at 125 MHz "
                "no occupancy gives both",
            ),
            Figure(
                "efficiency", 164, "GOp/s/W", "gops_per_watt", "power was computed from it: agrees as far as 1.2 TOp/s do"
            ),
        ),
        microseconds=2 * GRU_GATES * 256 * 295 / 1.2e12 * 1e6,
    ),
    Case(
        title="EdgeDRNN, 2 x 768 GRU units, 40 inputs",
        machine="edgedrnn",
        layers=(DeltaLayer(40, 768, GRU_GATES), DeltaLayer(768, 768, GRU_GATES)),
        occupancy=0.1,
        basis="up to 10 times fewer weights read (abstract); not fitted. 40 inputs are assumed",
        figures=(
            Figure(
                "time of a step", 500, "µs", "microseconds",
                "published as about 0.5 ms; 20.2 GOp/s on these 5.4 M weights are 535 µs",
            ),
            Figure("effective throughput", 20.2, "GOp/s", "effective_gops", "occupancy from a round number"),
        ),
        microseconds=2 * GRU_GATES * 768 * 2344 / 20.2e9 * 1e6,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One published figure beside the model's; `deviation` = model / published - 1."""

    case: Case
    figure: Figure
    model: float

    @property
    def deviation(self) -> float:
        """Relative deviation of the model."""
        return self.model / self.figure.value - 1


def case_figures(case: Case, folder: Path = FOLDER) -> TraceFigures:
    """The model's figures of `case` at its assumed occupancy."""
    trace = assumed_trace(case.layers, case.occupancy, case.occupancy)
    return trace_figures(case.layers, [trace], load_machine(case.machine, folder))


def published(folder: Path = FOLDER) -> list[Row]:
    """Every published figure beside the model's."""
    rows = []
    for case in CASES:
        figures = case_figures(case, folder)
        rows += [Row(case, figure, _value(figures, figure.key)) for figure in case.figures]
    return rows


def _value(figures: TraceFigures, key: str) -> float:
    values = {
        "microseconds": figures.microseconds.mean,
        "effective_tops": figures.effective_ops * 1e-12,
        "effective_gops": figures.effective_ops * 1e-9,
        "speedup": figures.speedup,
        "over_peak": figures.over_peak,
        "tops_per_watt": (figures.ops_per_watt or 0.0) * 1e-12,
        "gops_per_watt": (figures.ops_per_watt or 0.0) * 1e-9,
    }
    return values[key]


def implied_occupancy(
    layers: Sequence[DeltaLayer], machine: DeltaSpec, microseconds: float, tolerance: float = 1e-3
) -> float:
    """The occupancy at which a step takes `microseconds`, to `tolerance`; the same for inputs and states.

    Raises UsageError where no occupancy does.
    """

    def time(share: float) -> float:
        return trace_figures(layers, [assumed_trace(layers, share, share)], machine).microseconds.mean

    low, high = 0.0, 1.0
    if not time(low) <= microseconds <= time(high):
        raise UsageError(
            f"hardware model: a step of {microseconds:g} µs is out of bounds ({time(low):g}..{time(high):g} µs on "
            f"{machine.name})"
        )
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if time(middle) < microseconds else (low, middle)
    return (low + high) / 2


def implied_range(case: Case, folder: Path = FOLDER) -> tuple[float, float]:
    """Occupancies that the published time implies: with the assumed activation cycles, and with none (all hidden)."""
    machine = load_machine(case.machine, folder)
    hidden = dataclasses.replace(machine, activation=ActivationSpec(0, 0, machine.activation.units))
    return (
        implied_occupancy(case.layers, machine, case.microseconds),
        implied_occupancy(case.layers, hidden, case.microseconds),
    )
