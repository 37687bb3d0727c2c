#!/usr/bin/env python3
"""Print the site's flags for a stage, one per line: `backend_flags.py slurm STAGE` reads conf/backends/slurm.yaml."""

import sys

from kestrel.pipeline.backend import flags
from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.step import ROOT, exit_code

if __name__ == "__main__":
    setup_logging()
    try:
        print("\n".join(flags(ROOT / "conf" / "backends" / f"{sys.argv[1]}.yaml", sys.argv[2])))
    except BaseException as error:
        sys.exit(exit_code(error))
