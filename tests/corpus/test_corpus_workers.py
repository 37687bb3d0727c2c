"""Worker processes: results, a killed parent, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kestrel.corpus.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import os, sys, time
sys.path.insert(0, {root!r})
from kestrel.corpus.workers import WorkerPool

def work(number):
    print(os.getpid(), flush=True)
    time.sleep(0.5 if number < 0 else 120)

if __name__ == "__main__":
    with WorkerPool(2) as pool:
        list(pool.map(work, {numbers!r}))
"""


def start(folder: Path, numbers: list[int]) -> tuple[subprocess.Popen[str], list[int]]:
    """A parent in a process group of its own, and the ids of its two workers once they work."""
    path = folder / "parent.py"
    path.write_text(PARENT.format(root=str(ROOT), numbers=numbers))
    parent = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    return parent, [int(parent.stdout.readline()) for _ in range(2)]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("tasks", [None, 1])
def test_results_come_in_order(tasks: int | None) -> None:
    with WorkerPool(2, max_tasks_per_child=tasks) as pool:
        assert list(pool.map(abs, range(-3, 3))) == [3, 2, 1, 0, 1, 2]


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    parent, workers = start(tmp_path, [1, 2])
    assert len(set(workers)) == 2 and all(alive(worker) for worker in workers)
    parent.kill()
    parent.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_parent_alone_answers_ctrl_c(tmp_path: Path) -> None:
    parent, _ = start(tmp_path, [-1, -2])
    os.killpg(parent.pid, signal.SIGINT)
    _, said = parent.communicate(timeout=30)
    assert parent.returncode == -signal.SIGINT
    assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt")
