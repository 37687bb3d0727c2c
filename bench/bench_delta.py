"""Training step (forward and backward) of delta cells: time against torch.nn.LSTM and GRU, and memory.

    python bench/bench_delta.py [--batch 64 --frames 62 --inputs 16 --hidden 256 --threshold 0.1 --threads 1 --rounds 15]

Variants take turns in every round, so that a machine whose speed drifts treats them alike; ratios are medians of the ratios
within a round. With --threads 1 processor time is measured, which other programs change less. A process of its own per
row measures memory: the growth of the peak resident set over two steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kestrel.nn.delta import DeltaGRU, DeltaLSTM

CELLS = {"LSTM": (nn.LSTM, DeltaLSTM), "GRU": (nn.GRU, DeltaGRU)}
DENSE, FAST, ZERO, PLAIN = "torch.nn", "delta, fast", "delta, fast, threshold 0", "delta, frame by frame"


def step_of(args: argparse.Namespace, kind: str, row: str) -> Callable[[], None]:
    """One training step of a row."""
    torch.manual_seed(0)
    dense, delta = CELLS[kind]
    x = torch.randn(args.batch, args.frames, args.inputs)
    if row == DENSE:
        layer = dense(args.inputs, args.hidden, batch_first=True)
    else:
        threshold = 0.0 if row == ZERO else args.threshold
        layer = delta(args.inputs, args.hidden, 1, threshold, threshold)

    def step() -> None:
        layer.zero_grad()
        h = layer(x)[0] if row == DENSE else layer(x, path="plain" if row == PLAIN else "fast").h
        h.square().mean().backward()

    return step


def _peak() -> float:
    """Peak resident set of this process in KiB."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak starts anew with the program
        return float(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)


def peak_growth(args: argparse.Namespace, kind: str, row: str) -> float:
    """Growth in MiB of this process's peak resident set over two steps."""
    torch.set_num_threads(args.threads)
    small = argparse.Namespace(**{**vars(args), "batch": 2, "frames": 2})
    step_of(small, kind, row)()  # libraries are loaded
    step = step_of(args, kind, row)
    before = _peak()
    step()
    step()
    return (_peak() - before) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name, default in (
        ("batch", 64),
        ("frames", 62),
        ("inputs", 16),
        ("hidden", 256),
        ("threads", 1),
        ("rounds", 15),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threshold", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for kind in CELLS:
        steps = {row: step_of(args, kind, row) for row in (DENSE, FAST, ZERO, PLAIN)}
        times: dict[str, list[float]] = {row: [] for row in steps}
        for round_ in range(args.rounds + 2):
            for row, step in steps.items():
                began = clock()
                step()
                if round_ > 1:
                    times[row].append(1e3 * (clock() - began))
        for row, measured in times.items():
            ratio = statistics.median(mine / dense for mine, dense in zip(measured, times[DENSE], strict=True))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory = pool.apply(peak_growth, (args, kind, row))
            print(
                f"{kind:5}{row:26}{statistics.median(measured):8.1f} ms (best {min(measured):6.1f}), "
                f"{ratio:5.2f} x torch.nn, {memory:6.0f} MiB"
            )


if __name__ == "__main__":
    main()
