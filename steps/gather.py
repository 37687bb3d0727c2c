#!/usr/bin/env python3
"""Gather the points of a sweep into results.csv; exit code 1 where a point has no result."""

import sys

from kestrel.errors import EXIT_ERROR
from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.step import ROOT, exit_code
from kestrel.pipeline.sweep import gather

if __name__ == "__main__":
    setup_logging()
    try:
        path, points, missing = gather(ROOT / sys.argv[1])
        print(f"{points - missing} of {points} points have a result: {path.relative_to(ROOT)}")
    except BaseException as error:
        sys.exit(exit_code(error))
    sys.exit(EXIT_ERROR if missing else 0)
