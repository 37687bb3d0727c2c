#!/usr/bin/env python3
"""Print what running a stage would do: `status.py EXP STAGE [--force ...]` prints skip, run, resume, ..."""

import sys

from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.stages import status
from kestrel.pipeline.step import exit_code, open_run

if __name__ == "__main__":
    setup_logging()
    try:
        state = status(open_run(sys.argv[1], force="--force" in sys.argv), sys.argv[2])
        print("skip" if state.action in ("skip", "absent") else state.action)
    except BaseException as error:
        sys.exit(exit_code(error))
