"""Target of the test processes that train together, as torchrun would start them."""

from __future__ import annotations

import os
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from train_kit import make_job, make_spotter, quick_draw, run

from kestrel.errors import KestrelError, RunAgain
from kestrel.train import loop
from kestrel.train.signals import StopFlag

PHASE = {"validate_every": 5, "grad_clip": 0.5}
OPTIONS = {"noise": 0.0, "drop": 0.0, "norm": False}


def train_as_rank(folder: str, out_dir: str, rank: int, port: int, steps: int, stop_at: int, answers: Queue) -> None:
    """Train as process `rank` of two; process 1 alone is asked to stop during update `stop_at` (0: never).

    Puts (rank, "done" with the weights, or the error's name and text) into `answers`.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    loop.draw_curves = quick_draw
    torch.set_num_threads(1)
    stop, updates = StopFlag(), [0]
    spotter = make_spotter(seed=rank, **OPTIONS)  # process 0's weights count

    def after_update() -> None:
        updates[0] += 1
        if rank == 1 and updates[0] == stop_at:
            stop.set("test")

    spotter.net.project = after_update  # type: ignore[method-assign]
    job = make_job(Path(out_dir), phase={**PHASE, "steps": steps}, shared={"batch_size": 8})
    try:
        run(Path(folder), job, spotter=spotter, stop=stop)
        answers.put((rank, "done", {name: value.tolist() for name, value in spotter.state_dict().items()}))
    except (KestrelError, RunAgain) as error:
        answers.put((rank, type(error).__name__, str(error)))
