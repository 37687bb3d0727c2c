#!/usr/bin/env python3
"""One of several training processes: `train_process.py EXP STAGE`, started by stages 3 and 4 (train.processes > 1)."""

import logging
import os
import sys

from kestrel.pipeline.console import setup_logging
from kestrel.pipeline.step import handle_stop_signals, leave, open_run
from kestrel.pipeline.work import train_here

if __name__ == "__main__":
    handle_stop_signals()
    run, stage = open_run(sys.argv[1]), sys.argv[2]
    first = os.environ.get("RANK", "0") == "0"
    setup_logging(run.exp / "log" / f"{stage}.log" if first else None)
    if not first:
        logging.getLogger("kestrel").setLevel(logging.ERROR)
    try:
        train_here(run, "pretrain" if stage == "pretrain" else "retrain")
    except BaseException as error:
        leave(error)
    leave()
