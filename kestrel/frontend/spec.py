"""Settings of a front end and of feature post-processing (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kestrel.settings import setting, to_dict


@dataclass
class FrontendSpec:
    """Audio to features; one YAML file in conf/frontends each."""

    name: str = setting("", "name of the front end, used for feat/<corpus>/<protocol>/<name>")
    sample_rate: int = setting(16000, "samples per second", min=1000)
    decimation: int = setting(
        1,
        "1, or 2: a half-band filter halves the rate first (arithmetic shift-add); lengths count what it leaves",
        min=1,
        max=2,
    )
    window: int = setting(640, "samples of the analysis window", min=2)
    hop: int = setting(320, "samples between frames", min=1)
    n_fft: int = setting(640, "length of the Fourier transform", min=2)
    center: bool = setting(True, "centre the first frame on sample 0 (reflect padding) or start the frame there")
    framing: Literal["fft", "window"] = setting(
        "fft",
        "fft: frames of n_fft samples with the window in their middle; window: frames of `window` samples, no centring",
    )
    filters: Literal["mel", "iir"] = setting(
        "mel",
        "mel: triangles over a Fourier transform; iir: recursive band-pass filters, rectified and averaged by frame",
    )
    quality: float = setting(3.0, "filters iir: centre of a band / its width", min=0.6, max=1000)
    order: int = setting(2, "filters iir: order of a Butterworth band-pass filter", min=1, max=8)
    window_function: Literal["hann", "hamming"] = setting("hann", "analysis window: periodic Hann or symmetric Hamming")
    power: float = setting(2.0, "exponent of the magnitude spectrum (2 = power, 1 = magnitude)", min=0.5, max=2)
    spectrum_scale: float = setting(1.0, "factor on the spectrum, before its exponent", min=0)
    mel_bands: int = setting(40, "triangular filters on the mel scale", min=1, max=512)
    mel_rule: Literal["htk", "bins"] = setting("htk", "htk: torchaudio's filters; bins: corners rounded down to bins")
    f_min: float = setting(0.0, "lower edge of the filters in Hz", min=0)
    f_max: float = setting(8000.0, "upper edge of the filters in Hz", min=1)
    log: Literal["ln", "db", "db20", "log2"] = setting(
        "ln", "ln(x + log_floor), 10 log10 max(x, log_floor), 20 log10 or log2 of it (log2: arithmetic shift-add)"
    )
    log_floor: float = setting(1e-6, "see log", min=0)
    top_db: float | None = setting(
        None, "raise each clip's values to this far below its own maximum (log db or db20)", min=0
    )
    coefficients: int | None = setting(None, "DCT-II (ortho) coefficients kept; null = log filter bank", min=1)
    arithmetic: Literal["float", "fixed", "shift-add"] = setting(
        "float",
        "fixed: the integer front end of the C runtime, for training too; features are int16 codes. shift-add: that of "
        "processors without a multiplier",
    )


def stored(spec: FrontendSpec) -> dict[str, Any]:
    """The settings as feature files and done-markers hold them; those that came later only where they are not usual.

    So features are the same bytes as before these settings existed, and nothing that was made from them is outdated.
    """
    settings = to_dict(spec)
    if spec.arithmetic == "float":
        del settings["arithmetic"]
    if spec.decimation == 1:
        del settings["decimation"]
    if spec.filters == "mel":
        for name in ("filters", "quality", "order"):
            del settings[name]
    return settings


@dataclass
class FeatureSpec:
    """Which front end, and the steps applied to any feature file before the network."""

    frontend: str = setting("logmel40", "a file of conf/frontends, without its ending")
    post: list[Any] = setting(
        [], "ordered steps: normalise: channel|global, dct: K, stack: N, average: N, bands: N, crop: [START, STOP]"
    )
