"""Training in several processes on one machine, one per GPU where there are GPUs.

The processes find each other through the variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...), so several machines
can also start `steps/train_process.py` themselves, for instance with srun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from kestrel.errors import EXIT_AGAIN, KestrelError, RunAgain
from kestrel.pipeline.stages import Run
from kestrel.train.signals import StopFlag

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_processes(run: Run, stage: str, count: int) -> None:
    """Run `steps/train_process.py` in `count` processes and wait for all of them; stop signals are passed on.

    Raises RunAgain where they saved their state and stopped, KestrelError where one of them failed (the others are ended).
    """
    # The cores are shared out: otherwise each process would start as many threads as there are cores.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    command = [sys.executable, str(run.root / "steps" / "train_process.py"), str(run.exp), stage]
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        StopFlag.asked = True  # from now on the step itself ignores stop signals
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        for rank in range(count):
            environment = {**threads, **os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C reaches each process once, through pass_on.
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        while any(process.poll() is None for process in processes):
            codes = [process.poll() for process in processes]
            if any(code not in (None, 0, EXIT_AGAIN) for code in codes):
                time.sleep(2)  # the first process may still be saying what is wrong
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in old.items():
            signal.signal(number, handler)
    codes = [process.wait() for process in processes]
    if any(code not in (0, EXIT_AGAIN) for code in codes):
        raise KestrelError(f"a training process failed (exit codes {codes}); its message stands above")
    if EXIT_AGAIN in codes:
        raise RunAgain(f"the {count} training processes were stopped, the state is saved")
