"""Time of one inference on the host: the generated C against onnxruntime int8 and TensorFlow Lite Micro, batch 1, one thread.

    python bench/bench_c_runtime.py [--seconds 1] [--nice -5] [--tflm-python <venv>/bin/python]

The same networks on all sides, with random weights; time does not depend on them. Ours is compiled with -O3: as plain C, and
with each set of vector kernels that the processor has. onnxruntime runs the float network after its own static QDQ
quantisation (convolutions) or dynamic quantisation (LSTM), and as float for comparison. Median of repeated runs, candidates
in turns; TFLM, which runs in a process of its own, directly before them. Calls come from Python, which costs onnxruntime some
microseconds more than the others. --tflm-python: a Python with tflite-micro and tensorflow-cpu, of an environment apart.
Where qemu and the cross compilers are installed, instructions per inference of emulated microcontrollers follow.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from kestrel.export.c_files import write_c
from kestrel.export.c_model import generate
from kestrel.frontend.post import Post
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.network import lower_network
from kestrel.lower.ops import ArgMax
from kestrel.lower.post import lower_post
from kestrel.lower.tensor import Tensor

FRAMES, WIDTH, CLASSES = 49, 10, 12
SCALE = 2.0**-11
FLAGS = ["-std=c99", "-O3"]
VECTORS = ("avx2", "avx512", "neon")
KERNELS = ["kestrel_ops.c", "kestrel_isa.c", "kestrel_avx2.c", "kestrel_avx512.c", "kestrel_neon.c"]
RUNTIME = Path(__file__).parents[1] / "runtime"
DEVICES = {
    "rv32imc": ("riscv64-unknown-elf-gcc", "qemu-system-riscv32"),
    "cortex-m": ("arm-none-eabi-gcc", "qemu-system-arm"),
}


class Lstm(nn.Module):
    """One LSTM layer and a read-out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, hidden, batch_first=True)
        self.out = nn.Linear(hidden, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequence, _ = self.rnn(x)
        return self.out(sequence[:, -1])


class DsCnn(nn.Module):
    """Depthwise-separable convolutions in the size of DS-CNN-S (Zhang et al., Hello Edge, arXiv 1711.07128)."""

    def __init__(self, channels: int = 64, blocks: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, channels, (10, 4), (2, 2), (4, 1)), nn.BatchNorm2d(channels), nn.ReLU()]
        for _ in range(blocks):
            layers += [nn.Conv2d(channels, channels, 3, 1, 1, groups=channels), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(x.unsqueeze(1)).mean((2, 3)))


def graph_of(net: nn.Module, features: torch.Tensor) -> IntegerGraph:
    graph = IntegerGraph()
    name = graph.input("features", Tensor((FRAMES, WIDTH), -(1 << 15), (1 << 15) - 1, SCALE))
    logits = lower_network(graph, lower_post(graph, Post([], (FRAMES, WIDTH)), name), net, features)
    graph.output(logits)
    graph.output(graph.add(ArgMax(inputs=(logits,), outputs=("class",))))
    return graph


class _Reader(CalibrationDataReader):
    def __init__(self, features: np.ndarray) -> None:
        self.rows = iter(features)

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"features": row[None]}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def rivals(net: nn.Module, features: np.ndarray, folder: Path) -> dict[str, Callable[[], object]]:
    """onnxruntime in float and int8."""
    plain, ready, int8 = folder / "float.onnx", folder / "ready.onnx", folder / "int8.onnx"
    torch.onnx.export(
        net,
        (torch.from_numpy(features[:1]),),
        str(plain),
        input_names=["features"],
        output_names=["logits"],
        dynamo=False,
    )
    if any(isinstance(module, nn.LSTM) for module in net.modules()):
        quantize_dynamic(plain, int8, weight_type=QuantType.QInt8)
    else:
        quant_pre_process(plain, ready)
        quantize_static(ready, int8, _Reader(features), quant_format=QuantFormat.QDQ, per_channel=True)
    made = {"onnxruntime float": session(plain), "onnxruntime int8": session(int8)}
    row = {"features": features[:1]}
    return {name: (lambda run=found: run.run(None, row)) for name, found in made.items()}


def processor() -> tuple[str, set[str]]:
    """Name and flags of this processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", "unknown processor"), set(fields.get("flags", fields.get("Features", "")).split())


def vector_sets() -> list[str]:
    """Names of the vector kernels that run here."""
    flags = processor()[1]
    needed = {"avx2": {"avx2", "fma"}, "avx512": {"avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}, "neon": {"asimd"}}
    return [name for name in VECTORS if needed[name] <= flags]


def ours(graph: IntegerGraph, codes: np.ndarray, folder: Path) -> dict[str, Callable[[], object]]:
    """The generated C as shared libraries, checked on one clip before it is timed."""
    write_c(generate(graph), folder)
    found: dict[str, Callable[[], object]] = {}
    clip = np.ascontiguousarray(codes[0], np.int16)
    logits = np.zeros(CLASSES, np.int32)
    for isa in ["", *vector_sets()]:
        library = folder / f"model-{isa or 'plain'}.so"
        sources = ["model.c", *(KERNELS if isa else KERNELS[:1])]
        command = [
            "gcc",
            *FLAGS,
            *(["-DKESTREL_SIMD"] if isa else []),
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            *sources,
        ]
        subprocess.run(command, cwd=folder, check=True)
        os.environ["KESTREL_ISA"] = isa  # is read at the first inference
        run = ctypes.CDLL(str(library)).kestrel_model_run
        arguments = ctypes.c_void_p(clip.ctypes.data), ctypes.c_void_p(logits.ctypes.data)
        run(*arguments)
        assert (logits == graph.run(codes[:1])[graph.outputs[0]][0]).all()
        name = f"C {isa}" if isa else "C portable"
        found[name] = lambda run=run, arguments=arguments, kept=(clip, logits): run(*arguments)
    return found


def tflm(python: str, name: str, folder: Path, seconds: float) -> float | str:
    """Microseconds of TensorFlow Lite Micro, or why there are none."""
    script, path = str(Path(__file__).with_name("tflm_peer.py")), str(folder / "model.tflite")
    for step in (["convert", name, path], ["run", path, str(seconds)]):
        done = subprocess.run([python, script, *step], capture_output=True, text=True)
        if done.returncode:
            reason = "the converter" if step[0] == "convert" else "the interpreter"
            return f"not measured: {reason} ends with status {done.returncode}"
    return float(done.stdout.split()[-1])


def instructions(device: str, folder: Path, codes: np.ndarray) -> str:
    """Instructions of one inference on an emulated microcontroller, after Makefile and sample of runtime/targets."""
    for source in (
        RUNTIME / "targets" / "sample.c",
        RUNTIME / "targets" / "device.mk",
        RUNTIME / "targets" / device / "Makefile",
    ):
        if source.exists():
            shutil.copy(source, folder / source.name)
    row = ", ".join(map(str, codes[0].reshape(-1).tolist()))
    (folder / "sample.h").write_text(
        f"#define CLIPS 1\nstatic const int16_t clips[CLIPS][KESTREL_MODEL_FEATURES] = {{{{{row}}}}};\n"
    )
    done = subprocess.run(["make", "-s", "-C", str(folder), "run"], capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("instructions")]
    for path in folder.glob("*.o"):
        path.unlink()
    return lines[-1].split()[1] if lines else "failed"


def medians(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds per call; candidates take turns until `seconds` each have passed."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end:
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time per candidate and network")
    parser.add_argument("--tflm-python", help="a Python with tflite-micro and tensorflow-cpu")
    parser.add_argument("--nice", type=int, default=0, help="added to the priority of this process, e.g. -5")
    options = parser.parse_args()
    os.nice(options.nice)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    features = torch.randn(32, FRAMES, WIDTH).cumsum(1) * 0.3
    nets = {"lstm-32": Lstm(32), "lstm-118": Lstm(118), "ds-cnn": DsCnn()}
    devices = [name for name, tools in DEVICES.items() if all(map(shutil.which, (*tools, "make")))]
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    print(
        f"{processor()[0]}; {compiler}, {' '.join(FLAGS)}; onnxruntime {onnxruntime.__version__}; load {os.getloadavg()[0]:.1f}"
    )
    print("\n| network | candidate | microseconds | onnxruntime int8's time / this time |\n|---|---|---|---|")
    counted, ratios = [], []
    for title, net in nets.items():
        net.eval()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            graph = graph_of(net, features)
            codes = input_codes(features.numpy(), graph.tensors["features"])
            candidates = {**ours(graph, codes, folder / "c"), **rivals(net, features.numpy(), folder)}
            peer = tflm(options.tflm_python, title, folder, options.seconds) if options.tflm_python else "not asked for"
            found: dict[str, float | str] = {**medians(candidates, options.seconds), "TFLite Micro int8": peer}
            counted += [(title, device, instructions(device, folder / "c", codes)) for device in devices]
        base = found["onnxruntime int8"]
        ratios += [
            f"{title}: {candidate} is {base / value:.2f} times as fast as onnxruntime int8"
            for candidate, value in found.items()
            if candidate.startswith("C ") and isinstance(value, float) and isinstance(base, float)
        ]
        for candidate, value in found.items():
            ratio = f"{value:.1f} | {base / value:.2f}" if isinstance(value, float) else f"{value} | -"
            print(f"| {title} | {candidate} | {ratio} |", flush=True)
    print("\n" + "\n".join(ratios) + f"\nload at the end: {os.getloadavg()[0]:.1f}")
    if counted:
        print("\n| network | emulated | instructions per inference |\n|---|---|---|")
    for row in counted:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
