"""Run as a script: start processes that save, kill them at random times, check what is left (see the checkpoint tests)."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kestrel.store import checkpoint


def save_for_ever(path: Path, version: int, ready: int) -> None:
    """Save versions of a content whose parts belong together; a byte on the pipe `ready` tells that one is written."""
    while True:
        version += 1
        checkpoint.save(path, {"version": version, "parts": [torch.full((50_000,), version) for _ in range(4)]})
        os.write(ready, b".")


def kill_and_check(folder: Path, times: int) -> tuple[int, int]:
    """Kill a saving process `times` times; how many left a temporary file, and how many different numbers of saves."""
    path, draw, version, left = folder / "last.pt", random.Random(1), 0, 0
    saves: set[int] = set()
    for _ in range(times):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(path, version, writer)
        os.read(reader, 1)
        time.sleep(draw.uniform(0.0, 0.015))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        content = checkpoint.load(path)
        assert content["version"] > version
        assert all((part == content["version"]).all() and len(part) == 50_000 for part in content["parts"])
        saves.add(content["version"] - version)
        version = content["version"]
        for stale in folder.glob(".tmp-*"):
            stale.unlink()
            left += 1
    return left, len(saves)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process with worker threads must not be forked
    print(*kill_and_check(Path(sys.argv[1]), int(sys.argv[2])))
