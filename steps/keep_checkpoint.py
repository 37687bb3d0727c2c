#!/usr/bin/env python3
"""Keep the weights of a finished run in recipes/<recipe>/pretrained: `keep_checkpoint.py EXP`."""

import os
import sys

from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.keep_pretrained import keep
from kestrel.pipeline.step import ROOT, exit_code, open_run

if __name__ == "__main__":
    setup_logging()
    os.chdir(ROOT)
    try:
        keep(open_run(sys.argv[1]))
    except BaseException as error:
        sys.exit(exit_code(error))
