"""The answers of an integer model on a whole split, beside those of the fake-quant network with the same weight codes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kestrel.errors import KestrelError
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.ops import Conv2d, DepthwiseConv2d, MatMul, sum_range
from kestrel.lower.spotter import BATCH, FEATURES, LOGITS, lower, predict_codes
from kestrel.lower.tensor import Tensor
from kestrel.models.evaluate import Accuracy, Features, ProgressCallback, accuracy, predict
from kestrel.models.inventory import decoded_weights, noise_off, weight_codes

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter

ALLOWED_POINTS = 0.2  # difference of accuracies that rounding may make, in points


def lowered(spotter: KeywordSpotter, feature_scale: float | None, weight_bits: int) -> tuple[IntegerGraph | None, str]:
    """The integer model and "", or None and the line that says which setting prevents it.

    `feature_scale` is None where there are no features that it could be taken from.
    """
    if feature_scale is None:
        return (
            None,
            "there is no validation.h5, from which the scale of feature codes is taken: put it beside the others",
        )
    try:
        return lower(spotter, feature_scale, weight_bits), ""
    except (KestrelError, ValueError) as error:  # ValueError: a number that fits no multiplier
        return None, " ".join(str(error).split())


def predict_decoded(
    spotter: KeywordSpotter, data: Features, weight_bits: int, batch_size: int, progress: ProgressCallback | None = None
) -> np.ndarray:
    """Logits [N, C] of the fake-quant network with the weights that the integer codes stand for, without device noise."""
    codes = weight_codes(spotter.net, weight_bits)
    with decoded_weights(spotter.net, codes), noise_off(spotter.net):
        return predict(spotter, data, batch_size, progress)


def float64_answers(
    spotter: KeywordSpotter, graph: IntegerGraph, data: Features, rows: np.ndarray, weight_bits: int
) -> np.ndarray:
    """Answers [n] of the fake-quant network in float64, for clips `rows` with their features as the integer model has them.

    Float32 resolves ties between two codes by its rounding errors where float64 mostly meets them exactly.
    """
    if not len(rows):
        return np.zeros(0, np.int64)
    exact = copy.deepcopy(spotter).cpu().double()
    exact.net.set_phase("eval")
    tensor = graph.tensors[FEATURES]
    assert tensor.scale is not None
    found = []
    with decoded_weights(exact.net, weight_codes(spotter.net, weight_bits)), noise_off(exact.net), torch.no_grad():
        for start in range(0, len(rows), BATCH):
            codes = input_codes(data.rows(rows[start : start + BATCH]), tensor)
            found.append(exact(torch.from_numpy(codes * tensor.scale)).argmax(dim=1).numpy())
    return np.concatenate(found)


@dataclass(frozen=True)
class Peaks:
    """The largest magnitudes of a run, in codes.

    `accumulator` is proven from weights and ranges, for any input and any order of summation; the others were seen.
    """

    accumulator: int
    accumulator_bits: int  # of a two's complement register that holds it
    accumulator_of: str  # the tensor that it makes
    feature: int
    clipped_features: int  # values outside int16, which saturate
    logit: int


@dataclass(frozen=True)
class Answers:
    """An integer model against the fake-quant network with the same weight codes, both without device noise."""

    logits: np.ndarray  # int64 [N, C]
    integer: Accuracy
    fake_quant: Accuracy
    same: int  # clips with the same answer
    gained: int  # clips that the integer model alone gets right
    lost: int  # clips that the fake-quant network alone gets right
    float32: int | None  # clips with another answer, where the fake-quant network in float64 gives the integer model's
    largest_difference: float  # of a logit, in units of the network
    logit_step: float  # what one code of a logit stands for
    peaks: Peaks

    @property
    def agreement(self) -> float:
        """Share of clips with the same answer."""
        return self.same / self.integer.n

    @property
    def points(self) -> float:
        """Accuracy of the integer model less that of the fake-quant network, in points."""
        return 100 * (self.integer.correct - self.fake_quant.correct) / self.integer.n

    def figures(self) -> dict[str, Any]:
        """Entries of result.json and export.json."""
        return {
            "integer_accuracy": self.integer.value,
            "integer_ci95": [round(bound, 6) for bound in self.integer.ci95],
            "integer_agreement": round(self.agreement, 6),
            "integer": {
                "compared_with": "fake-quant network, same weight codes, no device noise",
                "fake_quant_accuracy": self.fake_quant.value,
                "difference_points": round(self.points, 4),
                "other_answers": self.integer.n - self.same,
                "other_answers_of_float32": self.float32,
                "largest_logit_difference": self.largest_difference,
                "logit_step": self.logit_step,
                "peaks": vars(self.peaks),
            },
        }


def answers(
    graph: IntegerGraph,
    data: Features,
    labels: np.ndarray,
    decoded_logits: np.ndarray,
    progress: ProgressCallback | None = None,
    exact: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Answers:
    """Run `graph` on every clip of `data` and compare it with `decoded_logits`, those of predict_decoded.

    `exact` (rows -> answers, see float64_answers) is asked for the clips with another answer, to tell rounding errors of
    float32 from others.
    """
    watched = _Watched(data, graph.tensors[FEATURES])
    logits = predict_codes(graph, watched, progress)
    step = graph.tensors[LOGITS].scale or 1.0
    name, reach = widest_accumulator(graph)
    bits = reach.bit_length() + 1
    heard, expected = logits.argmax(axis=1), decoded_logits.argmax(axis=1)
    others = np.flatnonzero(heard != expected)
    return Answers(
        logits=logits,
        integer=accuracy(logits, labels),
        fake_quant=accuracy(decoded_logits, labels),
        same=int((heard == expected).sum()),
        gained=int(((heard == labels) & (expected != labels)).sum()),
        lost=int(((heard != labels) & (expected == labels)).sum()),
        float32=None if exact is None else int((exact(others) == heard[others]).sum()),
        largest_difference=float(np.abs(logits * step - decoded_logits).max()),
        logit_step=step,
        peaks=Peaks(reach, bits, name, watched.largest, watched.clipped, int(np.abs(logits).max())),
    )


class _Watched:
    """Features, of which the largest code and the number of saturated values are noted as they are read."""

    def __init__(self, data: Features, tensor: Tensor) -> None:
        self._data, self._tensor = data, tensor
        self.largest = self.clipped = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(clips, frames, width)."""
        return self._data.shape

    def rows(self, rows: np.ndarray, /) -> np.ndarray:
        """Features of these rows, float32 [n, T, F]."""
        real = self._data.rows(rows)
        assert self._tensor.scale is not None
        codes = np.rint(real.astype(np.float64) / self._tensor.scale)
        outside = (codes < self._tensor.low) | (codes > self._tensor.high)
        self.clipped += int(outside.sum())
        self.largest = max(self.largest, int(np.abs(input_codes(real, self._tensor).astype(np.int64)).max(initial=0)))
        return real


def accumulator_reach(graph: IntegerGraph) -> Mapping[str, int]:
    """The largest magnitude that an accumulator can reach, by the tensor that the op makes (products with weights)."""
    tensors = {name: tensor for name, tensor, _ in graph.all_tensors()}
    found = {}
    for op, _ in graph.all_ops():
        if isinstance(op, (MatMul, Conv2d, DepthwiseConv2d)):
            x, weight = tensors[op.inputs[0]], op.weight.values
            depthwise = isinstance(op, DepthwiseConv2d)
            flat = weight.reshape(-1, weight.shape[-1]).T if depthwise else weight.reshape(len(weight), -1)
            low, high = sum_range(flat, None if op.bias is None else op.bias.values, x.low, x.high)
            found[op.outputs[0]] = max(high, -low)
    return found


def widest_accumulator(graph: IntegerGraph) -> tuple[str, int]:
    """The tensor whose accumulators can reach the largest magnitude, and this magnitude ("", 0 without products)."""
    reach = accumulator_reach(graph)
    name = max(reach, key=lambda key: reach[key], default="")
    return name, reach.get(name, 0)
