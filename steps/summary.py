#!/usr/bin/env python3
"""Print what a run made: accuracy, counts, time per stage, where the files are, what to try next."""

import sys

from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.step import exit_code, open_run
from kestrel.pipeline.summary import summary

if __name__ == "__main__":
    setup_logging()
    try:
        sys.stdout.write(summary(open_run(sys.argv[1])))
    except BaseException as error:
        sys.exit(exit_code(error))
