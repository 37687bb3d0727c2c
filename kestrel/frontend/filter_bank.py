"""A bank of recursive band-pass filters as a front end: what an analog filter bank in front of a network would measure.

Band m: a Butterworth band-pass filter of `order`, centre f_m and bandwidth f_m / quality; its output is rectified and
averaged over frames of `window` samples, and the logarithm is taken. The centres lie equally spaced in mel between f_min
and f_max, which are the corners beyond the first and last band.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.signal import butter, sosfilt
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.frontend.filters import check, filter_edges, frame_count
from kestrel.frontend.spec import FrontendSpec

_CLIPS = 64  # clips in work at a time
_FULL_SCALE = 32768.0


def band_edges(spec: FrontendSpec) -> list[tuple[float, float]]:
    """Lower and upper edge of each band in Hz. Raises UsageError where one lies above half the sample rate."""
    edges = [(f * (1 - 0.5 / spec.quality), f * (1 + 0.5 / spec.quality)) for f in filter_edges(spec)[1:-1]]
    if edges[-1][1] >= spec.sample_rate / 2:
        raise UsageError(
            f"front end {spec.name!r}: the highest band ends at {edges[-1][1]:.0f} Hz, above half the sample rate; lower f_max or "
            "raise quality"
        )
    return edges


class FilterBank(nn.Module):
    """The filter bank with the interface of features.Frontend; `width` = F, the number of bands.

    Raises UsageError where the settings contradict each other. Not differentiable. Holds no trained values: its state_dict is
    empty.
    """

    def __init__(self, spec: FrontendSpec) -> None:
        super().__init__()
        check(spec)
        self.spec, self.width = spec, spec.mel_bands
        edges = band_edges(spec)
        self.sections = [butter(spec.order, edge, "bandpass", fs=spec.sample_rate, output="sos") for edge in edges]

    def frames(self, samples: int) -> int:
        """T of a clip of `samples` samples; UsageError where it is too short."""
        return frame_count(self.spec, samples)

    def describe_empty_filters(self) -> str | None:
        """None: no band is empty."""
        return None

    @torch.no_grad()
    def forward(self, wave: Tensor) -> Tensor:
        """Features float32 [B, T, F] of wave [B, S]: float32 in -1..1, or int16 samples."""
        if wave.dim() != 2:
            raise ValueError(f"expected wave [B, S], got {tuple(wave.shape)}")
        samples = wave.detach().cpu().double().numpy() / (_FULL_SCALE if wave.dtype == torch.int16 else 1.0)
        parts = [self._features(samples[start : start + _CLIPS]) for start in range(0, len(samples), _CLIPS)]
        made = np.concatenate(parts) if parts else np.zeros((0, self.frames(wave.shape[1]), self.width))
        return torch.from_numpy(made).float().to(wave.device)

    def _features(self, clips: np.ndarray) -> np.ndarray:
        spec, frames = self.spec, self.frames(clips.shape[1])
        places = np.arange(frames)[:, None] * spec.hop + np.arange(spec.window)  # [T, window]
        tail = max(0, int(places[-1, -1]) + 1 - clips.shape[1])
        padded = np.pad(clips, ((0, 0), (0, tail)))
        out = np.empty((len(clips), frames, self.width))
        for band, sections in enumerate(self.sections):
            level = np.abs(sosfilt(sections, padded, axis=1)) * spec.spectrum_scale
            out[:, :, band] = level[:, places].mean(axis=2)
        if spec.log == "ln":
            return np.log(out + spec.log_floor)
        levels = {"db": 10.0, "db20": 20.0}[spec.log] * np.log10(np.maximum(out, spec.log_floor))
        if spec.top_db is not None:
            levels = np.maximum(levels, levels.max(axis=(1, 2), keepdims=True) - spec.top_db)
        return levels
