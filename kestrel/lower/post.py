"""Feature post-processing in integers.

Every step is affine, so scales and offsets are carried along as real numbers beside int16 codes and end up in the
rescaling of the op that reads the features: normalising, stacking, cropping and averaging by themselves round nothing
but the mean. A DCT is a product with integer coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kestrel.errors import KestrelError
from kestrel.frontend.post import Average, Bands, Crop, Dct, Normalise, Post, Stack
from kestrel.lower.graph import Program
from kestrel.lower.ops import MatMul, Reshape, Slice, SumPool, Window
from kestrel.lower.tensor import Constant
from kestrel.quant.integer import INT32, Rescale, twos_complement

_INT16 = twos_complement(16)


@dataclass(frozen=True)
class View:
    """Real values as codes of tensor `name` [T, F]: value = gain * code + offset, per channel, float64 [F]."""

    name: str
    gain: np.ndarray
    offset: np.ndarray

    def rescale(self, range_: float, bits: int, limits: tuple[int, int]) -> Rescale:
        """To codes of a quantiser with step range_ / 2^(bits-1), one rounding. Equal channels share one multiplier."""
        per_code = 2 ** (bits - 1) / range_
        gains, offsets = self.gain * per_code, self.offset * per_code
        same = (gains == gains[0]).all()
        zero = not offsets.any()
        return Rescale.of(list(gains[:1] if same else gains), limits, [0.0] if zero else list(offsets))


def lower_post(program: Program, post: Post, features: str) -> View:
    """Add the steps of `post` to `program`, applied to the tensor `features` [T, F], int16 codes with a scale.

    Raises KestrelError where a step has no integer form.
    """
    tensor = program.tensors[features]
    assert tensor.scale is not None
    width = tensor.shape[1]
    view = View(features, np.full(width, tensor.scale), np.zeros(width))
    for index, step in enumerate(post.steps):
        view = _step(program, step, view, f"post{index}")
    return view


def _step(program: Program, step: torch.nn.Module, view: View, name: str) -> View:
    frames, width = program.tensors[view.name].shape
    if isinstance(step, Normalise):
        mean, deviation = (value.detach().double().cpu().numpy() for value in (step.mean, step.deviation))
        return View(view.name, view.gain / deviation, (view.offset - mean) / deviation)
    if isinstance(step, Crop):
        return View(_cut(program, view.name, step.start, step.stop, name), view.gain, view.offset)
    if isinstance(step, Stack):
        cut = _cut(program, view.name, 0, step.used, f"{name}.cut")
        stacked = program.add(Reshape(inputs=(cut,), outputs=(name,), shape=step.output_shape))
        count = step.output_shape[1] // width
        return View(stacked, np.tile(view.gain, count), np.tile(view.offset, count))
    if isinstance(step, Average):
        kept = frames // step.count
        cut = _cut(program, view.name, 0, kept * step.count, f"{name}.cut")
        image = program.add(Reshape(inputs=(cut,), outputs=(f"{name}.image",), shape=(kept * step.count, 1, width)))
        window = Window((step.count, 1), (step.count, 1))
        share = Rescale.of(1 / step.count, _INT16)
        pooled = program.add(SumPool(inputs=(image,), outputs=(f"{name}.mean",), window=window, rescale=share))
        flat = program.add(Reshape(inputs=(pooled,), outputs=(name,), shape=(kept, width)))
        return View(flat, view.gain, view.offset)
    if isinstance(step, Bands):
        return _bands(program, step, view, name)
    if isinstance(step, Dct):
        return _dct(program, step.matrix.detach().double().cpu().numpy(), view, name)
    raise KestrelError(f"feature.post step {type(step).__name__} has no integer form: leave it out of feature.post")


def _bands(program: Program, step: Bands, view: View, name: str) -> View:
    """Means of neighbouring channels of one scale."""
    frames, width = program.tensors[view.name].shape
    kept = step.output_shape[1]
    groups = view.gain[: kept * step.count].reshape(kept, step.count)
    if not (groups == groups[:, :1]).all():
        raise KestrelError("feature.post: bands behind normalise: channel has no integer form; put it before")
    cut = view.name
    if kept * step.count != width:
        cut = program.add(Slice(inputs=(cut,), outputs=(f"{name}.cut",), start=0, stop=kept * step.count, axis=1))
    image = program.add(Reshape(inputs=(cut,), outputs=(f"{name}.image",), shape=(frames, kept * step.count, 1)))
    window = Window((1, step.count), (1, step.count))
    share = Rescale.of(1 / step.count, _INT16)
    pooled = program.add(SumPool(inputs=(image,), outputs=(f"{name}.mean",), window=window, rescale=share))
    flat = program.add(Reshape(inputs=(pooled,), outputs=(name,), shape=(frames, kept)))
    offset = view.offset[: kept * step.count].reshape(kept, step.count).mean(axis=1)
    return View(flat, groups[:, 0].copy(), offset)


def _cut(program: Program, x: str, start: int, stop: int, name: str) -> str:
    if (start, stop) == (0, program.tensors[x].shape[0]):
        return x
    return program.add(Slice(inputs=(x,), outputs=(name,), start=start, stop=stop))


def _dct(program: Program, matrix: np.ndarray, view: View, name: str) -> View:
    """matrix [F, K]; the coefficients get the finest scale with which no sum can leave 32 bits, at most 16 bits."""
    real = (matrix * view.gain[:, None]).T  # [K, F], value = real @ code + offset
    largest = program.tensors[view.name].magnitude
    finest = np.abs(real).max() / _INT16[1]
    # Rounding may add half a unit to each coefficient: leave room for it.
    room = np.abs(real).sum(axis=1).max() / (INT32[1] / largest - real.shape[1] / 2)
    unit = max(finest, room)
    weight = Constant.of(np.rint(real / unit).astype(np.int64), 16)
    # 32-bit sums to 16-bit codes that hold every possible value, so nothing saturates.
    reach = int(np.abs(weight.values).sum(axis=1).max()) * largest
    ratio = min(1.0, _INT16[1] / reach)
    made = program.add(MatMul(inputs=(view.name,), outputs=(name,), weight=weight, rescale=Rescale.of(ratio, _INT16)))
    return View(made, np.full(len(real), unit / ratio), view.offset @ matrix)
