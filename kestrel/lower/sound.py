"""From sound to class in integers: packed audio, the fixed-point front end, the integer model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kestrel.errors import KestrelError
from kestrel.frontend.fixed import FixedFeatures
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.spotter import BATCH, FEATURES, LOGITS, made_in_fixed_point
from kestrel.models.evaluate import Accuracy, ProgressCallback, accuracy
from kestrel.settings import build

if TYPE_CHECKING:
    from kestrel.store.hdf5 import AudioFile, FeatureFile

ALLOWED_POINTS = 0.3  # accuracy that the fixed-point front end may cost, in points


@dataclass(frozen=True)
class SoundAnswers:
    """The integer model behind the fixed-point front end, beside the same model with the features of the feature file.

    Differences are those of the model's input codes; None where the features of the file are fixed-point themselves.
    """

    right: Accuracy
    same: int  # clips with the same answer
    points: float  # accuracy less that with float features, in points
    largest: int | None
    mean: float | None
    step: float  # what a code stands for, in the unit of the features

    @property
    def only(self) -> bool:
        """Whether there are no float features to compare with: the network was trained on fixed-point ones."""
        return self.largest is None

    def figures(self) -> dict[str, Any]:
        """Entries of result.json."""
        compared = (
            {"compared_with": "nothing: the features are those of the fixed-point front end"}
            if self.largest is None or self.mean is None
            else {
                "compared_with": "integer model with float features",
                "difference_points": round(self.points, 4),
                "other_answers": self.right.n - self.same,
                "max_code_difference": self.largest,
                "mean_code_difference": round(self.mean, 6),
            }
        )
        return {
            "fixed_frontend_accuracy": self.right.value,
            "fixed_frontend_ci95": [round(bound, 6) for bound in self.right.ci95],
            "fixed_frontend": {**compared, "n": self.right.n, "code_step": self.step},
        }


def sound_answers(
    graph: IntegerGraph,
    data: FeatureFile,
    logits: np.ndarray,
    audio: AudioFile | None,
    progress: ProgressCallback | None = None,
) -> SoundAnswers:
    """Run every clip of `audio` through the front end that made `data`, in fixed point, and through `graph`.

    `logits` [N, C] are those of `graph` for the features of `data`. Fixed-point features are taken as they are, without audio.
    Raises KestrelError, in a line that says why, where there is no sound, it holds other clips, or the front end has no
    fixed-point form.
    """
    tensor = graph.tensors[FEATURES]
    assert tensor.scale is not None
    reference = accuracy(logits, data.labels)
    if made_in_fixed_point(data):
        return SoundAnswers(reference, reference.n, 0.0, None, None, tensor.scale)
    if audio is None:
        raise KestrelError(
            "the features come without packed audio (made elsewhere, or removed), so no sound can be run"
        )
    front_end = front_end_for(data, audio, tensor.shape)
    found, largest, total = np.zeros_like(logits), 0, 0
    for start in range(0, len(logits), BATCH):
        rows = np.arange(start, min(start + BATCH, len(logits)))
        features = front_end(torch.from_numpy(audio.rows(rows))).numpy()
        codes = input_codes(features, tensor)
        difference = np.abs(codes.astype(np.int64) - input_codes(data.rows(rows), tensor))
        largest, total = max(largest, int(difference.max())), total + int(difference.sum())
        found[rows] = graph.run(codes)[LOGITS]
        if progress is not None:
            progress(int(rows[-1]) + 1, len(logits))
    right = accuracy(found, data.labels)
    return SoundAnswers(
        right=right,
        same=int((found.argmax(axis=1) == logits.argmax(axis=1)).sum()),
        points=100 * (right.correct - reference.correct) / right.n,
        largest=largest,
        mean=total / (right.n * tensor.size),
        step=tensor.scale,
    )


def front_end_for(data: FeatureFile, audio: AudioFile, shape: tuple[int, ...]) -> FixedFeatures:
    """The fixed-point form of the front end that made `data` from `audio`, for a model with features `shape` (T, F).

    Raises KestrelError as sound_answers.
    """
    front_end = FixedFeatures(build(FrontendSpec, dict(data.frontend), "the front end of the features"))
    if audio.utt_ids != data.utt_ids or not np.array_equal(audio.labels, data.labels):
        raise KestrelError(f"{audio.path.name} of the packed audio holds other clips: run stage 2 again with --force")
    if audio.sample_rate != front_end.spec.sample_rate:
        raise KestrelError(f"the packed audio has {audio.sample_rate} samples per second, the front end takes others")
    made = (front_end.frames(audio.shape[1]), front_end.width)
    if made != tuple(shape):
        raise KestrelError(f"the front end makes features {made} of the packed audio, the model takes {tuple(shape)}")
    return front_end
