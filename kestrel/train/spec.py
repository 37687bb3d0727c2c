"""Settings of the training loop (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kestrel.settings import setting


@dataclass
class PhaseSpec:
    """One training stage: length, optimiser and learning rate."""

    epochs: int | None = setting(
        None, "length in passes over the training clips; exactly one of epochs and steps", min=0
    )
    steps: int | None = setting(None, "length in batches; exactly one of epochs and steps", min=0)
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adabound"] = setting("adam", "optimiser")
    lr: list[float] = setting([0.001], "learning rate of each segment", min=0)
    lr_steps: list[int] = setting([], "segments: batches of each, of the last if you like; empty = equal shares", min=0)
    lr_epochs: list[int] = setting([], "the same in passes over the training clips, in place of lr_steps", min=0)
    schedule: Literal["segments", "cosine", "plateau"] = setting(
        "segments",
        "segments: constant pieces; cosine: each piece falls from its lr to 0; plateau: from the first lr down to the "
        "second, while the validation loss rests",
    )
    plateau_factor: float = setting(0.8, "schedule plateau: factor of a fall", min=0.01, max=0.99)
    plateau_patience: int = setting(4, "schedule plateau: validations without a better loss before a fall", min=0)
    weight_decay: float = setting(0.0, "weight decay", min=0)
    no_decay_keys: Literal["none", "bn", "bn#bias"] = setting(
        "none", "parameters without weight decay: normalisation, or these and all biases"
    )
    momentum: float = setting(0.9, "momentum of sgd", min=0, max=1)
    nesterov: bool = setting(False, "Nesterov's momentum of sgd")
    grad_clip: float = setting(0.0, "largest gradient norm; 0 = no limit", min=0)
    label_smoothing: float = setting(0.0, "label smoothing", min=0, max=1)
    validate_every: int | None = setting(None, "batches between validations; null = once per epoch", min=1)
    keep: Literal["best", "last"] = setting("best", "validation whose weights the stage leaves")

    # Done-markers hold these only where they are not the default, so that older trainings stay up to date.
    ADDED_LATER: ClassVar[tuple[str, ...]] = (
        *("lr_epochs", "no_decay_keys", "nesterov", "keep", "plateau_factor", "plateau_patience"),
    )


@dataclass
class RetrainSpec(PhaseSpec):
    """Stage 4."""

    start: str | None = setting(None, "checkpoint to start from in place of stage 3's result")

    ADDED_LATER: ClassVar[tuple[str, ...]] = (*PhaseSpec.ADDED_LATER, "start")


@dataclass
class TrainSpec(PhaseSpec):
    """Stage 3, and what both training stages share."""

    batch_size: int = setting(100, "clips of a batch", min=1)
    eval_batch_size: int = setting(500, "clips of a batch in validation and scoring", min=1)
    workers: int = setting(0, "loader processes; 0 = load in the training process", min=0, max=256)
    threads: int | None = setting(None, "torch threads; null = one per core", min=1)
    processes: int = setting(1, "training processes on this machine, one per GPU", min=1, max=64)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to compute")
    save_minutes: float = setting(5.0, "minutes between checkpoints inside an epoch", min=0)
