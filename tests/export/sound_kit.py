"""Small models behind fixed-point front ends, for tests of sound."""

from __future__ import annotations

from typing import Any

import numpy as np

from kestrel.export.c_frontend import WavInput, wav_input
from kestrel.export.c_sound import SoundModel
from kestrel.frontend.fixed import FixedFrontend
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.graph import IntegerGraph, Program, Scan, State
from kestrel.lower.ops import AddRequantise, ArgMax, MatMul, Requantise, Reshape, Slice
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale
from kestrel.settings import to_dict

SAMPLES = 4100  # the last block of samples is not whole
SHORT = (-(1 << 15), (1 << 15) - 1)
_FFT = {"mel_bands": 20, "f_min": 20.0, "f_max": 4000.0}
_SPECS: dict[str, dict[str, Any]] = {
    "clip": {"coefficients": 10, **_FFT},
    "frames": {"coefficients": 10, **_FFT},
    "stacked frames": {"window": 641, "n_fft": 641, **_FFT},
    "top_db": {"log": "db", "top_db": 60.0, "coefficients": 10, **_FFT},
    "frames of top_db": {"log": "db", "top_db": 60.0, "coefficients": 10, **_FFT},
}
KINDS = tuple(_SPECS)


def sound_model(kind: str, shift: int = 1, middle: bool = False) -> tuple[IntegerGraph, FixedFrontend, WavInput]:
    """A model that takes the whole clip, or frames as they come (two at a time, after the first one, if "stacked").

    With `middle` noise gives every class about as often as any other.
    """
    spec = FrontendSpec(name="test", **_SPECS[kind])
    front_end = FixedFrontend(spec)
    frames, width = front_end.frames(SAMPLES), front_end.width
    graph = IntegerGraph()
    x = graph.input("features", Tensor((frames, width), *SHORT, front_end.scale * 2.0**shift))
    made = recurrent(graph, x, kind == "stacked frames", 0 if middle else 3) if "frames" in kind else product(graph, x)
    graph.output(made)
    graph.output(graph.add(ArgMax(inputs=(made,), outputs=("class",))))
    return graph, front_end, wav_input(to_dict(spec), SAMPLES, graph.tensors["features"])


def python(graph: IntegerGraph, front_end: FixedFrontend, wav: WavInput) -> SoundModel:
    """What the C program has to compute."""
    return SoundModel(front_end, graph, wav)


def product(graph: IntegerGraph, x: str) -> str:
    """Four weighted sums of all features."""
    size = graph.tensors[x].size
    graph.add(Requantise(inputs=(x,), outputs=("codes",), rescale=Rescale((1,), 3, -4096, 4095)))
    graph.add(Reshape(inputs=("codes",), outputs=("row",), shape=(size,)))
    weight = Constant.of(np.random.default_rng(0).integers(-9, 10, (4, size)), 8)
    return graph.add(MatMul(inputs=("row",), outputs=("logits",), weight=weight))


def recurrent(graph: IntegerGraph, x: str, stacked: bool, kept: int) -> str:
    """A state that mixes itself with a weighted sum of each frame."""
    frames, width = graph.tensors[x].shape
    if stacked:
        length = (frames - 1) // 2
        graph.add(Slice(inputs=(x,), outputs=("kept",), start=1, stop=1 + 2 * length, axis=0))
        frames, width = length, 2 * width
        x = graph.add(Reshape(inputs=("kept",), outputs=("pairs",), shape=(frames, width)))
    body = Program()
    body.input("x", Tensor((width,), *SHORT))
    body.input("h", Tensor((4,), *SHORT))
    values = np.random.default_rng(0).integers(-9, 10, (4, width))
    if not kept:
        values[:, 0] = 0  # the loudness
    weight = Constant.of(values, 8)
    body.add(MatMul(inputs=("x",), outputs=("p",), weight=weight, rescale=Rescale((1,), 4, *SHORT)))
    body.add(
        AddRequantise(
            inputs=("h", "p"), outputs=("h next",), multipliers=(kept, 2), shift=2, low=SHORT[0], high=SHORT[1]
        )
    )
    state = State("h", "h next", Tensor((4,), *SHORT))
    scan = Scan(inputs=(x,), outputs=("logits",), body=body, steps=("x",), states=(state,), last=("h",))
    return graph.add(scan)
