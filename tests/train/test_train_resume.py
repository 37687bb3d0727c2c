"""Training in processes of its own, stopped and killed at random: the end is that of a straight run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from train_kit import contents, make_job, quick_draw, run, train_in_process, write_features

from kestrel.store import checkpoint
from kestrel.train import loop

PAUSE = 0.004  # seconds before each batch, so that signals meet every part of the loop


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """A process that has torch loaded and makes new ones quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "kestrel.train.loop"])
    return context


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    write_features(path / "train.h5", 73, seed=1)
    write_features(path / "validation.h5", 41, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", quick_draw)
        for stage in ("pretrain", "retrain"):
            run(path, make_job(path / stage, stage))
    return path


def exit_codes(
    server: ForkServerContext, folder: Path, out_dir: Path, stage: str, number: int, shared: dict, times: int
) -> list[int]:
    """Start training until it ends by itself, sending `number` twice at random times to the first `times` starts."""
    draw, codes = random.Random(f"{stage} {number}"), [1]
    while codes[-1] != 0:
        ready, sent = server.Event(), out_dir.with_name(f"{out_dir.name} sent {len(codes)}")
        arguments = (str(folder), str(out_dir), stage, shared, PAUSE, ready, str(sent))
        process = server.Process(target=train_in_process, args=arguments)
        process.start()
        if len(codes) <= times:
            assert ready.wait(60)
            for _ in range(2):
                time.sleep(draw.uniform(0.0, 0.1))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)
        sent.touch()
        process.join(60)
        assert process.exitcode is not None, "training neither stopped nor ended"
        codes.append(process.exitcode)
        if (out_dir / "last.pt").exists():
            checkpoint.load(out_dir / "last.pt")  # complete, whatever happened
    return codes[1:]


@pytest.mark.parametrize(
    ("stage", "number", "workers"),
    [
        ("pretrain", signal.SIGTERM, 0),
        ("retrain", signal.SIGUSR1, 0),
        ("pretrain", signal.SIGINT, 2),
    ],
)
def test_stopped_by_signals(
    server: ForkServerContext, folder: Path, tmp_path: Path, stage: str, number: int, workers: int
) -> None:
    codes = exit_codes(server, folder, tmp_path, stage, number, {"workers": workers}, times=8)
    assert set(codes) == {0, 75}
    assert contents(tmp_path) == contents(folder / stage)


def test_killed_at_random(server: ForkServerContext, folder: Path, tmp_path: Path) -> None:
    """With a save after every batch most kills meet a save."""
    codes = exit_codes(server, folder, tmp_path, "retrain", signal.SIGKILL, {"save_minutes": 0.0}, times=15)
    assert codes.count(-signal.SIGKILL) >= 5
    assert contents(tmp_path) == contents(folder / "retrain")
    assert not list(tmp_path.glob(".tmp-*"))  # what killed saves left is removed
