#!/usr/bin/env python3
"""Gather the points of a sweep: `steps/gather.py exp/<recipe>/sweeps/<name>`; exit code 1 where one has no result."""

import logging
import sys

from kestrel.errors import EXIT_ERROR
from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.gather import gather
from kestrel.pipeline.step import ROOT, exit_code

if __name__ == "__main__":
    setup_logging()
    try:
        found = gather(ROOT, ROOT / sys.argv[1])
        print(f"{found.points - found.failed} of {found.points} points have a result: {found.table.relative_to(ROOT)}")
        for picture in found.pictures:
            print(f"  {picture.relative_to(ROOT)}")
    except BaseException as error:
        sys.exit(exit_code(error))
    if found.failed:
        logging.getLogger("kestrel").error(
            "error: %d of %d points failed or were not run; column `error` of %s says why, the same command tries again",
            found.failed, found.points, found.table.relative_to(ROOT),
        )  # fmt: skip
    sys.exit(EXIT_ERROR if found.failed else 0)
