"""Steps of an architecture search, and of training what it found, on the CPU.

    python bench/bench_search.py [--batch 100 --threads 1 --rounds 5 --net wm0.75_5]

1. A training step of the super-network of recipe proxylessnas_kws (width 1, 12 blocks) against the same step of the sampled
   path as a network of its own, and an update of alphas by each gradient mode, in the same unit.
2. Memory of an update of alphas by `full` and by `full_v2`: growth of the peak resident set, a process of its own per row.
3. A training step of a published network against the straightforward modules (nn.Conv2d, nn.BatchNorm2d, nn.ReLU6).

Variants take turns in every round; ratios are medians of the ratios within a round. With --threads 1 processor time is
measured, which other programs change less.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kestrel.frontend.post import Post
from kestrel.models.architecture import Architecture, to_data
from kestrel.models.proxyless import SuperNet
from kestrel.models.spotter import KeywordSpotter
from kestrel.recipe import proxylessnas_kws as recipe
from kestrel.settings import build
from kestrel.train.data import Split
from kestrel.train.loop import Job
from kestrel.train.ranks import Ranks
from kestrel.train.search import Search
from kestrel.train.spec import PhaseSpec, TrainSpec

SHAPE, CLASSES = (49, 10), 12


class Straight(nn.Module):
    """A network of the space of PyTorch's own modules, in floating point."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        size = (SHAPE[1], SHAPE[0])

        def unit(layer: Any, last: bool = False) -> nn.Sequential:
            conv = nn.Conv2d(
                layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, groups=layer.groups, bias=False
            )
            norm = nn.BatchNorm2d(layer.outputs, 1e-3)
            return nn.Sequential(conv, norm) if last else nn.Sequential(conv, norm, nn.ReLU6())

        self.first = unit(architecture.first_layer(size))
        self.blocks, self.shortcuts = nn.ModuleList(), []
        sizes = architecture.sizes(size)
        for place, choice, at in zip(architecture.places(), architecture.choices(), sizes, strict=False):
            layers = place.layers(choice, at)
            if layers:
                self.blocks.append(nn.Sequential(*map(unit, layers[:-1]), unit(layers[-1], last=True)))
                self.shortcuts.append(place.shortcut)
        mix, linear = architecture.last_layers(sizes[-1], CLASSES)
        self.mix, self.linear = unit(mix), nn.Linear(linear.inputs, linear.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, C]."""
        x = self.first(x.transpose(1, 2).unsqueeze(1))
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = x + block(x) if shortcut else block(x)
        return self.linear(self.mix(x).mean((2, 3)))


def step_of(net: nn.Module, batch: int) -> Callable[[], None]:
    """One training step with SGD of Nesterov's momentum."""
    x, labels = torch.randn(batch, *SHAPE), torch.randint(0, CLASSES, (batch,))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, nesterov=True, weight_decay=4e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step


def measure(ways: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each way in each round; the first round warms up."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = clock()
            way()
            if turn:
                spent[name].append(clock() - began)
    return spent


def ratio(spent: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the time of `name` in the time of `base`."""
    return statistics.median(a / b for a, b in zip(spent[name], spent[base], strict=True))


class _Clips:
    """Random clips in place of a file."""

    classes = [str(number) for number in range(CLASSES)]  # noqa: RUF012

    def __init__(self, clips: int) -> None:
        draw = np.random.default_rng(0)
        self.data = draw.standard_normal((clips, *SHAPE)).astype(np.float32)
        self.shape, self.labels, self.utt_ids = self.data.shape, np.arange(clips) % CLASSES, ["clip"] * clips

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Features of these rows."""
        return self.data[rows]


def search_of(mode: str, batch: int) -> Search:
    """A search of the paper's space on random clips."""
    torch.manual_seed(0)
    settings = {"grad_binary_mode": mode, "target_hardware": "flops", "grad_reg_loss_alpha": 1.0, "warmup_epochs": 0}
    net = recipe.build(build(recipe.ModelSpec, {"search": settings}), SHAPE, CLASSES)
    net.updates_per_epoch = 100
    job = Job("pretrain", PhaseSpec(steps=100), TrainSpec(batch_size=batch), 0, Path(), {})
    with Ranks(torch.device("cpu")) as ranks:
        spotter, split = KeywordSpotter(Post([], SHAPE), net), Split(_Clips(batch), batch_size=batch)
        search = Search(spotter, split, job, 100, ranks, logging.getLogger("bench"))
    net.set_phase("pretrain")
    return search


def update_of(search: Search) -> Callable[[], None]:
    """One update of alphas."""
    batch = search._batch()

    def update() -> None:
        with search._untouched():
            search._by_gates(batch)

    return update


def _peak() -> float:
    return float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def _memory(mode: str, batch: int, threads: int, path: list[int], answer: Any) -> None:
    torch.set_num_threads(threads)
    search = search_of(mode, batch)
    for block, k in zip(search.net.mixed(), path, strict=True):
        block.sample = lambda block=block, k=k: setattr(block, "taken", k)  # type: ignore[method-assign,misc]
    small = search_of(mode, 2)
    update_of(small)()
    before = _peak()
    update_of(search)()
    answer.put(_peak() - before)


def memory(mode: str, args: argparse.Namespace, path: list[int]) -> float:
    """Growth in MiB of the peak resident set over an update of alphas, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_memory, args=(mode, args.batch, args.threads, path, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps of an architecture search, ratios within one run.")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--net", default="wm0.75_5", help="published network")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(f"torch {torch.__version__}, batch {args.batch}, {args.threads} thread(s), {args.rounds} rounds")

    super_net = search_of("full_v2", args.batch).net
    assert isinstance(super_net, SuperNet)
    draw = np.random.default_rng(1)
    path = [int(draw.integers(len(choices))) for choices in super_net.choices]
    super_net.take(path)
    super_net.path_held = True
    alone = super_net.with_structure(to_data(super_net.architecture_of(path)))
    alone.set_phase("pretrain")
    alone.low_bit = super_net.low_bit
    alone._switch()
    ways = {"path alone": step_of(alone, args.batch), "super-network": step_of(super_net, args.batch)}
    for mode in ("full_v2", "full", "two"):
        ways[f"update of alphas, {mode}"] = update_of(search_of(mode, args.batch))
    spent = measure(ways, args.rounds, clock)
    print(f"\npath {super_net.architecture_of(path).text}, {super_net.resources[0].of(path) / 1e6:.1f} M multiply-adds")
    print("| step | ms | in steps of the path alone |\n|---|--:|--:|")
    for name in ways:
        print(f"| {name} | {1000 * statistics.median(spent[name]):.0f} | {ratio(spent, name, 'path alone'):.2f} |")
    print("\n| update of alphas | growth of peak memory, MiB |\n|---|--:|")
    for mode in ("full", "full_v2"):
        print(f"| {mode} | {memory(mode, args, path):.0f} |", flush=True)

    model = build(recipe.ModelSpec, {"net": args.net, "quantise": "never"})
    architecture = recipe.architecture(model)
    assert architecture is not None
    ours, quantised = (
        recipe.build(model, SHAPE, CLASSES),
        recipe.build(build(recipe.ModelSpec, {"net": args.net}), SHAPE, CLASSES),
    )
    for net in (ours, quantised):
        net.set_phase("pretrain")
    straight = Straight(architecture)
    ways = {
        "nn modules": step_of(straight, args.batch),
        "here": step_of(ours, args.batch),
        "here, 8-bit weights and activations": step_of(quantised, args.batch),
    }
    spent = measure(ways, args.rounds, clock)
    print(f"\n{args.net}, {architecture.macs((SHAPE[1], SHAPE[0]), CLASSES) / 1e6:.2f} M multiply-adds")
    print("| training step | ms | speed-up |\n|---|--:|--:|")
    for name in ways:
        print(f"| {name} | {1000 * statistics.median(spent[name]):.0f} | {1 / ratio(spent, name, 'nn modules'):.2f}x |")


if __name__ == "__main__":
    main()
