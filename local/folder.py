"""Stage 0 of a folder in GSC layout: check that it is one and point at it. Its files are never changed."""

from __future__ import annotations

from pathlib import Path

import stage0

from kestrel.corpus.source import check_layout
from kestrel.corpus.spec import CorpusSpec
from kestrel.errors import UsageError


def obtain(spec: CorpusSpec, out: Path, nproc: int) -> tuple[Path, Path | None]:
    """The user's folders, as they are."""
    if spec.dir is None:
        raise UsageError("corpus.dir is empty: name the folder of the corpus with --corpus DIR")
    check_layout(spec.dir)
    if spec.test_dir is not None:
        check_layout(spec.test_dir)
    return Path(spec.dir), None if spec.test_dir is None else Path(spec.test_dir)


if __name__ == "__main__":
    stage0.main("Stage 0 of a folder in GSC layout: point at it.", obtain)
