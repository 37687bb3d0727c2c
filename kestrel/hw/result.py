"""What a hardware model says of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DIGITS = 6  # of µJ and mm² in files: 1 pJ


@dataclass(frozen=True)
class Component:
    """Energy of one kind of work. Where it is spent in blocks, also pJ of one block in a time step and in its read-out."""

    name: str
    total_uj: float
    step_pj: float | None = None
    readout_pj: float | None = None


@dataclass(frozen=True)
class Energy:
    """Energy of one decision (one clip), by component."""

    parts: Sequence[Component]

    @property
    def total_uj(self) -> float:
        """Energy of one decision in µJ."""
        return sum(part.total_uj for part in self.parts)

    @property
    def components(self) -> dict[str, float]:
        """µJ of one decision by component."""
        return {part.name: part.total_uj for part in self.parts}

    @property
    def step_pj(self) -> float:
        """pJ of one block in one time step."""
        return sum(part.step_pj or 0.0 for part in self.parts)

    @property
    def readout_pj(self) -> float:
        """pJ of the read-out of one block, once per decision."""
        return sum(part.readout_pj or 0.0 for part in self.parts)


@dataclass(frozen=True)
class Area:
    """Area of the chip; an estimate is scaled from a single published point."""

    mm2: float
    arrays: int
    estimate: bool = True


@dataclass(frozen=True)
class Latency:
    """Clock cycles of one decision; seconds where the clock is known."""

    cycles: int
    seconds: float | None = None
    estimate: bool = True


@dataclass(frozen=True)
class Figures:
    """Figures of one network on one kind of hardware.

    `model` is the file of its constants. `setup` says in words what was counted. `digital` is the energy of a digital
    accelerator for the same network. What a model does not know is None.
    """

    model: str
    setup: str
    energy: Energy
    digital: Energy | None = None
    area: Area | None = None
    latency: Latency | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def record(self) -> dict[str, Any]:
        """Entries of result.json and export.json: `energy_uj`, and `energy` with everything behind it."""
        details: dict[str, Any] = {"model": self.model, "components": _rounded(self.energy.components)}
        details |= {"step_pj": round(self.energy.step_pj, DIGITS), "readout_pj": round(self.energy.readout_pj, DIGITS)}
        estimates: list[str] = []
        if self.digital is not None:
            details["digital_uj"] = round(self.digital.total_uj, DIGITS)
            details["digital_components"] = _rounded(self.digital.components)
        if self.area is not None:
            details |= {"arrays": self.area.arrays, "area_mm2": round(self.area.mm2, DIGITS)}
            estimates += ["area_mm2"] if self.area.estimate else []
        if self.latency is not None:
            details["cycles"] = self.latency.cycles
            estimates += ["cycles"] if self.latency.estimate else []
            if self.latency.seconds is not None:
                details["seconds"] = self.latency.seconds
                estimates += ["seconds"] if self.latency.estimate else []
        return {"energy_uj": round(self.energy.total_uj, DIGITS), "energy": {**details, "estimates": estimates}}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in values.items()}
