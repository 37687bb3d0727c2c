#!/usr/bin/env python3
"""Stage 4: train the pretrained network on under the retraining settings."""

from kestrel.pipeline.stages import Run, Status
from kestrel.pipeline.step import main
from kestrel.pipeline.work import train_stage


def work(run: Run, status: Status) -> tuple[list[str], tuple[str, ...]]:
    """Writes exp/<recipe>/<tag>/retrain/ (checkpoints, metrics.csv, curves.png)."""
    return train_stage(run, "retrain")


if __name__ == "__main__":
    main("retrain", work)
