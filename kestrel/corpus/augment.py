"""Augmentation of training clips: of sound (time shift, noise, silence drawn anew) and of features (shift, masks).

Every draw is a number made from (seed, epoch, row, purpose) alone, so neither the order of the clips, nor the size of
the batches, nor the number of loader processes can change what a clip becomes.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kestrel.corpus.spec import AugmentSpec

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PEAK = 0.99  # of full scale
_FULL_SCALE = np.float32(1.0 / 32768.0)


def uniform(seed: int, epoch: int, purpose: str, rows: ArrayLike) -> NDArray[np.float64]:
    """Numbers in [0, 1) float64 [n], one for each row number, fixed by the arguments.

    Number `row` of the SplitMix64 generator (Steele, Lea and Flood 2014), whose state is a plain counter, started at a
    hash of seed, epoch and purpose.
    """
    digest = hashlib.sha256(f"{seed}:{epoch}:{purpose}".encode()).digest()
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        z = (
            np.uint64(int.from_bytes(digest[:8], "little"))
            + (np.asarray(rows).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mixed(speech: NDArray[Any], noise: NDArray[Any], snr: float) -> NDArray[np.float32]:
    """Speech with noise at a ratio of their mean powers of `snr` dB, float32 [S] in int16 units.

    What would exceed 0.99 of full scale is scaled down as a whole. Silent speech, and silent noise, stay as they are.
    """
    s, n = speech.astype(np.float64), noise.astype(np.float64)
    powers = np.square(s).mean(), np.square(n).mean()
    if min(powers) <= 0.0:
        return s.astype(np.float32)
    out = s + n * np.sqrt(powers[0] / powers[1] / 10.0 ** (snr / 10.0))
    peak = np.abs(out).max() / 32768.0
    return (out * (_PEAK / peak) if peak > _PEAK else out).astype(np.float32)


class Augmenter:
    """Augments batches of clips as `spec` says.

    `noise` int16 [M] holds recordings one after the other, `offsets` int64 [K + 1] their bounds (training part only).
    `silence_label` is the label of clips that are replaced by noise, None where there is no such class. Without noise,
    none is added and silence clips stay as they are.

    Speech: shifted by a whole number of samples, uniform in -max..max, zeros moving in; then, with probability
    `noise_frequency`, a random window of a random recording is added with a gain uniform in 0..`noise_volume`, or at a
    random one of the ratios `noise_snr` (see `mixed`).
    Silence: a random window with a gain uniform in 0..`silence_volume`, and nothing else.
    """

    def __init__(
        self,
        spec: AugmentSpec,
        noise: NDArray[np.int16],
        offsets: ArrayLike,
        sample_rate: int,
        silence_label: int | None,
        seed: int,
    ) -> None:
        self.spec = spec
        self.silence_label = silence_label
        self.seed = seed
        self.largest_shift = round(spec.time_shift_ms * sample_rate / 1000.0)
        bounds = np.asarray(offsets, dtype=np.int64)
        self._recordings = [noise[a:b] for a, b in itertools.pairwise(bounds) if b > a]

    def __call__(self, audio: NDArray[np.int16], labels: ArrayLike, rows: ArrayLike, epoch: int) -> Tensor:
        """float32 [B, S] in -1..1 of audio int16 [B, S], labels [B] and row numbers [B], which stay unchanged."""
        numbers, classes = np.asarray(rows), np.asarray(labels)
        if not (audio.ndim == 2 and len(audio) == len(numbers) == len(classes)):
            raise ValueError(
                f"audio {audio.shape}, labels {classes.shape} and rows {numbers.shape} do not fit together"
            )
        samples = audio.shape[1]
        draw: dict[str, Any] = {
            purpose: uniform(self.seed, epoch, purpose, numbers)
            for purpose in ("shift", "add noise", "recording", "window", "gain")
        }
        silent = (classes == self.silence_label) & bool(self._recordings)
        limit = min(self.largest_shift, samples)
        shifts = np.where(silent, 0, np.floor(draw["shift"] * (2 * limit + 1)).astype(np.int64) - limit)
        volume = np.where(silent, self.spec.silence_volume, self.spec.noise_volume)
        noisy = silent | (draw["add noise"] < self.spec.noise_frequency)
        gains = (draw["gain"] * volume * noisy).astype(np.float32)
        if self.spec.noise_snr:
            gains = np.where(silent, gains, noisy).astype(np.float32)  # of speech: whether it gets noise
        if not self._recordings:
            gains[:] = 0.0

        out = np.zeros(audio.shape, np.float32)
        scaled = np.empty(samples, np.float32)
        for index, clip in enumerate(out):  # one clip at a time stays in the processor's cache
            shift = int(shifts[index])
            if not silent[index]:
                clip[max(shift, 0) : samples + min(shift, 0)] = audio[index, max(-shift, 0) : samples - max(shift, 0)]
            if gains[index] > 0.0:
                window = self._window(draw["recording"][index], draw["window"][index], samples)
                if self.spec.noise_snr and not silent[index]:
                    choice = int(draw["gain"][index] * len(self.spec.noise_snr))
                    clip[:] = mixed(clip, window, self.spec.noise_snr[choice])
                    clip *= _FULL_SCALE
                    continue
                np.multiply(window, gains[index], out=scaled)
                clip += scaled
            clip *= _FULL_SCALE
            np.clip(clip, -1.0, 1.0, out=clip)
        return torch.from_numpy(out)

    def _window(self, recording: float, start: float, samples: int) -> NDArray[np.int16]:
        """A window int16 [samples], chosen by two numbers in [0, 1); a recording that is too short is repeated."""
        noise = self._recordings[int(recording * len(self._recordings))]
        if len(noise) < samples:
            first = int(start * len(noise))
            return np.resize(np.roll(noise, -first), samples)
        first = int(start * (len(noise) - samples + 1))
        return noise[first : first + samples]


class FeatureAugmenter:
    """Augments batches of features as `spec` says: shift and masks (SpecAugment, Park et al. 2019).

    Shift: by a whole number of frames, uniform in -shift_frames..shift_frames; the frame at the edge is repeated. Masks: each of
    `time_masks` stretches of 0..`time_mask` frames, and of `band_masks` stretches of 0..`band_mask` bands, takes the mean of
    its band over the clip. Widths and places are uniform.
    """

    def __init__(self, spec: AugmentSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed

    def __call__(self, features: Tensor, rows: ArrayLike, epoch: int) -> Tensor:
        """float [B, T, F] of features [B, T, F] and row numbers [B]; on the device of the features, which stay unchanged."""
        numbers, spec, device = np.asarray(rows), self.spec, features.device
        if features.dim() != 3 or len(features) != len(numbers):
            raise ValueError(f"features {tuple(features.shape)} and rows {numbers.shape} do not fit together")

        def whole(purpose: str, above: int | NDArray[np.int64]) -> Tensor:
            """Whole numbers in 0..`above` - 1, int64 [B, 1]."""
            drawn = uniform(self.seed, epoch, purpose, numbers) * above
            return torch.from_numpy(drawn.astype(np.int64)).to(device).unsqueeze(1)

        def inside(purpose: str, count: int, widest: int, size: int) -> Tensor:
            """Which of `size` places are in one of `count` stretches, bool [B, size]."""
            places = torch.arange(size, device=device)
            found = torch.zeros(len(numbers), size, dtype=torch.bool, device=device)
            for index in range(count):
                width = whole(f"{purpose} width {index}", min(widest, size) + 1)
                start = whole(f"{purpose} start {index}", (size + 1 - width[:, 0]).cpu().numpy())
                found |= (places >= start) & (places < start + width)
            return found

        frames, bands = features.shape[1:]
        if spec.shift_frames:
            shift = whole("shift frames", 2 * spec.shift_frames + 1) - spec.shift_frames
            source = (torch.arange(frames, device=device) - shift).clamp(0, frames - 1)  # [B, T]
            features = torch.gather(features, 1, source[:, :, None].expand(-1, -1, bands))
        masked = inside("frames", spec.time_masks, spec.time_mask, frames)[:, :, None]
        masked = masked | inside("bands", spec.band_masks, spec.band_mask, bands)[:, None, :]
        return torch.where(masked, features.mean(dim=1, keepdim=True), features)
