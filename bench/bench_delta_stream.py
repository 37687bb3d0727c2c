"""Streaming inference of whole delta networks in C: dense, with deltas, with pruned columns, batch 1, one thread.

    python bench/bench_delta_stream.py --features feat/lm [--checkpoint best.pt] [--cell GRU] [--units 256] [--rounds 20]

The generated C of the network, features of test clips in, logits out; the time of a clip is divided by its frames. Weights
are those of a checkpoint of recipe spartus, else random; pruning acts on them without training, so answers of pruned
variants mean nothing, but their time and bits do: every variant is compared with the integer model on all clips. Thresholds are
searched for the wanted temporal sparsity of the unpruned network, the same for inputs and states. Candidates take turns; given are medians of
processor time and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_c_runtime import FLAGS, KERNELS, processor, vector_sets

from kestrel.export.c_files import write_c
from kestrel.export.c_model import CModel, generate
from kestrel.frontend.post import Post
from kestrel.lower.graph import IntegerGraph, Scan, input_codes
from kestrel.lower.ops import DeltaUpdate
from kestrel.lower.spotter import feature_scale_of, lower
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.cbtd import Balance, target_mask
from kestrel.store.checkpoint import from_bytes
from kestrel.store.hdf5 import open_folder

GAMMA = 15 / 16
PRUNED = {"": None, "balanced": Balance(GAMMA, 4), "groups of 64": Balance(GAMMA, 1, 64)}
CLASSES, CLIPS = 12, 24
FIXED = {"qa": 1, "qw": 1, "qc": 1, "qcw": 1}


class Networks:
    """Spotters of the same weights, pruned or not, at any threshold."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        files = open_folder(options.features)
        self.file = files["test"]
        self.scale = feature_scale_of(files["train"])
        self.features = torch.as_tensor(self.file.rows(np.arange(CLIPS)))
        steps = [{"normalise": "channel"}, {"average": 3}]
        self.post = Post(steps, tuple(self.file.shape[1:]))
        self.held = from_bytes(Path(options.checkpoint).read_bytes()) if options.checkpoint else None
        if self.held is not None:
            self.post = Post(self.held["identity"]["post"], tuple(self.file.shape[1:]))
        self.post.fit([torch.as_tensor(files["train"].rows(np.arange(2000)))])

    def spotter(self, threshold: float, balance: Balance | None) -> KeywordSpotter:
        torch.manual_seed(0)
        settings = {"rnn_type": self.options.cell, "rnn_size": self.options.units}
        if self.held is not None:
            own = self.held["identity"]["model"]
            settings = {key: own[key] for key in ("rnn_type", "rnn_size", "rnn_layers") if key in own}
        settings |= FIXED if self.options.fixed else {}
        deltas = {"thx": [threshold], "thh": [threshold], "delta_from": "pretrain"}
        net = DeltaNetwork(input_size=self.post.output_shape[1], classes=CLASSES, **settings, **deltas)
        spotter = KeywordSpotter(self.post, net)
        if self.held is not None:
            spotter.load_state_dict(self.held["model"], strict=not self.options.fixed)
        net.set_phase("pretrain")
        with torch.no_grad():
            for name, weight in net.rnn.named_parameters():
                if balance is not None and weight.dim() == 2:
                    weight.mul_(target_mask(weight, balance, name))
        net.project()
        net.set_phase("eval")
        return spotter.eval()

    def graph(self, threshold: float, balance: Balance | None) -> IntegerGraph:
        return lower(self.spotter(threshold, balance), self.scale)

    def threshold(self, sparsity: float) -> float:
        """What gives the dense network this temporal sparsity, pooled."""
        low, high = 0.0, 4.0
        for _ in range(7):
            middle = (low + high) / 2
            found = zeros_of(self.graph(middle, None), self.codes(middle)[:4])
            low, high = (middle, high) if found < sparsity else (low, middle)
        return (low + high) / 2

    def codes(self, threshold: float) -> np.ndarray:
        graph = self.graph(threshold, None)
        return input_codes(self.features.numpy(), graph.tensors["features"])


def zeros_of(graph: IntegerGraph, codes: np.ndarray) -> float:
    """Share of changes that are 0."""
    trace: dict[str, np.ndarray] = {}
    graph.run(codes, trace=trace)
    made = [trace[op.outputs[0]] for op, _ in graph.all_ops() if isinstance(op, DeltaUpdate)]
    return sum(int((d == 0).sum()) for d in made) / max(1, sum(d.size for d in made))


def kernels(folder: Path) -> list[str]:
    """The runtime, compiled once for all networks."""
    source = Path(__file__).parents[1] / "runtime"
    flags = [*FLAGS, "-DKESTREL_SIMD", "-fPIC", f"-I{source / 'include'}"]
    for name in KERNELS:
        subprocess.run(["gcc", *flags, "-c", source / "src" / name, "-o", folder / f"{name}.o"], check=True)
    return [str(folder / f"{name}.o") for name in KERNELS]


def compiled(
    graph: IntegerGraph, codes: np.ndarray, folder: Path, isa: str, objects: list[str]
) -> tuple[Callable[[], float], CModel]:
    """Microseconds per frame of all clips with one set of kernels, compared with the integer model."""
    model = generate(graph)
    if not (folder / "model.c").exists():
        write_c(model, folder)
    library = folder / f"{isa}.so"
    command = ["gcc", *FLAGS, "-DKESTREL_SIMD", "-shared", "-fPIC", "-o", str(library), "model.c", *objects]
    subprocess.run(command, cwd=folder, check=True)
    os.environ["KESTREL_ISA"] = isa  # is read at the first inference
    run = ctypes.CDLL(str(library)).kestrel_model_run
    clips = np.ascontiguousarray(codes, np.int16)
    logits = np.zeros((len(clips), CLASSES), np.int32)
    rows = [tuple(ctypes.c_void_p(part.ctypes.data) for part in pair) for pair in zip(clips, logits, strict=True)]
    for row in rows:
        run(*row)
    if (logits != graph.run(codes)[graph.outputs[0]]).any():
        raise SystemExit(f"{folder.name}, {isa}: the C model computes something else")
    scan = next(op for op in graph.ops if isinstance(op, Scan))
    frames = len(rows) * graph.tensors[scan.inputs[0]].shape[0]

    def call(held: tuple[np.ndarray, ...] = (clips, logits)) -> float:  # the addresses are theirs
        start = time.thread_time()
        for row in rows:
            run(*row)
        return 1e6 * (time.thread_time() - start) / frames

    return call, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True, help="folder of feature files")
    parser.add_argument("--checkpoint", type=Path, help="of recipe spartus, for these features")
    parser.add_argument("--cell", choices=("GRU", "LSTM"), default="LSTM", help="of random weights")
    parser.add_argument("--units", type=int, default=512, help="of random weights")
    parser.add_argument("--fixed", action="store_true", help="8-bit fixed point")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9], help="temporal sparsities")
    parser.add_argument("--rounds", type=int, default=20, help="times that the candidates take turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = Networks(options)
    isas = ("portable", vector_sets()[-1]) if vector_sets() else ("portable",)
    variants = {("dense", name): (0.0, balance) for name, balance in PRUNED.items()}
    for sparsity in options.sparsity:
        threshold = networks.threshold(sparsity)
        variants |= {(f"deltas ({threshold:.3f})", name): (threshold, balance) for name, balance in PRUNED.items()}
    calls: dict[tuple[str, str], dict[str, Callable[[], float]]] = {}
    facts: dict[tuple[str, str], tuple[float, int]] = {}
    codes = networks.codes(0.0)
    with tempfile.TemporaryDirectory() as name:
        objects = kernels(Path(name))
        for key, (threshold, balance) in variants.items():
            graph = networks.graph(threshold, balance)
            folder = Path(name) / "-".join(key).replace(" ", "_")
            made = {isa: compiled(graph, codes, folder, isa, objects) for isa in isas}
            calls[key] = {isa: call for isa, (call, _) in made.items()}
            model = next(iter(made.values()))[1]
            facts[key] = zeros_of(graph, codes[:8]) if threshold else 0.0, model.sections["weights"]
        times = [[[call() for call in own.values()] for own in calls.values()] for _ in range(options.rounds)]
    array = np.array(times)  # [rounds, variants, kernels]
    shape = networks.spotter(0.0, None).net.rnn
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    print(
        f"    {shlex.join(['python', 'bench/bench_delta_stream.py', *sys.argv[1:]])}\n\n{processor()[0]}; {compiler}; load "
        f"{os.getloadavg()[0]:.1f}. {shape.kind} of {shape.num_layers} x {shape.hidden_size} units.\n\n| network | "
        "weights pruned to 1/16 | temporal sparsity | bytes of weights | "
        + " | ".join(f"{isa}: microseconds per frame | as fast as dense" for isa in isas)
        + " |\n|---|---|--:|--:|"
        + "--:|--:|" * len(isas)
    )
    for place, (network, pruned) in enumerate(calls):
        zeros, size = facts[network, pruned]
        row = [network, pruned or "no", f"{100 * zeros:.1f} %", f"{size:,}"]
        for column in range(len(isas)):
            row += [f"{np.median(array[:, place, column]):.2f}"]
            row += [f"{np.median(array[:, 0, column] / array[:, place, column]):.2f}"]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
