"""Constants of the shift-add front end: audio to features without a multiplier, in half a kilobyte of working memory.

The arithmetic that uses them is written down in docs/microcontroller.md. Everything is computed once in float64 and rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kestrel.digits import signed_digits
from kestrel.errors import UsageError
from kestrel.frontend.filters import check, filter_edges
from kestrel.frontend.spec import FrontendSpec

# Half-band low-pass of 19 taps: those of the odd samples, oldest last. Its middle tap, 256, is the only one of the even
# samples; all are over 512. -1.5 dB at 3.5 kHz, -40 dB above 5 kHz for 16 kHz in.
HALF_BAND = (2, -8, 20, -46, 160, 160, -46, 20, -8, 2)
HALF_BAND_MIDDLE = 256
HALF_BAND_SHIFT = 9
HALF_BAND_DELAY = 4  # the even sample under the middle tap, counted back from the latest pair

WINDOW = 256  # samples of a frame and length of the transform
POINTS = WINDOW // 2  # complex points of the transform in memory
STAGES = 7
QUARTER = 64  # angles of a quarter turn: 2 pi / 256 each
TWIDDLE_BITS = 11
TWIDDLE_DIGITS = 4
STAGE_BITS = 13  # magnitude before a stage: a + b (c + s) < 2^15
SPLIT_BITS = 12
RECIPROCAL_BITS = 10
LOG_BITS = 6  # a feature is an octave / 64
SCALE_BITS = 18  # spectrum in memory = windowed spectrum of samples in -1..1, times 2^(18 + exponent)

_Table = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ShiftAddTables:
    """Constants of one front end. Filter m rises over corners[m]..corners[m + 1] and falls to corners[m + 2]."""

    spec: FrontendSpec
    cosine: _Table  # [65] cos(2 pi i / 256) 2^11, each of at most 4 signed digits
    corners: _Table  # [bands + 2] bins
    reciprocal: _Table  # [bands + 1] 2^10 / distance of corners, rounded
    log_table: _Table  # [64] 64 log2 of the middle of 1 + i/64 .. 1 + (i + 1)/64, rounded
    floor: int  # code of the floor of the logarithm


def shift_add_tables(spec: FrontendSpec) -> ShiftAddTables:
    """All constants. Raises UsageError for settings that the shift-add front end cannot follow."""
    check(spec)
    _check_shift_add(spec)
    rate = spec.sample_rate // spec.decimation
    corners = np.array([math.floor((WINDOW + 1) * edge / rate) for edge in filter_edges(spec)], np.int32)
    widths = np.diff(corners)
    if widths.min() < 1 or corners[0] < 1:
        raise UsageError(
            f"front end {spec.name!r}: {spec.mel_bands} bands from {spec.f_min:g} Hz are narrower than the {rate / WINDOW:.1f} Hz "
            "between bins: fewer mel_bands, or a higher f_min"
        )
    corners[-1] = min(corners[-1], POINTS)
    middles = 1 + (np.arange(1 << LOG_BITS) + 0.5) / (1 << LOG_BITS)
    return ShiftAddTables(
        spec=spec,
        cosine=_few_digit_cosines(),
        corners=corners,
        reciprocal=np.floor((1 << RECIPROCAL_BITS) / np.diff(corners) + 0.5).astype(np.int32),
        log_table=np.floor((1 << LOG_BITS) * np.log2(middles) + 0.5).astype(np.int32),
        floor=math.floor((1 << LOG_BITS) * math.log2(spec.log_floor) + 0.5),
    )


def _few_digit_cosines() -> _Table:
    able = np.array([value for value in range((1 << TWIDDLE_BITS) + 1) if len(signed_digits(value)) <= TWIDDLE_DIGITS])
    wanted = np.cos(2 * np.pi * np.arange(QUARTER + 1) / WINDOW) * (1 << TWIDDLE_BITS)
    return able[np.abs(wanted[:, None] - able).argmin(1)].astype(np.int32)


def _check_shift_add(spec: FrontendSpec) -> None:
    fixed = {
        "window": WINDOW,
        "n_fft": WINDOW,
        "center": False,
        "framing": "fft",
        "window_function": "hann",
        "power": 1.0,
        "spectrum_scale": 1.0,
        "mel_rule": "bins",
        "log": "log2",
        "top_db": None,
        "coefficients": None,
    }
    for name, value in fixed.items():
        if getattr(spec, name) != value:
            raise UsageError(
                f"front end {spec.name!r}: arithmetic shift-add needs {name}: {value}, not {getattr(spec, name)}"
            )
    if spec.hop > WINDOW or spec.mel_bands > 32:
        raise UsageError(
            f"front end {spec.name!r}: arithmetic shift-add needs hop <= {WINDOW} and at most 32 mel_bands"
        )
