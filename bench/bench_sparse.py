"""Products of changes against dense ones: 512 LSTM units with 16 inputs (2048 x 528), batch 1, one thread.

    python bench/bench_sparse.py [--rounds 40] [--out FOLDER]

y = m + W d of the C runtime (`kestrel_accumulate`), the search for changes included, with W stored dense (`columns`), as balanced
columns (CBCSC: 16 lanes, each with the same number of weights in each column), and in groups of 16 and 64 rows. Against it
y = W x: the plain loop of C, the runtime's own dense kernel (`kestrel_matmul`, int8), and onnxruntime's MatMulInteger of uint8
with int8, its fastest. Changes and weights are random; changes lie at -127..127. Every candidate is compared with numpy
before it is timed. Candidates take turns; given are medians of processor time, and medians of the ratios within a
round. onnxruntime is called from Python with bound buffers; what an Identity takes in the same way is subtracted.

Writes sparse.md (also printed) and sparse.png to FOLDER.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import onnx
import onnxruntime
from matplotlib import pyplot as plt
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_c_runtime import FLAGS, KERNELS, processor, session, vector_sets

from kestrel.export.c_pack import Packed, pack_rows
from kestrel.store.atomic import write_text

RUNTIME = Path(__file__).parents[1] / "runtime"
OUTPUTS, WIDTH = 2048, 528
VECTORS = 48  # different changes per round
KINDS = {"KESTREL_DIRECT": 0, "KESTREL_SPARSE": 7, "KESTREL_BALANCED": 8, "KESTREL_GROUPS": 9}  # enum of kestrel.h
TEMPORAL = (0.0, 0.5, 0.8, 0.9, 0.95, 0.975)
SPATIAL = (0.0, 0.5, 0.75, 0.875, 0.9375, 0.96875)
CHANGES, WEIGHTS = 0.9, 0.9375  # the sparsities of the paper's hardware
PLAIN, NATIVE, ORT = "plain loop, -O3", "plain loop, -O3 -march=native", "onnxruntime MatMulInteger"
LAYOUTS = {
    "columns": ("int8", 1),
    "balanced": ("balanced", 1),
    "groups of 16": ("groups", 16),
    "groups of 64": ("groups", 64),
}
Times = dict[str, np.ndarray]


class Library:
    """The runtime and sparse_driver.c, compiled with further `flags`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        path = folder / f"sparse{len(flags)}.so"
        sources = [RUNTIME / "src" / name for name in KERNELS]
        command = ["gcc", *FLAGS, "-DKESTREL_SIMD", f"-I{RUNTIME / 'include'}", "-shared", "-fPIC", "-o", path]
        subprocess.run([*command, *flags, Path(__file__).with_name("sparse_driver.c"), *sources], check=True)
        self.c = ctypes.CDLL(str(path))
        self.c.timed.restype = ctypes.c_double
        for name in ("make_plain", "make_dense", "make_changes"):
            getattr(self.c, name).restype = ctypes.c_void_p
        self._held: list[np.ndarray] = []

    def forget(self) -> None:
        """Let go of all weights; no candidate may be used any more."""
        self._held.clear()

    def _pointer(self, array: np.ndarray) -> ctypes.c_void_p:
        self._held.append(array)
        return ctypes.c_void_p(array.ctypes.data)

    def dense(self, weights: np.ndarray, isa: str | None) -> ctypes.c_void_p:
        """The plain loop (None) or kestrel_matmul; weights int8 [outputs, width]."""
        data = self._pointer(np.ascontiguousarray(weights, np.int8))
        make = self.c.make_plain if isa is None else self.c.make_dense
        return ctypes.c_void_p(make(*([] if isa is None else [isa.encode()]), data, *weights.shape))

    def changes(self, weights: np.ndarray, storage: str, isa: str) -> tuple[ctypes.c_void_p, Packed]:
        """kestrel_accumulate, and its columns; weights [outputs, width]."""
        packed = pack_rows(weights.T, storage)
        data = self._pointer(np.ascontiguousarray(packed.array))
        numbers = KINDS[packed.kind], packed.lanes, packed.row_bytes, packed.bitmap_bytes
        return ctypes.c_void_p(self.c.make_changes(isa.encode(), data, *numbers, *weights.shape)), packed

    def answer(self, candidate: ctypes.c_void_p, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        """y of the first of x, d [vectors, width]."""
        y = np.zeros(OUTPUTS, np.int32)
        self.c.answer(candidate, *(ctypes.c_void_p(array.ctypes.data) for array in (y, x, d)))
        return y

    def time(self, candidate: ctypes.c_void_p, x: np.ndarray, d: np.ndarray) -> float:
        """Microseconds per vector."""
        y = np.zeros(OUTPUTS, np.int32)
        return self.c.timed(candidate, *(ctypes.c_void_p(array.ctypes.data) for array in (y, x, d)), len(x)) / 1000


def weights_of(rng: np.random.Generator, sparsity: float, group: int) -> np.ndarray:
    """int8 [outputs, width]: 16 lanes keep the same number of weights of each column, or a column keeps groups of rows."""
    lanes = 16 if group == 1 else 1
    local = OUTPUTS // lanes // group
    keep = round((1 - sparsity) * local)
    mask = rng.random((local, lanes, WIDTH)).argsort(axis=0) < keep
    values = rng.choice([-1, 1], (OUTPUTS, WIDTH)) * rng.integers(1, 128, (OUTPUTS, WIDTH))
    return values * np.repeat(mask.reshape(-1, WIDTH), group, axis=0)


def changes_of(rng: np.random.Generator, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
    """int8 and int16 [vectors, width] of the same changes; each vector has the same number of zeros."""
    values = rng.choice([-1, 1], (VECTORS, WIDTH)) * rng.integers(1, 128, (VECTORS, WIDTH))
    values[rng.random((VECTORS, WIDTH)).argsort(axis=1) < round(sparsity * WIDTH)] = 0
    return values.astype(np.int8), values.astype(np.int16)


class Onnx:
    """MatMulInteger, uint8 with int8, and an Identity of the same input, buffers bound."""

    def __init__(self, weights: np.ndarray, folder: Path) -> None:
        x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, WIDTH])
        y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, OUTPUTS])
        same = helper.make_tensor_value_info("y", TensorProto.UINT8, [1, WIDTH])
        held = onnx.numpy_helper.from_array(np.ascontiguousarray(weights.T, np.int8), "w")
        graphs = {
            "product": helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g", [x], [y], [held]),
            "nothing": helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [same]),
        }
        self.bound = {}
        for name, graph in graphs.items():
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
            onnx.save(model, folder / f"{name}.onnx")
            run = session(folder / f"{name}.onnx")
            self.bound[name] = run, run.io_binding()

    def answer(self, x: np.ndarray) -> np.ndarray:
        """W x + 128 W 1 of the first of x int8 [vectors, width]."""
        for _, binding in self.bound.values():
            binding.bind_cpu_input("x", np.ascontiguousarray((x[:1].astype(np.int16) + 128).astype(np.uint8)))
            binding.bind_output("y")
        run, binding = self.bound["product"]
        run.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0][0]

    def time(self) -> float:
        """Microseconds of a product, without what a call takes."""
        took = []
        for run, binding in self.bound.values():
            run.run_with_iobinding(binding)
            start = time.thread_time()
            for _ in range(VECTORS):
                run.run_with_iobinding(binding)
            took.append(1e6 * (time.thread_time() - start) / VECTORS)
        return took[0] - took[1]


@dataclass
class Bench:
    """Measurements of one machine."""

    library: Library
    native: Library
    folder: Path
    rounds: int
    isas: tuple[str, ...]  # the best last

    def measure(
        self, temporal: float, sparsity: float, isas: Sequence[str], whole: bool = False
    ) -> tuple[Times, dict[str, int]]:
        """Times [rounds] of all candidates, and bytes of the layouts. `whole`: with what needs no changes, all of it."""
        rng = np.random.default_rng(0)
        x, d = changes_of(rng, temporal)
        weights = {group: weights_of(rng, sparsity, group) for group in (1, 16, 64)}
        products = {group: found @ d[0].astype(np.int64) for group, found in weights.items()}
        calls: dict[str, Callable[[], float]] = {}
        sizes: dict[str, int] = {}

        def enter(name: str, library: Library, candidate: ctypes.c_void_p, group: int = 1) -> None:
            if (library.answer(candidate, x, d) != products[group]).any():
                raise SystemExit(f"{name} computes something else")
            calls[name] = lambda: library.time(candidate, x, d)

        enter(PLAIN, self.library, self.library.dense(weights[1], None))
        if whole:
            enter(NATIVE, self.native, self.native.dense(weights[1], None))
        for isa in isas:
            enter(f"dense, {isa}", self.library, self.library.dense(weights[1], isa))
            for name, (storage, group) in LAYOUTS.items():
                candidate, packed = self.library.changes(weights[group], storage, isa)
                sizes[name] = packed.array.nbytes
                enter(f"{name}, {isa}", self.library, candidate, group)
        if whole:
            other = Onnx(weights[1], self.folder)
            if (other.answer(x) != products[1] + 128 * weights[1].sum(1)).any():
                raise SystemExit("onnxruntime computes something else")
            calls[ORT] = other.time
        times = [[call() for call in calls.values()] for _ in range(self.rounds)]
        self.library.forget()
        return dict(zip(calls, np.array(times).T, strict=True)), sizes


def ratio(times: Times, slow: str, fast: str) -> float:
    """How many times as fast `fast` is, median over rounds."""
    return float(np.median(times[slow] / times[fast]))


def tables(bench: Bench) -> str:
    """All candidates at the sparsities of the paper's hardware, and at 95 % of changes."""
    best = f"dense, {bench.isas[-1]}"
    lines = []
    for temporal in (CHANGES, 0.95):
        times, sizes = bench.measure(temporal, WEIGHTS, bench.isas, whole=True)
        lines += [
            f"\nTemporal sparsity {temporal:.0%}, weight sparsity {WEIGHTS:.2%}; how many times as fast as ...:\n",
            f"| candidate | microseconds | {PLAIN} | {NATIVE} | {best} | {ORT} | bytes of weights |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for name, took in times.items():
            ratios = " | ".join(f"{ratio(times, base, name):.1f}" for base in (PLAIN, NATIVE, best, ORT))
            size = sizes.get(name.split(",")[0], OUTPUTS * WIDTH)
            lines.append(f"| {name} | {np.median(took):.2f} | {ratios} | {size:,} |")
    return "\n".join(lines) + "\n"


def curves(bench: Bench, path: Path) -> str:
    """Speed-up against each sparsity, as a picture and a table."""
    isa = bench.isas[-1]
    panels = [("temporal sparsity", TEMPORAL, [(t, WEIGHTS) for t in TEMPORAL], f"weight sparsity {WEIGHTS:.2%}"),
              ("weight sparsity", SPATIAL, [(CHANGES, s) for s in SPATIAL], f"temporal sparsity {CHANGES:.0%}")]  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    lines = []
    for axis, (label, ticks, points, title) in zip(axes, panels, strict=True):
        found = [bench.measure(*point, ("portable", isa))[0] for point in points]
        rows = {name: [ratio(t, f"dense, {isa}", f"{name}, {isa}") for t in found] for name in LAYOUTS}
        rows["balanced, portable (against the plain loop)"] = [ratio(t, PLAIN, "balanced, portable") for t in found]
        theory = [1 / ((1 - t) * (1 - s)) for t, s in points]
        x = [-np.log2(1 - tick) for tick in ticks]
        axis.plot(x, theory, "k--", label="operations left out (theory)")
        axis.plot(x, [1 / (1 - t) for t, _ in points], "k:", label="by temporal sparsity alone")
        for name, values in rows.items():
            own = name.endswith(")")
            axis.plot(x, values, marker="o", color="0.55" if own else None, label=name if own else f"{name}, {isa}")
        axis.set(xlabel=label, title=title, xticks=x, xticklabels=[f"{100 * tick:g} %" for tick in ticks], yscale="log")
        axis.axhline(1, color="0.8", zorder=0)
        axis.grid(alpha=0.3, which="both")
        lines += [f"\n{title[0].upper()}{title[1:]}, {isa}; how many times as fast as dense, {isa}:\n",
                  f"| {label} | theory | " + " | ".join(rows) + " |", "|--:" * (len(rows) + 2) + "|"]  # fmt: skip
        for place, tick in enumerate(ticks):
            shown = " | ".join(f"{values[place]:.2f}" for values in rows.values())
            lines.append(f"| {100 * tick:g} % | {theory[place]:.1f} | {shown} |")
    axes[0].set_ylabel(f"speed-up over the dense kernel, {isa}")
    axes[0].legend(fontsize=7.5, loc="upper left")
    figure.savefig(path, dpi=130)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="times that the candidates take turns")
    parser.add_argument("--out", type=Path, default=Path("exp/bench"), help="folder of sparse.md and sparse.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        isas = ("portable", *vector_sets())
        bench = Bench(Library(folder), Library(folder, "-march=native"), folder, options.rounds, isas)
        text = (
            f"# {__doc__.splitlines()[0]}\n\n    {shlex.join(['python', 'bench/bench_sparse.py', *sys.argv[1:]])}\n\n"
            f"{processor()[0]}; {compiler}, {' '.join(FLAGS)}; onnxruntime {onnxruntime.__version__}; load "
            f"{os.getloadavg()[0]:.1f}. Only ratios count; bench_sparse.py says what is measured.\n"
        )
        text += tables(bench) + curves(bench, options.out / "sparse.png")
    write_text(options.out / "sparse.md", text)
    print(text)


if __name__ == "__main__":
    main()
