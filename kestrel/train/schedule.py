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
    """Learning rate by step: constant segments, or in each segment half a cosine from its rate to 0.

    `starts` holds the first step of each segment.
    """

    total: int
    rates: tuple[float, ...]
    starts: tuple[int, ...]
    cosine: bool = False

    def __call__(self, step: int) -> float:
        """Learning rate of the update number `step` (from 0)."""
        segment = sum(start <= step for start in self.starts) - 1
        if self.cosine:
            start, stop = self.starts[segment], (*self.starts, self.total)[segment + 1]
            share = (min(step, stop) - start) / max(stop - start, 1)
            return self.rates[segment] * 0.5 * (1 + math.cos(math.pi * share))
        return self.rates[segment]

    def observe(self, loss: float) -> None:
        """A validation loss, which changes nothing here."""

    def agrees(self, other: Rate, steps: int) -> bool:
        """Whether the first `steps` updates have the same learning rates in both."""
        if not isinstance(other, Schedule):
            return steps == 0
        if self.cosine or other.cosine:
            return steps == 0 or self == other
        edges = {step for step in (0, *self.starts, *other.starts) if step < steps}
        return all(self(step) == other(step) for step in edges)


_BETTER = 1e-4  # relative fall of the loss that counts (PyTorch's ReduceLROnPlateau)


@dataclass
class Plateau:
    """Learning rate that falls by `factor` after more than `patience` validations in a row without a better loss."""

    rate: float
    lowest: float
    factor: float
    patience: int
    best: float = math.inf
    resting: int = 0

    def __call__(self, step: int) -> float:
        """Learning rate of the next update, whatever its number."""
        return self.rate

    def observe(self, loss: float) -> None:
        """The loss of a validation; a resumed training gives those that it has behind it again."""
        if loss < self.best * (1 - _BETTER):
            self.best, self.resting = loss, 0
            return
        self.resting += 1
        if self.resting > self.patience:
            self.rate, self.resting = max(self.rate * self.factor, self.lowest), 0

    def agrees(self, other: Rate, steps: int) -> bool:
        """Whether the first `steps` updates have the same learning rates in both: it does not depend on the length."""
        return steps == 0 or isinstance(other, Plateau)


Rate = Schedule | Plateau


def schedule(phase: PhaseSpec, total: int, where: str = "train", batches_per_epoch: int = 1) -> Rate:
    """The learning rates of a phase of `total` steps. Raises UsageError where lr, lr_steps and lr_epochs do not fit."""
    rates = tuple(phase.lr)
    if not rates:
        raise UsageError(f"{where}.lr: expected at least one learning rate")
    if phase.schedule == "plateau":
        if len(rates) > 2 or phase.lr_steps or phase.lr_epochs:
            raise UsageError(
                f"{where}.lr: schedule plateau takes the first and the lowest learning rate, and no lengths"
            )
        return Plateau(rates[0], min(rates), phase.plateau_factor, phase.plateau_patience)
    if phase.lr_steps and phase.lr_epochs:
        raise UsageError(f"{where}: give one of {where}.lr_steps and {where}.lr_epochs")
    name = "lr_epochs" if phase.lr_epochs else "lr_steps"
    lengths = [length * batches_per_epoch for length in phase.lr_epochs] or phase.lr_steps
    cosine = phase.schedule == "cosine"
    if not lengths:  # equal shares
        return Schedule(total, rates, tuple(total * place // len(rates) for place in range(len(rates))), cosine)
    if len(lengths) == len(rates) and sum(lengths) == total:
        lengths = lengths[:-1]
    if len(lengths) != len(rates) - 1:
        raise UsageError(
            f"{where}.{name}: {len(rates)} learning rates need {len(rates) - 1} lengths (the last segment takes "
            f"the rest) or {len(rates)} that add up to the {total} steps, not {getattr(phase, name)}"
        )
    starts = tuple(itertools.accumulate(lengths, initial=0))
    if cosine and starts[-1] > total:
        raise UsageError(f"{where}.{name}: {starts[-1]} steps before the last segment, the phase has {total}")
    return Schedule(total, rates, starts, cosine)
