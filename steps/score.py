#!/usr/bin/env python3
"""Stage 5: score the checkpoint on the test split."""

from kestrel.pipeline.stages import Run, Status
from kestrel.pipeline.step import main
from kestrel.pipeline.work import score_stage


def work(run: Run, status: Status) -> tuple[list[str], tuple[str, ...]]:
    """Writes exp/<recipe>/<tag>/score/ (result.json, scores.csv, report.md and its pictures)."""
    return score_stage(run), ()


if __name__ == "__main__":
    main("score", work)
