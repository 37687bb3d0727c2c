#!/usr/bin/env python3
"""Stage 2: pack the audio of each split and compute its features."""

from kestrel.pipeline.stages import Run, Status
from kestrel.pipeline.step import main
from kestrel.pipeline.work import make_features, make_packs


def work(run: Run, status: Status) -> tuple[list[str], tuple[str, ...]]:
    """Writes feat/<corpus>/<protocol>/audio/ (packed audio) and feat/<corpus>/<protocol>/<frontend>/ (features)."""
    make_packs(run, status)
    return make_features(run), ()


if __name__ == "__main__":
    main("feature", work)
