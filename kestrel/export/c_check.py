"""Proof that generated C answers like the integer graph: build it, run clips and extreme inputs, compare every bit."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_files import write_c
from kestrel.export.c_model import CModel
from kestrel.lower.graph import IntegerGraph

Array = np.ndarray
BATCH = 64  # clips per run of a program
RANDOM_CLIPS = 32
PORTABLE = "portable"  # the kernels in plain C, which microcontrollers have
TIMEOUT = 1800  # seconds
WITHOUT = (
    "install gcc and make (Debian: apt-get install gcc make), or leave the C program out with --set export.c=false"
)


@dataclass(frozen=True)
class Checked:
    """`clips` of the split and `extremes` (random and extreme inputs) with equal bits, all with and without sanitizers."""

    clips: int
    extremes: int
    compiler: str


@dataclass(frozen=True)
class Batch:
    """What a program is given, int16 [n, ...], and what it must make of it.

    `codes` int16 [n, T, F] are the features that the network takes, `logits` int64 [n, C] what it answers. Where `sound`
    is true `given` are samples [n, S], otherwise the features themselves.
    """

    given: Array
    codes: Array
    logits: Array
    sound: bool = False


@dataclass(frozen=True)
class Toolchain:
    """`cc`, flags and other variables (NAME=value) for the Makefile."""

    cc: str
    flags: str = "-O3"
    variables: tuple[str, ...] = ()

    @classmethod
    def host(cls) -> Toolchain:
        """The C compiler of this computer (environment CC, CFLAGS; else cc, gcc, clang). Raises KestrelError if none."""
        wanted = os.environ.get("CC")
        names = [wanted] if wanted else ["cc", "gcc", "clang"]
        cc = next((name for name in names if shutil.which(name.split()[0])), None)
        if cc is None or shutil.which("make") is None:
            missing = "make" if cc else f"C compiler ({', '.join(names)})"
            raise KestrelError(f"no {missing} found, which checks the exported C code: {WITHOUT}")
        return cls(cc, os.environ.get("CFLAGS", "-O3"))

    def version(self) -> str:
        """First line of `cc --version`."""
        done = subprocess.run([*self.cc.split(), "--version"], capture_output=True, text=True, check=False)
        return (done.stdout.splitlines() or [self.cc])[0]

    def build(self, folder: Path, target: str) -> Path:
        """`make target` in `folder`; returns the program. Raises KestrelError with the compiler's first error."""
        settings = (f"CC={self.cc}", f"CFLAGS={self.flags}", *self.variables)
        command = ["make", "-s", f"-j{processors()}", "-C", str(folder), target, *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise KestrelError(
                f"the exported C code does not compile ({target}): {(lines or ['make failed'])[0].strip()}"
            )
        return folder / target


def run_program(program: Path, values: Array, *options: str, kernels: str | None = None) -> Array:
    """Logits int64 [N, C] of features (or samples, with option -s) [N, ...] from a built program.

    `kernels`: the ones that it has to take (runtime/include/kestrel_isa.h); default: the best of this processor.

    Raises KestrelError where it fails.
    """
    data = np.ascontiguousarray(values, "<i2").tobytes()
    command = [str(program), *options, "-"]
    try:
        environment = {**os.environ, "KESTREL_ISA": kernels} if kernels else None
        done = subprocess.run(
            command, input=data, capture_output=True, cwd=program.parent, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        raise KestrelError(f"the C program {program.name} does not end within {TIMEOUT} s") from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").splitlines()
        lines = [line for line in text if "error" in line.lower()] or text or [f"exit status {done.returncode}"]
        raise KestrelError(f"the C program {program.name} fails: {lines[0].strip()}")
    rows = [line.split("\t")[3].split() for line in done.stdout.decode().splitlines()]
    return np.array(rows, dtype=np.int64).reshape(len(values), -1)


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


class Programs:
    """A C model built twice, plain and with sanitizers, and compared with what it should answer, several runs at a time.

    The program with sanitizers runs twice: with the best kernels of this processor, and with the portable ones.
    Raises KestrelError where there is no compiler or the source does not compile. `change` is called with the folder of
    the source before it is built (tests damage it there).
    """

    def __init__(
        self,
        model: CModel,
        graph: IntegerGraph,
        toolchain: Toolchain | None = None,
        change: Callable[[Path], None] | None = None,
    ) -> None:
        self.toolchain = toolchain or Toolchain.host()
        self._model, self._graph = model, graph
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self._numbers = itertools.count()
        try:
            write_c(model, self.folder)
            if change is not None:
                change(self.folder)
            with ThreadPoolExecutor(2) as pool:
                found = [pool.submit(self.toolchain.build, self.folder, name) for name in ("model", "model-sanitize")]
            self._programs = [program.result() for program in found]
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def prove(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Each batch, in order, once both programs have given all of its bits.

        Raises KestrelError for the first batch with which a program fails or differs; the line names the first tensor
        that differs, the index, and both values.
        """
        workers = processors()
        waiting: deque[tuple[int, Batch, list[Future[tuple[Array, Array]]]]] = deque()
        first = 0
        with ThreadPoolExecutor(workers) as pool:
            try:
                for batch in batches:
                    waiting.append((first, batch, [pool.submit(self._run, batch, *run) for run in self._runs(batch)]))
                    first += len(batch.given)
                    if len(waiting) > workers:
                        yield self._proven(*waiting.popleft())
                while waiting:
                    yield self._proven(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _runs(self, batch: Batch) -> list[tuple[Path, str | None]]:
        """Programs, and the kernels that they take. The front end, which has no kernels, is run with one kind of them."""
        plain, sanitised = self._programs
        every: list[tuple[Path, str | None]] = [(plain, None), (sanitised, None)]
        return every if batch.sound else [*every, (sanitised, PORTABLE)]

    def _run(self, batch: Batch, program: Path, kernels: str | None) -> tuple[Array, Array]:
        """Features int16 [n, T, F] and logits of one program."""
        if not batch.sound:
            return batch.codes, run_program(program, batch.given, kernels=kernels)
        path = self.folder / f"features{next(self._numbers)}"
        logits = run_program(program, batch.given, "-s", "-f", str(path))
        codes = np.fromfile(path, "<i2").reshape(batch.codes.shape)
        path.unlink()
        return codes, logits

    def _proven(self, first: int, batch: Batch, results: list[Future[tuple[Array, Array]]]) -> Batch:
        for result in results:
            codes, logits = result.result()
            _compare_features(batch.codes, codes, first)
            self._compare_logits(batch, logits, first)
        return batch

    def _compare_logits(self, batch: Batch, found: Array, first: int) -> None:
        places = np.argwhere(batch.logits != found)
        if not len(places):
            return
        clip, logit = (int(i) for i in places[0])
        plain = f"logits[{logit}]: expected {batch.logits[clip, logit]}, got {found[clip, logit]}"
        codes = batch.codes[clip : clip + 1]
        mismatch = first_difference(self._model, self._graph, codes, self.toolchain, self.folder)
        place = f"the first difference is {mismatch}" if mismatch else f"it is {plain}, and gone with tracing"
        raise KestrelError(f"the C model differs from the integer model in input {first + clip}: {place}")


def _compare_features(wanted: Array, found: Array, first: int) -> None:
    places = np.argwhere(wanted != found)
    if len(places):
        clip, *place = (int(i) for i in places[0])
        raise KestrelError(
            f"the front end in C differs from the integer front end in input {first + clip}: the first difference is "
            f"features[{', '.join(map(str, place))}]: expected {wanted[tuple(places[0])]}, got {found[tuple(places[0])]}"
        )


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(
    model: CModel,
    graph: IntegerGraph,
    clips: Iterable[Array] = (),
    *,
    toolchain: Toolchain | None = None,
    change: Callable[[Path], None] | None = None,
) -> Checked:
    """Build `model` and compare its logits with those of `graph`, bit by bit, on extreme inputs and then on `clips`.

    `clips` are features of a split as int16 codes, in batches [n, *shape]. The rest as for `Programs`.
    """
    with Programs(model, graph, toolchain, change) as programs:
        counts = dict.fromkeys(("extremes", "clips"), 0)
        for kind, inputs in (("extremes", [extremes(graph)]), ("clips", clips)):
            for batch in programs.prove(feature_batches(graph, inputs)):
                counts[kind] += len(batch.given)
        return Checked(**counts, compiler=programs.toolchain.version())


def feature_batches(graph: IntegerGraph, clips: Iterable[Array]) -> Iterator[Batch]:
    """Features [n, *shape] with what `graph` answers."""
    for codes in clips:
        for start in range(0, len(codes), BATCH):
            part = codes[start : start + BATCH]
            yield Batch(part, part, logits_of(graph, part))


def logits_of(graph: IntegerGraph, codes: Array) -> Array:
    """int64 [n, C] of features [n, ...]."""
    return np.asarray(graph.run(codes)[graph.outputs[0]]).reshape(len(codes), -1)


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
