"""The clips of a split under noise at given signal-to-noise ratios.

Noise comes from the silence clips of the same split, which are windows of recordings that training does not see; which
one a clip gets depends on its name alone, so that every network, front end and ratio meets the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kestrel.corpus.augment import mixed
from kestrel.errors import KestrelError
from kestrel.frontend.make import AnyFrontend, makes_codes
from kestrel.models.evaluate import Accuracy, ProgressCallback, accuracy, predict
from kestrel.score.metrics import DIGITS
from kestrel.store.hashing import keyed_uniform
from kestrel.store.markdown import percent, table

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter
    from kestrel.store.hdf5 import AudioFile

SILENCE = "silence"  # the class whose clips are noise


class NoisyClips:
    """Features of packed audio with noise at `snr` dB; clips of silence stay as they are.

    Raises KestrelError where the split has no silence clips that are not all 0.
    """

    def __init__(self, audio: AudioFile, frontend: AnyFrontend, snr: float) -> None:
        if SILENCE not in audio.classes:
            raise KestrelError("score.snr: the protocol has no silence clips that noise could be taken from")
        self._audio, self._frontend, self.snr = audio, frontend, snr
        self._silent = np.asarray(audio.labels) == audio.classes.index(SILENCE)
        rows = np.flatnonzero(self._silent)
        heard = np.concatenate(
            [audio.rows(rows[start : start + 256]).any(1) for start in range(0, len(rows), 256)] or [np.zeros(0, bool)]
        )
        self._noise = rows[heard]
        if not len(self._noise):
            raise KestrelError("score.snr: all silence clips are 0, there is no noise to take from them")
        self.utt_ids = audio.utt_ids

    @property
    def shape(self) -> tuple[int, ...]:
        """(clips, frames, width)."""
        return len(self._silent), self._frontend.frames(int(self._audio.shape[1])), self._frontend.width

    def noise_row(self, row: int) -> int:
        """The silence clip whose noise clip `row` gets."""
        return int(self._noise[int(keyed_uniform("test noise", str(self.utt_ids[row])) * len(self._noise))])

    def rows(self, rows: np.ndarray, /) -> np.ndarray:
        """Features of these clips, float32 [n, T, F]."""
        speech = self._audio.rows(rows)
        noise = self._audio.rows(np.array([self.noise_row(int(row)) for row in rows]))
        out = np.empty(speech.shape, np.int16)
        for place, row in enumerate(rows):
            clip = speech[place] if self._silent[row] else np.rint(mixed(speech[place], noise[place], self.snr))
            out[place] = clip
        features = self._frontend(torch.from_numpy(out))
        return (features * self._frontend.scale if makes_codes(self._frontend) else features).float().numpy()


@dataclass(frozen=True)
class NoiseStudy:
    """Accuracy by signal-to-noise ratio in dB."""

    results: Mapping[float, Accuracy]

    def record(self) -> dict[str, Any]:
        """The entry `snr` of result.json."""
        return {
            f"{snr:g}": {"accuracy": right.value, "ci95": [round(bound, DIGITS) for bound in right.ci95], "n": right.n}
            for snr, right in self.results.items()
        }


def study(
    spotter: KeywordSpotter,
    audio: AudioFile | None,
    frontend: AnyFrontend | None,
    snrs: list[float],
    batch_size: int,
    next_pass: Callable[[], ProgressCallback],
) -> NoiseStudy | None:
    """The accuracies, None where no ratios are given. Raises KestrelError where there is no audio."""
    if not snrs:
        return None
    if audio is None or frontend is None:
        raise KestrelError("score.snr: noise is added to sound, and features made elsewhere come without it")
    labels = np.asarray(audio.labels)
    found = {}
    for snr in snrs:
        logits = predict(spotter, NoisyClips(audio, frontend, snr), batch_size, next_pass())
        found[float(snr)] = accuracy(logits, labels)
    return NoiseStudy(found)


def section(found: NoiseStudy | None, clean: Accuracy) -> str:
    """The report's section; empty where there is no study."""
    if found is None:
        return ""
    rows = [("clean", percent(clean.value, 2), _interval(clean))]
    rows += [(f"{snr:g} dB", percent(right.value, 2), _interval(right)) for snr, right in found.results.items()]
    text = (
        "Every clip but silence with noise from the silence clips of its split, which training does not see, at a ratio of mean "
        "powers; the same noise for every network."
    )
    return f"## Noise\n\n{text}\n\n" + table(("signal to noise", "accuracy", "95 % interval (Wilson)"), rows)


def _interval(right: Accuracy) -> str:
    low, high = right.ci95
    return f"{100 * low:.2f}-{100 * high:.2f} %"
