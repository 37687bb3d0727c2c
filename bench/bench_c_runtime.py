"""Time of one inference on the host: the generated C (-O3) against onnxruntime int8, batch 1, one thread, same networks.

    python bench/bench_c_runtime.py [--seconds 1]

Networks have random weights; time does not depend on them. onnxruntime runs the same float network after its own static
QDQ quantisation (convolutions) or dynamic quantisation (LSTM), and as float for comparison. Median of repeated runs,
both sides in turns.
"""

from __future__ import annotations

import argparse
import ctypes
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
FLAGS = {"C -O3": ["-O3"], "C -O3 -march=native": ["-O3", "-march=native"]}


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


def ours(graph: IntegerGraph, codes: np.ndarray, folder: Path) -> dict[str, Callable[[], object]]:
    """The generated C as shared libraries, checked on one clip before it is timed."""
    write_c(generate(graph), folder)
    found: dict[str, Callable[[], object]] = {}
    clip = np.ascontiguousarray(codes[0], np.int16)
    logits = np.zeros(CLASSES, np.int32)
    for name, flags in FLAGS.items():
        library = folder / f"model{len(found)}.so"
        command = ["gcc", "-std=c99", *flags, "-shared", "-fPIC", "-o", str(library), "model.c", "kestrel_ops.c"]
        subprocess.run(command, cwd=folder, check=True)
        run = ctypes.CDLL(str(library)).kestrel_model_run
        arguments = ctypes.c_void_p(clip.ctypes.data), ctypes.c_void_p(logits.ctypes.data)
        run(*arguments)
        assert (logits == graph.run(codes[:1])[graph.outputs[0]][0]).all()
        found[name] = lambda run=run, arguments=arguments, kept=(clip, logits): run(*arguments)
    return found


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
    seconds = parser.parse_args().seconds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    features = torch.randn(32, FRAMES, WIDTH).cumsum(1) * 0.3
    nets = {"LSTM 32": Lstm(32), "LSTM 118": Lstm(118), "DS-CNN 64 x 4": DsCnn()}
    print("| network | candidate | microseconds | times onnxruntime int8's speed |\n|---|---|---|---|")
    for title, net in nets.items():
        net.eval()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            graph = graph_of(net, features)
            codes = input_codes(features.numpy(), graph.tensors["features"])
            candidates = {**ours(graph, codes, folder / "c"), **rivals(net, features.numpy(), folder)}
            found = medians(candidates, seconds)
        for candidate, value in found.items():
            print(f"| {title} | {candidate} | {value:.0f} | {found['onnxruntime int8'] / value:.2f} |", flush=True)


if __name__ == "__main__":
    main()
