"""Training in two processes agrees with training in one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_kit import OPTIONS, PHASE, train_as_rank
from train_kit import make_job, make_spotter, quick_draw, run, write_features

from kestrel.store import checkpoint
from kestrel.train import loop
from kestrel.train.ranks import Ranks

STEPS = 23  # of batches of 8; 73 clips leave batches of one clip, so one process has none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    write_features(path / "train.h5", 73, seed=1)
    write_features(path / "validation.h5", 41, seed=2)
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train_in_two(folder: Path, out_dir: Path, stop_at: int = 0) -> dict[int, tuple[str, Any]]:
    """What each of two processes answers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "kestrel.train.loop"])
    answers = context.Queue()
    options = (free_port(), STEPS, stop_at, answers)
    processes = [
        context.Process(target=train_as_rank, args=(str(folder), str(out_dir), rank, *options)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return {rank: (kind, value) for rank, kind, value in found}


def test_alone_everything_is_a_no_op() -> None:
    with Ranks(torch.device("cpu")) as ranks:
        assert ranks.first and ranks.on_first(lambda: 5) == 5
        weight = torch.nn.Parameter(torch.ones(2))
        values = torch.arange(3.0)
        assert ranks.sum_gradients([weight], values) is values and weight.grad is None


LEFT = """
import os, torch
from kestrel.train.ranks import Ranks
weight = torch.nn.Parameter(torch.ones(2))
with Ranks(torch.device("cpu")) as ranks:
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    ranks.sum_gradients([weight], torch.ones(1))
    optimizer.step()
    ranks.on_first(lambda: 5)
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print([name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_no_thread_of_the_group_outlives_it() -> None:
    """A thread that frees a tensor while Python ends aborts the process."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEFT],
            env={**os.environ, **group, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=100)[0] for process in processes] == ["[]\n", "[]\n"]
    assert [process.returncode for process in processes] == [0, 0]


def test_two_processes_agree_with_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "draw_curves", quick_draw)
    alone = make_spotter(seed=0, **OPTIONS)
    alone.net.project = lambda: None  # type: ignore[method-assign]
    job = make_job(tmp_path / "one", phase={**PHASE, "steps": STEPS}, shared={"batch_size": 8})
    run(folder, job, spotter=alone)

    stopped = train_in_two(folder, tmp_path / "two", stop_at=9)  # the other one hears of it in the next update
    assert stopped == {
        0: ("RunAgain", "stopped by another process at step 10 of 23, the state is saved"),
        1: ("RunAgain", "stopped by test at step 10 of 23, the state is saved"),
    }
    assert checkpoint.load(tmp_path / "two" / "last.pt")["step"] == 10
    done = train_in_two(folder, tmp_path / "two")
    assert done[0] == done[1] and done[0][0] == "done"
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(torch.tensor(done[0][1][name]), value, rtol=1e-4, atol=1e-5)
    one, two = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for row, other in zip(one[1:], two[1:], strict=True):
        numbers = [[float(cell) for cell in text.replace("pretrain", "0").split(",")] for text in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def test_all_processes_stop_at_a_number_that_is_not_finite(folder: Path, tmp_path: Path) -> None:
    write_features(tmp_path / "train.h5", 73, seed=1, poison=20)
    (tmp_path / "validation.h5").write_bytes((folder / "validation.h5").read_bytes())
    answers = train_in_two(tmp_path, tmp_path / "out")
    for kind, text in answers.values():
        assert kind == "KestrelError" and "the loss is not finite at step" in text
    assert "s020_nohash_0" in answers[0][1]


def test_all_processes_are_refused_together(folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, phase={"epochs": 0})
    job.identity = {**job.identity, "config_hash": "1" * 64}
    run(folder, job)
    answers = train_in_two(folder, tmp_path)
    assert {kind for kind, _ in answers.values()} == {"KestrelError"}
    assert all("another configuration" in text for _, text in answers.values())
