#!/usr/bin/env python3
"""Stage 3: train the network from its initial weights."""

from kestrel.pipeline.stages import Run, Status
from kestrel.pipeline.step import main
from kestrel.pipeline.work import train_stage


def work(run: Run, status: Status) -> tuple[list[str], tuple[str, ...]]:
    """Writes exp/<recipe>/<tag>/pretrain/ (checkpoints, metrics.csv, curves.png)."""
    return train_stage(run, "pretrain")


if __name__ == "__main__":
    main("pretrain", work)
