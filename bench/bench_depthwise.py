"""Depthwise convolution (forward and backward) on the CPU: kestrel.nn.depthwise against PyTorch's layouts.

    python bench/bench_depthwise.py [--batch 100 --threads 1 --rounds 7]

Variants take turns in every round; ratios are medians of the ratios within a round, to PyTorch's contiguous default.
With --threads 1 processor time is measured, which other programs change less. `toeplitz` is what kestrel.nn.depthwise does
with small maps where the native kernels are not built, `here` are these, for an image that comes in their layout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from kestrel.nn.channel_major import batch_last, channels_last
from kestrel.nn.depthwise import depthwise_conv2d, output_size, toeplitz_conv2d
from kestrel.train.device import keep_memory

# (channels, height, width, kernel, stride): the search space of proxylessnas_kws at widths 0.75, 1 and expansion 6
SIZES = (
    *((56, 5, 13, kernel, 1) for kernel in (7, 5, 3)),
    *((72, 5, 13, kernel, 1) for kernel in (7, 5, 3)),
    *((432, 5, 13, kernel, 1) for kernel in (7, 5, 3)),
    (72, 10, 26, 7, 2),
    (72, 10, 13, 7, 1),
    (72, 20, 13, 7, 1),
)


def steps(
    batch: int, channels: int, height: int, width: int, kernel: int, stride: int
) -> dict[str, Callable[[], None]]:
    """One forward and backward pass of each variant."""
    torch.manual_seed(0)
    weight = torch.randn(channels, 1, kernel, kernel, requires_grad=True)
    s, p = (stride, stride), (kernel // 2, kernel // 2)
    rows, columns = output_size((height, width), (kernel, kernel), s, p)
    x, grad = torch.randn(batch, channels, height, width), torch.randn(batch, channels, rows, columns)

    def major(y: torch.Tensor) -> torch.Tensor:
        return y.transpose(0, 1).contiguous().transpose(0, 1)

    def torch_conv(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(y, w, None, s, p, 1, channels)

    ways: dict[str, tuple[Callable, Callable]] = {
        "contiguous": (torch.Tensor.contiguous, torch_conv),
        "channels_last": (channels_last, torch_conv),
        "toeplitz": (major, lambda y, w: toeplitz_conv2d(y, w, s, p)),
        "here": (batch_last, lambda y, w: depthwise_conv2d(y, w, s, p)),
    }

    def step(layout: Callable, apply: Callable) -> Callable[[], None]:
        image, wanted = layout(x).requires_grad_(), layout(grad)
        return lambda: torch.autograd.grad(apply(image, weight), (image, weight), wanted) and None

    return {name: step(*way) for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Depthwise convolutions of small maps, ratios to PyTorch's default.")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()  # as in training: else all variants wait for fresh pages
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(
        f"torch {torch.__version__}, batch {args.batch}, {args.threads} thread(s), {args.rounds} rounds, forward + backward"
    )
    print("| C x H x W, kernel, stride | contiguous ms | channels_last | toeplitz | here |")
    print("|---|--:|--:|--:|--:|")
    for size in SIZES:
        ways = steps(args.batch, *size)
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name, step in ways.items():
                began = clock()
                step()
                if turn:  # the first round warms up
                    spent[name].append(clock() - began)
        base = spent["contiguous"]
        ratios = {
            name: statistics.median(b / t for b, t in zip(base, times, strict=True)) for name, times in spent.items()
        }
        channels, height, width, kernel, stride = size
        cells = " | ".join(f"{ratios[name]:.1f}x" for name in ("channels_last", "toeplitz", "here"))
        label = f"{channels} x {height} x {width}, {kernel} x {kernel}, {stride}"
        print(f"| {label} | {1000 * statistics.median(base):.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
