"""Proof that generated C answers like the integer graph: build it, run clips and extreme inputs, compare every bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_files import write_c
from kestrel.export.c_model import CModel
from kestrel.lower.graph import IntegerGraph

Array = np.ndarray
BATCH = 256  # clips per run of a program
RANDOM_CLIPS = 32
SANITISED_CLIPS = 128  # of the split; checks of memory make a program several times slower
TIMEOUT = 1800  # seconds


@dataclass(frozen=True)
class Checked:
    """`clips` of the split and `extremes` (random and extreme inputs) with equal logits; `sanitised` of both with checks
    of memory and undefined behaviour. `bytes`: size of the compiled model and kernels, by section.
    """

    clips: int
    extremes: int
    sanitised: int
    compiler: str


@dataclass(frozen=True)
class Toolchain:
    """`cc` and flags for the Makefile."""

    cc: str
    flags: str = "-O3"

    @classmethod
    def host(cls) -> Toolchain:
        """The C compiler of this computer (environment CC, CFLAGS; else cc, gcc, clang). Raises KestrelError if none."""
        wanted = os.environ.get("CC")
        names = [wanted] if wanted else ["cc", "gcc", "clang"]
        cc = next((name for name in names if shutil.which(name.split()[0])), None)
        if cc is None or shutil.which("make") is None:
            missing = "make" if cc else f"C compiler ({', '.join(names)})"
            raise KestrelError(f"no {missing} found, which checks the exported C code: install gcc and make")
        return cls(cc, os.environ.get("CFLAGS", "-O3"))

    def version(self) -> str:
        """First line of `cc --version`."""
        done = subprocess.run([*self.cc.split(), "--version"], capture_output=True, text=True, check=False)
        return (done.stdout.splitlines() or [self.cc])[0]

    def build(self, folder: Path, target: str) -> Path:
        """`make target` in `folder`; returns the program. Raises KestrelError with the compiler's first error."""
        command = ["make", "-s", "-C", str(folder), target, f"CC={self.cc}", f"CFLAGS={self.flags}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise KestrelError(
                f"the exported C code does not compile ({target}): {(lines or ['make failed'])[0].strip()}"
            )
        return folder / target


def run_program(program: Path, codes: Array) -> Array:
    """Logits int64 [N, C] of features `codes` [N, ...] from a built program. Raises KestrelError where it fails."""
    data = np.ascontiguousarray(codes, "<i2").tobytes()
    try:
        done = subprocess.run([str(program), "-"], input=data, capture_output=True, cwd=program.parent, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise KestrelError(f"the C program {program.name} does not end within {TIMEOUT} s") from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").splitlines()
        lines = [line for line in text if "error" in line.lower()] or text or [f"exit status {done.returncode}"]
        raise KestrelError(f"the C program {program.name} fails: {lines[0].strip()}")
    rows = [line.split("\t")[3].split() for line in done.stdout.decode().splitlines()]
    return np.array(rows, dtype=np.int64).reshape(len(codes), -1)


def extremes(graph: IntegerGraph, seed: int = 0) -> Array:
    """Inputs that no corpus has, int16 [n, *shape]: lowest, highest, alternating, single spikes, and random ones."""
    tensor = graph.tensors[graph.inputs[0]]
    low, high = tensor.low, tensor.high
    rng = np.random.default_rng(seed)
    flat = np.arange(tensor.size)
    rows = [
        np.full(tensor.size, low),
        np.full(tensor.size, high),
        np.full(tensor.size, min(max(0, low), high)),
        np.where(flat % 2, low, high),
        np.where(flat % 2, high, low),
        np.where(flat // tensor.shape[-1] % 2, low, high),
        np.where(flat == 0, high, min(max(0, low), high)),
        np.where(flat == flat[-1], low, min(max(0, low), high)),
    ]
    wild = rng.integers(low, high + 1, (RANDOM_CLIPS // 2, tensor.size))
    spread = np.clip(np.rint(rng.normal(0, max(1, high) / 16, (RANDOM_CLIPS // 2, tensor.size))), low, high)
    return np.concatenate([np.stack(rows), wild, spread]).astype(np.int16).reshape(-1, *tensor.shape)


def check(
    model: CModel,
    graph: IntegerGraph,
    clips: Iterable[Array] = (),
    *,
    toolchain: Toolchain | None = None,
    classes: tuple[str, ...] = (),
    sanitised_clips: int = SANITISED_CLIPS,
    expected: Callable[[Array], Array] | None = None,
    change: Callable[[Path], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Checked:
    """Build `model` and compare its logits with those of `graph`, bit by bit.

    Args:
        clips: features of a split as int16 codes, in batches [n, *shape].
        sanitised_clips: how many of them also run with address and undefined-behaviour sanitizers.
        expected: codes -> logits, where they are known already; default: graph.run.
        change: called with the folder of the source before it is built (tests damage it there).
        progress: called with the number of clips done.

    Raises KestrelError where there is no compiler, the source does not compile, the program fails, or a logit differs;
    then the line names the first tensor that differs, the index, and both values.
    """
    toolchain = toolchain or Toolchain.host()
    wanted = expected or (lambda codes: graph.run(codes)[graph.outputs[0]])
    counts = {"clips": 0, "extremes": 0, "sanitised": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_c(model, folder)
        if change is not None:
            change(folder)
        plain, sanitised = toolchain.build(folder, "model"), toolchain.build(folder, "model-sanitize")
        for kind, codes in _inputs(graph, clips):
            logits = np.asarray(wanted(codes)).reshape(len(codes), -1)
            _compare(model, graph, codes, logits, run_program(plain, codes), toolchain, folder)
            left = len(codes) if kind == "extremes" else max(0, sanitised_clips - counts["clips"])
            if left:
                found = run_program(sanitised, codes[:left])
                _compare(model, graph, codes[:left], logits[:left], found, toolchain, folder)
                counts["sanitised"] += len(found)
            counts[kind] += len(codes)
            if progress is not None:
                progress(counts["clips"])
    return Checked(**counts, compiler=toolchain.version())


def _inputs(graph: IntegerGraph, clips: Iterable[Array]) -> Iterator[tuple[str, Array]]:
    yield "extremes", extremes(graph)
    for batch in clips:
        for start in range(0, len(batch), BATCH):
            yield "clips", batch[start : start + BATCH]


def _compare(
    model: CModel, graph: IntegerGraph, codes: Array, wanted: Array, found: Array, toolchain: Toolchain, folder: Path
) -> None:
    places = np.argwhere(wanted != found)
    if not len(places):
        return
    clip, logit = (int(i) for i in places[0])
    first = f"logits[{logit}]: expected {wanted[clip, logit]}, got {found[clip, logit]}"
    mismatch = first_difference(model, graph, codes[clip : clip + 1], toolchain, folder)
    place = f"the first difference is {mismatch}" if mismatch else f"it is {first}, and gone with tracing"
    raise KestrelError(f"the C model differs from the integer model: {place} (index: clip of the batch {clip}, ...)")


def first_difference(
    model: CModel, graph: IntegerGraph, codes: Array, toolchain: Toolchain, folder: Path
) -> str | None:
    """The first tensor of a C run of `codes` [n, ...] that differs from the graph's, with its index and both values."""
    actual = trace(model, graph, codes, toolchain, folder)
    known: dict[str, Array] = {}
    graph.run(codes, trace=known)
    mismatch = graph.first_mismatch(known, actual)
    return str(mismatch) if mismatch else None


def trace(model: CModel, graph: IntegerGraph, codes: Array, toolchain: Toolchain, folder: Path) -> dict[str, Array]:
    """Every tensor that the C model in `folder` computes, in the form of `graph.run(..., trace=...)`."""
    run_program(toolchain.build(folder, "model-trace"), codes)
    values = np.fromfile(folder / "trace", "=i4")
    parts: dict[str, list[Array]] = {}
    at = 0
    while at < len(values):
        number, count = int(values[at]), int(values[at + 1])
        parts.setdefault(model.traced[number], []).append(values[at + 2 : at + 2 + count])
        at += 2 + count
    found = {}
    for name, tensor, scan in graph.all_tensors():
        if name in parts:
            steps = () if scan is None else (graph.tensors[scan.inputs[0]].shape[0],)
            found[name] = np.concatenate(parts[name]).astype(np.int64).reshape(len(codes), *steps, *tensor.shape)
    return found
