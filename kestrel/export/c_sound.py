"""Sound through the C program: samples -> features -> logits, beside the integer front end and model in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kestrel.errors import KestrelError
from kestrel.export.c_check import BATCH, RANDOM_CLIPS, Array, Batch, Programs, logits_of
from kestrel.export.c_frontend import WavInput
from kestrel.frontend.fixed import FixedFrontend
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.spotter import FEATURES, made_in_fixed_point
from kestrel.models.evaluate import Accuracy, accuracy
from kestrel.quant.integer import rounding_shift, twos_complement

if TYPE_CHECKING:
    from kestrel.store.hdf5 import AudioFile, FeatureFile


@dataclass(frozen=True)
class Sound:
    """What became of the clips of a split as sound; features and logits of C and Python had equal bits in all of them.

    Codes of the fixed-point front end differ from those of the float features by at most `largest` and by `mean` on
    average; a code stands for `step`; where `trained` is true the network's own features are those of the fixed-point front
    end, and there are no others. `right` is the accuracy with the fixed-point front end, `points` that less the
    accuracy with float features, and `others` the clips with another answer.
    """

    clips: int
    largest: int
    mean: float
    step: float
    right: Accuracy
    points: float
    others: int
    trained: bool

    def figures(self) -> dict[str, Any]:
        """Entries of export.json."""
        return {
            "bit_identical_clips": self.clips,
            "accuracy": self.right.value,
            "ci95": [round(bound, 6) for bound in self.right.ci95],
            "difference_points": round(self.points, 4),
            "other_answers": self.others,
            "largest_code_difference": self.largest,
            "mean_code_difference": round(self.mean, 6),
            "feature_step": self.step,
            "trained_on_fixed_point": self.trained,
        }


class SoundModel:
    """The fixed-point front end and the integer model behind it, in Python."""

    def __init__(self, front_end: FixedFrontend, graph: IntegerGraph, wav: WavInput) -> None:
        self._front_end, self._graph, self._shift = front_end, graph, wav.shift
        self.samples = wav.clip_samples

    def codes(self, samples: Array) -> Array:
        """The model's features int16 [n, T, F] of samples int16 [n, S]: round_half_even(x / 2^shift), saturated."""
        made = np.asarray(self._front_end(samples), np.int64)
        scaled = rounding_shift(made, self._shift) if self._shift >= 0 else made << -self._shift
        return np.clip(scaled, *twos_complement(16)).astype(np.int16)

    def batch(self, samples: Array) -> Batch:
        """Samples with the features and logits that are expected of them."""
        codes = self.codes(samples)
        return Batch(samples, codes, logits_of(self._graph, codes), sound=True)


def check_clips(audio: AudioFile, data: FeatureFile, samples: int) -> None:
    """Raise KestrelError unless `audio` holds the clips of `data`, of `samples` samples each."""
    if audio.utt_ids != data.utt_ids or not np.array_equal(audio.labels, data.labels) or audio.shape[1] != samples:
        raise KestrelError(f"{audio.path} holds other clips than {data.path}: run stage 2 again with --force")


def prove_extremes(programs: Programs, model: SoundModel, samples: int) -> int:
    """Compare C with Python on the clips of `sound_extremes` and return their number. Raises KestrelError for another bit."""
    wild = sound_extremes(samples)
    return sum(len(batch.given) for batch in programs.prove(model.batch(part) for part in np.array_split(wild, 4)))


def prove_sound(
    programs: Programs,
    model: SoundModel,
    graph: IntegerGraph,
    audio: AudioFile,
    data: FeatureFile,
    logits: Array,
    progress: Callable[[int], None],
) -> Sound:
    """Compare C with Python on every clip of `audio`; `logits` [N, C] are the integer model's with float features.

    `progress` is called with the number of clips done. Raises KestrelError where a bit differs.
    """
    clips = audio.shape[0]
    tensor = graph.tensors[FEATURES]
    found, largest, total, done = np.zeros_like(logits), 0, 0, 0

    def batches() -> Iterator[Batch]:
        for start in range(0, clips, BATCH):
            yield model.batch(audio.rows(np.arange(start, min(start + BATCH, clips))))

    for batch in programs.prove(batches()):
        rows = np.arange(done, done + len(batch.given))
        difference = np.abs(batch.codes.astype(np.int64) - input_codes(data.rows(rows), tensor))
        largest, total = max(largest, int(difference.max())), total + int(difference.sum())
        found[rows] = batch.logits
        done += len(rows)
        progress(done)
    right, reference = accuracy(found, data.labels), accuracy(logits, data.labels)
    return Sound(
        clips=clips,
        largest=largest,
        mean=total / (clips * tensor.size),
        step=tensor.scale or 1.0,
        right=right,
        points=100 * (right.correct - reference.correct) / clips,
        others=int((found.argmax(axis=1) != logits.argmax(axis=1)).sum()),
        trained=made_in_fixed_point(data),
    )


def sound_extremes(samples: int, seed: int = 0) -> Array:
    """Clips that no corpus has, int16 [n, samples]: silence, full scale, single samples, tones, and noise of every loudness."""
    rng = np.random.default_rng(seed)
    at = np.arange(samples)
    low, high = -32768, 32767
    rows = [
        np.zeros(samples),
        np.full(samples, low),
        np.full(samples, high),
        np.where(at % 2, low, high),
        np.where(at // 40 % 2, low, high),
        np.where(at == samples // 2, low, 0),
        np.where(at == samples - 1, high, 0),
        high * np.sin(0.2 * at),
        high * np.sin(at**2 / samples),
        np.where(at < samples // 2, 0, rng.integers(low, high + 1, samples)),
    ]
    noise = (
        rng.normal(0, 1, (RANDOM_CLIPS - len(rows), samples))
        * np.geomspace(0.5, 60000, RANDOM_CLIPS - len(rows))[:, None]
    )
    return np.clip(np.rint(np.concatenate([np.stack(rows), noise])), low, high).astype(np.int16)
