#!/usr/bin/env python3
"""Stage 1: check every clip and write the manifests of the protocol."""

from kestrel.corpus.prepare import prepare
from kestrel.pipeline.console import progress
from kestrel.pipeline.stages import SPLITS, Run, Status
from kestrel.pipeline.step import main
from kestrel.pipeline.work import roots


def work(run: Run, status: Status) -> tuple[list[str], tuple[str, ...]]:
    """Writes data/<corpus>/<protocol>/{train,validation,test}.csv, protocol.json and rejected.csv."""
    found = roots(run)
    config = run.config
    assert config.corpus is not None and config.protocol is not None
    bar = progress("check clips")
    prepare(config.corpus, found["main"], found.get("test"), config.protocol, run.manifests, run.nproc, bar)
    return [*(f"{split}.csv" for split in SPLITS), "protocol.json", "rejected.csv"], ()


if __name__ == "__main__":
    main("prepare", work)
