#!/usr/bin/env python3
"""Stage 0: obtain the raw audio of the corpus with its script in local/."""

from kestrel.pipeline.stages import Run, Status
from kestrel.pipeline.step import main
from kestrel.pipeline.work import obtain_corpus


def work(run: Run, status: Status) -> tuple[list[str], tuple[str, ...]]:
    """Writes data/<corpus>/raw/ with roots.json, which says where the audio is."""
    obtain_corpus(run)
    return ["roots.json"], ()


if __name__ == "__main__":
    main("download", work)
