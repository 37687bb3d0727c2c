"""What the stage-0 scripts share: their options, the pointer to the audio, log and exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts also run without path.sh

from kestrel.corpus.source import write_roots
from kestrel.corpus.spec import CorpusSpec
from kestrel.errors import UsageError
from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.step import exit_code
from kestrel.settings import build

# (corpus, folder data/<corpus>/raw, processes) -> (folder of the clips, folder of the test clips or None)
Obtain = Callable[[CorpusSpec, Path, int], tuple[Path, Path | None]]


def parse_spec(text: str) -> CorpusSpec:
    """The CorpusSpec in a JSON text. Raises UsageError for other text and for unknown keys."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--spec: not valid JSON ({error})") from None
    return build(CorpusSpec, data, "corpus")


def main(description: str, obtain: Obtain) -> None:
    """Run a stage-0 script: `obtain` leaves the audio in place, roots.json is written last. Exits."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--spec", required=True, help="the corpus settings as JSON")
    parser.add_argument("--out", required=True, type=Path, help="folder data/<corpus>/raw")
    parser.add_argument("--nproc", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    setup_logging()
    try:
        spec = parse_spec(options.spec)
        options.out.mkdir(parents=True, exist_ok=True)
        audio, test = obtain(spec, options.out, max(1, options.nproc))
        write_roots(options.out, audio, spec.test_dir or test)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        sys.exit(exit_code(error))
