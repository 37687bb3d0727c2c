#!/usr/bin/env python3
"""Stage 6: write files for deployment and check them against the checkpoint."""

from kestrel.pipeline.stages import Run, Status
from kestrel.pipeline.step import main
from kestrel.pipeline.work import export_stage


def work(run: Run, status: Status) -> tuple[list[str], tuple[str, ...]]:
    """Writes exp/<recipe>/<tag>/export/ (ONNX, integer codes, card.md)."""
    return export_stage(run), ()


if __name__ == "__main__":
    main("export", work)
