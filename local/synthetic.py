"""Stage 0 of a synthetic corpus: let eSpeak NG say the words of Speech Commands."""

from __future__ import annotations

from pathlib import Path

import stage0

from kestrel.corpus.spec import CorpusSpec
from kestrel.corpus.synthetic import synthesise
from kestrel.pipeline.console import progress


def obtain(spec: CorpusSpec, out: Path, nproc: int) -> tuple[Path, Path | None]:
    """The synthetic clips in `raw/main`; test speakers come from the hash rule."""
    main = out / "main"
    synthesise(main, spec, nproc, progress("clips"))
    return main, None


if __name__ == "__main__":
    stage0.main("Stage 0 of a synthetic corpus: let eSpeak NG say the words of Speech Commands.", obtain)
