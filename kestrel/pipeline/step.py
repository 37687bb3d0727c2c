"""The frame of every step script: options, log, lock, up-to-date check, done-marker, exit code."""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import logging
import os
import pstats
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kestrel.errors import EXIT_AGAIN, EXIT_ERROR, EXIT_USAGE, KestrelError, RunAgain, UsageError
from kestrel.pipeline.config import load_config
from kestrel.pipeline.console import duration, setup_logging
from kestrel.pipeline.stages import BY_NAME, Run, Status, begin, finish, outdated_inputs, status
from kestrel.store.atomic import remove_stale
from kestrel.store.lock import lock
from kestrel.train.signals import STOP_SIGNALS, StopFlag, ignore_stop_signals

log = logging.getLogger("kestrel")
ROOT = Path(__file__).resolve().parents[2]
_MAIN = os.getpid()
Body = Callable[[Run, Status], tuple[list[str], tuple[str, ...]]]


def exit_code(error: BaseException) -> int:
    """Say an error in one line and give the exit code for it; a defect of our own shows its traceback."""
    if isinstance(error, RunAgain):
        log.info("%s; the same command continues", error)
        return EXIT_AGAIN
    if isinstance(error, KestrelError):
        log.error("error: %s", error)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    if isinstance(error, KeyboardInterrupt):
        log.error("interrupted")
        return 130
    log.error("unexpected %s: %s\n%s", type(error).__name__, error, traceback.format_exc())
    return EXIT_ERROR


def _end(number: int, frame: FrameType | None) -> None:
    """Leave on a signal as on an error, so that locks and temporary files go (training takes over while it runs)."""
    if StopFlag.asked:
        return  # the second of two signals, one of them passed on by run.sh: the state is saved already
    if os.getpid() != _MAIN:
        os._exit(128 + number)  # a forked worker
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    log.error("stopped by %s", signal.Signals(number).name)
    sys.exit(128 + number)


def handle_stop_signals() -> None:
    """From here to the end of the process a stop signal leaves in order, or is ignored where training obeyed one."""
    for number in STOP_SIGNALS:  # run.sh starts steps with SIGINT ignored
        signal.signal(number, _end)


def leave(error: BaseException | None = None) -> NoReturn:
    """End the process with the exit code of `error`, said in one line, or with 0."""
    if isinstance(error, SystemExit):
        raise error
    code = 0 if error is None else exit_code(error)
    ignore_stop_signals()  # Python puts handlers back before it ends: a second signal would change the exit code
    sys.exit(code)


def open_run(exp: str, nproc: int = 1, force: bool = False) -> Run:
    """The run that was resolved into the folder `exp`."""
    folder = Path(os.path.abspath(ROOT / exp))  # not resolved: exp/ may be a link to a larger disk
    if not (folder / "config.yaml").exists():
        raise UsageError(f"{exp} has no config.yaml: start runs through ./run.sh")
    return Run(ROOT, folder, load_config(folder / "config.yaml", ROOT), nproc, force)


def _locked(run: Run, stage: str) -> contextlib.ExitStack:
    what = f"stage {BY_NAME[stage].number} {stage} of {run.config.recipe}/{run.config.tag}"
    locks = contextlib.ExitStack()
    locks.enter_context(lock(run.exp, what, wait=False))
    if BY_NAME[stage].number <= 2:
        locks.enter_context(lock(run.out(stage).parent, what, wait=True))
    return locks


def _idle(head: str, state: Status) -> bool:
    """Whether there is nothing to do; says so. Raises KestrelError where the stage cannot run."""
    if state.action in ("blocked", "refused"):
        raise KestrelError(state.reason if state.action == "blocked" else f"{head}: {state.reason}")
    if state.action in ("absent", "skip"):
        log.info("%s: %s", head, "up to date" if state.action == "skip" else f"nothing to do, {state.reason}")
        return True
    return False


def _work(run: Run, stage: str, body: Body, profile: bool) -> None:
    number = BY_NAME[stage].number
    head = f"stage {number} {stage}"
    state = status(run, stage)
    for line in outdated_inputs(run, stage):
        log.warning("%s: %s", head, line)
    if _idle(head, state):
        return
    with _locked(run, stage):
        state = status(run, stage)  # another run may have finished it while this one waited
        if _idle(head, state):
            return
        log.info("%s: %s (%s)", head, BY_NAME[stage].does, state.reason)
        begin(run, stage, state)
        for folder in (run.out(stage), run.out(stage).parent):  # both are locked
            remove_stale(folder)
        started = time.monotonic()
        profiler = cProfile.Profile() if profile else None
        outputs, volatile = profiler.runcall(body, run, state) if profiler else body(run, state)
        seconds = time.monotonic() - started
        if profiler:
            path = run.exp / "log" / f"{stage}.profile.txt"
            with path.open("w", encoding="utf-8") as file:
                pstats.Stats(profiler, stream=file).sort_stats("cumulative").print_stats(60)
            log.info("profile: %s", path.relative_to(run.root))
        finish(run, stage, state, outputs, seconds, volatile)
        log.info("%s: done in %s", head, duration(seconds))


def main(stage: str, body: Body) -> None:
    """Run one stage as a script and exit.

    `body(run, status)` does the work and returns the outputs (paths below the stage's folder) and which of them are
    volatile: kept out of the id that later stages record.
    """
    parser = argparse.ArgumentParser(description=f"Stage {BY_NAME[stage].number}: {BY_NAME[stage].does}.")
    parser.add_argument("exp", help="experiment folder with its config.yaml")
    parser.add_argument("--nproc", type=int, default=os.cpu_count() or 1, help="processes for data work")
    parser.add_argument(
        "--force", action="store_true", help="run it although it is up to date or unfinished with other settings"
    )
    parser.add_argument("--profile", action="store_true", help="write a profile into the log folder")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # paths in config.yaml are relative to the root of the repository
    setup_logging()
    handle_stop_signals()
    try:
        run = open_run(arguments.exp, arguments.nproc, arguments.force)
        setup_logging(run.exp / "log" / f"{stage}.log")
        _work(run, stage, body, arguments.profile)
    except BaseException as error:
        leave(error)
    leave()
