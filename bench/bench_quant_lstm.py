"""Training step (forward and backward) of the quantised LSTM: time against the plain loop and nn.LSTM, and memory.

    python bench/bench_quant_lstm.py [--blocks 4 --hidden 108 --inputs 40 --batch 100 --steps 50 --threads 2 --rounds 7]

Rows: the plain loop (the specification's arithmetic, one PyTorch operator after the other), the pure PyTorch path, the C++
path, and torch.nn.LSTM of equal multiply-adds (as many LSTMs as blocks, and a single wider one). Variants take turns in
every round, so that a machine whose speed drifts treats them alike; times are medians. With --threads 1 processor time is
measured, which other programs on the machine hardly change. A process of its own per row measures memory: the growth of the
peak resident set over the first steps.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kestrel.nn import native
from kestrel.nn.cell import RANGES, Bits, Cell, plain_lstm
from kestrel.nn.crossbar import Device, draw_noise
from kestrel.nn.fused import fused_lstm

DEVIATION = 0.02  # of the weight noise: 0.1 max_w


def problem(args: argparse.Namespace) -> tuple[Tensor, Cell, Tensor]:
    """Input, cell and gradient of the last hidden state, with the paper's initial ranges (input range 4).

    The input is normal with deviation 1.5, so that 0.8 % of it is clipped, as of features with a learned range.
    """
    torch.manual_seed(0)
    blocks, hidden, inputs = args.blocks, args.hidden, args.inputs
    ranges = torch.tensor(list(RANGES.values())).view(-1, 1).repeat(1, blocks)
    ranges[0] = 4.0
    tensors = [
        torch.empty(blocks, inputs, 4 * hidden).uniform_(-1, 1) / math.sqrt(inputs),
        torch.empty(blocks, hidden, 4 * hidden).uniform_(-1, 1) / math.sqrt(hidden),
        torch.zeros(blocks, 4 * hidden),
        torch.ones(blocks, 4 * hidden),
        ranges,
    ]
    cell = Cell(*(tensor.requires_grad_() for tensor in tensors), Bits(4, 6, 8), Device())
    x = torch.randn(args.batch, args.steps, inputs) * 1.5
    return x, cell, torch.randn(blocks, args.batch, hidden)


def equal_hidden(blocks: int, hidden: int, inputs: int) -> int:
    """Units of a single LSTM whose multiply-adds are nearest to those of the blocks."""
    wanted = blocks * hidden * (inputs + hidden)
    return round((-inputs + math.sqrt(inputs**2 + 4 * wanted)) / 2)


def variants(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """One training step of each row of the table."""
    x, cell, grad = problem(args)
    parameters = (cell.w_ih, cell.w_hh, cell.b_ih, cell.b_hh, cell.ranges)
    weights = {"ih": (cell.w_ih.detach(), cell.b_ih.detach()), "hh": (cell.w_hh.detach(), cell.b_hh.detach())}
    noisy = Cell(*parameters, cell.bits, cell.device, noise=lambda name, _: draw_noise(*weights[name], DEVIATION))

    def ours(path: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            path().backward(grad)

        return step

    def lstm(count: int, hidden: int) -> Callable[[], None]:
        nets = nn.ModuleList(nn.LSTM(args.inputs, hidden, batch_first=True) for _ in range(count))
        last = torch.randn(args.batch, hidden)

        def step() -> None:
            nets.zero_grad()
            for net in nets:
                net(x)[0][:, -1].backward(last)

        return step

    wide = equal_hidden(args.blocks, args.hidden, args.inputs)
    rows = {
        f"nn.LSTM, {args.blocks} x {args.hidden}": lstm(args.blocks, args.hidden),
        f"nn.LSTM, 1 x {wide}": lstm(1, wide),
        "plain loop": ours(lambda: plain_lstm(x, cell)),
        "plain loop, noise": ours(lambda: plain_lstm(x, noisy)),
        "PyTorch path": ours(lambda: fused_lstm(x, cell)),
        "PyTorch path, noise": ours(lambda: fused_lstm(x, noisy)),
    }
    if native.available():
        rows["C++ path"] = ours(lambda: native.native_lstm(x, cell))
        rows["C++ path, noise"] = ours(lambda: native.native_lstm(x, cell, DEVIATION))
    return rows


def peak() -> float:
    """Peak resident set of this process in KiB."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak starts anew with the program
        return float(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)


def peak_growth(args: argparse.Namespace, name: str) -> float:
    """Growth in MiB of this process's peak resident set over two steps. Run it in a process of its own."""
    torch.set_num_threads(args.threads)
    step = variants(args)[name]
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own buffers
    before = peak()
    for _ in range(2):
        step()
    return (peak() - before) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("blocks", 4), ("hidden", 108), ("inputs", 40), ("batch", 100), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = variants(args)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(args.rounds + 1):  # the first round warms up
        for name, step in rows.items():
            if turn > 3 and name.startswith("plain"):
                continue  # slow enough to be timed well by three rounds
            start = clock()
            step()
            if turn:
                times[name].append(clock() - start)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    reference = min(value for name, value in medians.items() if name.startswith("nn.LSTM"))
    print(
        f"{args.blocks} blocks x {args.hidden} units, {args.inputs} inputs, batch {args.batch}, {args.steps} steps, "
        f"{args.threads} threads ({'processor' if args.threads == 1 else 'wall'} time); torch {torch.__version__}, {platform.machine()}; forward and backward"
    )
    print(f"{'':24}{'ms':>8}{'min':>8}{'plain / it':>12}{'it / nn.LSTM':>14}{'peak MiB':>10}")
    for name, median in medians.items():
        plain = medians["plain loop, noise" if name.endswith("noise") else "plain loop"]
        memory = ""
        if not args.no_memory:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory = f"{pool.apply(peak_growth, (args, name)):.0f}"
        shortest = min(times[name]) * 1e3
        print(f"{name:24}{median:8.1f}{shortest:8.1f}{plain / median:12.2f}{median / reference:14.2f}{memory:>10}")
    print("it / nn.LSTM: against the faster nn.LSTM row")


if __name__ == "__main__":
    main()
