"""Definitions of a front end: framing, analysis window, mel filters and cosine transform."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from kestrel.errors import UsageError
from kestrel.frontend.spec import FrontendSpec


def check(spec: FrontendSpec) -> None:
    """Raise UsageError where the settings of a front end contradict each other."""
    problem = None
    if spec.window > spec.n_fft:
        problem = f"window {spec.window} is longer than n_fft {spec.n_fft}"
    elif spec.f_min >= spec.f_max:
        problem = f"f_min {spec.f_min:g} is not below f_max {spec.f_max:g}"
    elif spec.f_max > spec.sample_rate / spec.decimation / 2:
        problem = f"f_max {spec.f_max:g} is above half the sample rate, {spec.sample_rate / spec.decimation / 2:g}"
    elif spec.coefficients is not None and spec.coefficients > spec.mel_bands:
        problem = f"coefficients {spec.coefficients} is more than mel_bands {spec.mel_bands}"
    elif spec.framing == "window" and spec.center:
        problem = "framing: window needs center: false"
    elif spec.top_db is not None and spec.log == "ln":
        problem = "top_db needs log: db or db20"
    elif spec.log_floor <= 0:
        problem = "log_floor must be above 0, or silence becomes minus infinity"
    elif spec.arithmetic != "shift-add" and (spec.decimation != 1 or spec.log == "log2"):
        problem = "decimation 2 and log: log2 need arithmetic: shift-add"
    elif spec.filters == "iir" and (spec.framing != "window" or spec.coefficients is not None):
        problem = "filters: iir needs framing: window and no coefficients"
    elif spec.filters == "iir" and (spec.arithmetic != "float" or spec.log == "log2"):
        problem = "filters: iir has no fixed-point form: set arithmetic to float"
    if problem:
        raise UsageError(f"front end {spec.name!r}: {problem}")


def padding(spec: FrontendSpec) -> int:
    """Samples that centring reflects on either side of a clip."""
    return spec.n_fft // 2 if spec.center else 0


def frame_count(spec: FrontendSpec, samples: int) -> int:
    """Frames of a clip of `samples` samples. Raises UsageError where the clip is too short for one.

    framing fft: those of torch.stft. framing window: ceil(|samples - window| / hop), the last one padded with zeros
    (the definition of DeltaRNN's log filter bank, specs of Spartus).
    """
    if spec.framing == "window":
        if samples < 1:
            raise UsageError(f"front end {spec.name!r}: clips are empty")
        return max(1, math.ceil(abs(samples - spec.window) / spec.hop))
    samples //= spec.decimation
    needed = padding(spec) + 1 if spec.center else spec.n_fft
    if samples < needed:
        raise UsageError(f"front end {spec.name!r}: clips of {samples} samples are too short, {needed} are needed")
    return 1 + (samples + 2 * padding(spec) - spec.n_fft) // spec.hop


def analysis_window(spec: FrontendSpec) -> Tensor:
    """The window, float64 [window]: periodic Hann as torch.hann_window, or symmetric Hamming as numpy.hamming."""
    if spec.window_function == "hann":
        return torch.hann_window(spec.window, periodic=True, dtype=torch.float64)
    return torch.hamming_window(spec.window, periodic=False, dtype=torch.float64)


def _mel(frequency: float) -> float:
    return 2595.0 * math.log10(1.0 + frequency / 700.0)


def filter_edges(spec: FrontendSpec) -> list[float]:
    """The mel_bands + 2 corner frequencies in Hz, equally spaced in mel (HTK); filter m spans corners m to m + 2."""
    low, high = _mel(spec.f_min), _mel(spec.f_max)
    mels = [low + (high - low) * i / (spec.mel_bands + 1) for i in range(spec.mel_bands + 2)]
    return [700.0 * (10.0 ** (mel / 2595.0) - 1.0) for mel in mels]


def describe_empty_filters(spec: FrontendSpec, empty: list[int]) -> str | None:
    """One line about filters that no bin falls into, or None where `empty` names none."""
    if not empty:
        return None
    edges = filter_edges(spec)
    low, high = edges[empty[0]], edges[empty[-1] + 2]
    return (
        f"front end {spec.name}: {len(empty)} of {spec.mel_bands} mel filters are empty, between {low:.0f} and {high:.0f} Hz, "
        f"where they are narrower than the {spec.sample_rate / spec.n_fft:.1f} Hz between bins"
    )


def mel_filters(spec: FrontendSpec) -> Tensor:
    """Triangular filters, float32 [n_fft // 2 + 1, mel_bands].

    mel_rule htk: torchaudio's (corners between bins, no normalisation). mel_rule bins: corners rounded down to the bins
    floor((n_fft + 1) f / sample_rate), rising and falling linearly from bin to bin (Spartus, DeltaRNN).
    """
    bins = spec.n_fft // 2 + 1
    if spec.mel_rule == "htk":
        from kestrel.frontend._torchaudio import functional

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # empty filters are reported by the caller, with their range
            return functional.melscale_fbanks(bins, spec.f_min, spec.f_max, spec.mel_bands, spec.sample_rate)
    corners = [math.floor((spec.n_fft + 1) * edge / spec.sample_rate) for edge in filter_edges(spec)]
    bank = torch.zeros(bins, spec.mel_bands, dtype=torch.float64)
    for band in range(spec.mel_bands):
        low, centre, high = corners[band : band + 3]
        for k in range(low, centre):
            bank[k, band] = (k - low) / (centre - low)
        for k in range(centre, min(high, bins)):
            bank[k, band] = (high - k) / (high - centre)
    return bank.float()


def dct_matrix(width: int, kept: int) -> Tensor:
    """The first `kept` rows of the orthonormal DCT-II, transposed: float64 [width, kept], for x @ matrix."""
    angle = math.pi / width * torch.outer(torch.arange(width).double() + 0.5, torch.arange(kept).double())
    matrix = torch.cos(angle) * math.sqrt(2.0 / width)
    matrix[:, 0] = math.sqrt(1.0 / width)
    return matrix
