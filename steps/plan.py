#!/usr/bin/env python3
"""Resolve the command line of run.sh into configurations and a list of stages (or print help or a dry run)."""

import os
import sys
from pathlib import Path

from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.plan import main
from kestrel.pipeline.step import ROOT, exit_code

if __name__ == "__main__":
    setup_logging()
    assert sys.argv[1] == "--plan-file"
    try:
        main(sys.argv[3:], ROOT, Path(sys.argv[2]), Path(os.environ.get("KESTREL_START", ".")))
    except BaseException as error:
        sys.exit(exit_code(error))
