"""Length and learning rate of a training phase."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from kestrel.errors import UsageError
from kestrel.train.spec import PhaseSpec


def phase_steps(phase: PhaseSpec, batches_per_epoch: int, where: str = "train") -> int:
    """Optimiser steps of a phase. Raises UsageError unless exactly one of epochs and steps is given."""
    if (phase.epochs is None) == (phase.steps is None):
        raise UsageError(f"{where}: give exactly one of {where}.epochs and {where}.steps")
    return phase.steps if phase.steps is not None else (phase.epochs or 0) * batches_per_epoch


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: constant segments, or half a cosine from `rates[0]` to 0 over `total` steps.

    `starts` holds the first step of each segment.
    """

    total: int
    rates: tuple[float, ...]
    starts: tuple[int, ...]
    cosine: bool = False

    def __call__(self, step: int) -> float:
        """Learning rate of the update number `step` (from 0)."""
        if self.cosine:
            return self.rates[0] * 0.5 * (1 + math.cos(math.pi * min(step, self.total) / max(self.total, 1)))
        segment = sum(start <= step for start in self.starts) - 1
        return self.rates[segment]

    def agrees(self, other: Schedule, steps: int) -> bool:
        """Whether the first `steps` updates have the same learning rates in both."""
        if self.cosine or other.cosine:
            return steps == 0 or self == other
        edges = {step for step in (0, *self.starts, *other.starts) if step < steps}
        return all(self(step) == other(step) for step in edges)


def schedule(phase: PhaseSpec, total: int, where: str = "train") -> Schedule:
    """The learning rates of a phase of `total` steps. Raises UsageError where lr, lr_steps and schedule do not fit."""
    rates = tuple(phase.lr)
    if not rates:
        raise UsageError(f"{where}.lr: expected at least one learning rate")
    if phase.schedule == "cosine":
        if len(rates) > 1 or phase.lr_steps:
            raise UsageError(f"{where}.schedule: cosine takes one {where}.lr and no {where}.lr_steps")
        return Schedule(total, rates, (0,), cosine=True)
    if not phase.lr_steps:  # equal shares
        return Schedule(total, rates, tuple(total * place // len(rates) for place in range(len(rates))))
    lengths = phase.lr_steps
    if len(lengths) == len(rates) and sum(lengths) == total:
        lengths = lengths[:-1]
    if len(lengths) != len(rates) - 1:
        raise UsageError(
            f"{where}.lr_steps: {len(rates)} learning rates need {len(rates) - 1} lengths (the last segment takes "
            f"the rest) or {len(rates)} that add up to the {total} steps, not {phase.lr_steps}"
        )
    return Schedule(total, rates, tuple(itertools.accumulate(lengths, initial=0)))
