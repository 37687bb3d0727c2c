"""The bank of recursive filters against its definition sample by sample, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import butter, tf2sos

from kestrel.errors import UsageError
from kestrel.frontend.features import Frontend
from kestrel.frontend.filter_bank import FilterBank, band_edges
from kestrel.frontend.filters import filter_edges
from kestrel.frontend.make import make_frontend, makes_codes
from kestrel.frontend.spec import FrontendSpec, stored
from kestrel.settings import build, load_yaml, to_dict

ROOT = Path(__file__).resolve().parents[2]
SPEC = build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / "spartus_iir.yaml"), "front end")


def tones(frequencies: list[float], samples: int = 16000) -> torch.Tensor:
    time = np.arange(samples) / 16000
    return torch.from_numpy(0.5 * np.sin(2 * np.pi * np.array(frequencies)[:, None] * time)).float()


def naive(clip: np.ndarray, spec: FrontendSpec) -> np.ndarray:
    """Difference equations in direct form, frame after frame."""
    frames = FilterBank(spec).frames(len(clip))
    padded = np.concatenate([clip, np.zeros(frames * spec.hop + spec.window - len(clip) + spec.hop)])
    out = np.zeros((frames, spec.mel_bands))
    for band, edge in enumerate(band_edges(spec)):
        signal = padded
        for b0, b1, b2, _, a1, a2 in tf2sos(*butter(spec.order, edge, "bandpass", fs=spec.sample_rate)):
            y, past_x, past_y = np.zeros_like(signal), [0.0, 0.0], [0.0, 0.0]
            for n, x in enumerate(signal):
                y[n] = b0 * x + b1 * past_x[0] + b2 * past_x[1] - a1 * past_y[0] - a2 * past_y[1]
                past_x, past_y = [x, past_x[0]], [y[n], past_y[0]]
            signal = y
        for frame in range(frames):
            level = np.abs(signal[frame * spec.hop : frame * spec.hop + spec.window]).mean() * spec.spectrum_scale
            out[frame, band] = 20 * np.log10(max(level, spec.log_floor))
    return out


def test_definition() -> None:
    spec = replace(SPEC, mel_bands=3)
    clip = np.random.default_rng(0).normal(0, 0.1, 1500)
    made = make_frontend(spec)(torch.from_numpy(clip).float()[None])[0].numpy()
    np.testing.assert_allclose(made, naive(clip.astype(np.float32).astype(np.float64), spec), atol=1e-3)


def test_shape_and_batches() -> None:
    frontend = make_frontend(SPEC)
    assert isinstance(frontend, FilterBank) and not makes_codes(frontend)
    wave = torch.randn(70, 16000, generator=torch.Generator().manual_seed(0)).mul(0.1)
    made = frontend(wave)
    assert made.shape == (70, 61, 16) and made.dtype == torch.float32
    torch.testing.assert_close(frontend(wave[66:67]), made[66:67], rtol=0, atol=0)
    codes = (wave * 32768).round().clamp(-32768, 32767).to(torch.int16)
    torch.testing.assert_close(frontend(codes[:2]), frontend(codes[:2].float() / 32768), rtol=0, atol=1e-4)
    assert torch.isfinite(frontend(torch.zeros(1, 16000))).all()
    assert frontend(torch.zeros(0, 16000)).shape == (0, 61, 16)


def test_a_tone_is_loudest_in_its_band() -> None:
    centres = filter_edges(SPEC)[1:-1]
    made = FilterBank(SPEC)(tones(centres))  # [16, 61, 16]
    steady = made[:, 20:, :].mean(1)
    assert steady.argmax(1).tolist() == list(range(16))
    # The mean of a rectified sine is 2 / pi of its height; in the middle of its band a filter passes it as it is.
    expected = 20 * np.log10(0.5 * 2 / np.pi * SPEC.spectrum_scale)
    np.testing.assert_allclose(steady.diagonal().numpy(), expected, atol=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f_max": 8000, "quality": 0.7}, "highest band ends at"),
        ({"framing": "fft"}, "needs framing: window"),
        ({"coefficients": 10}, "no coefficients"),
        ({"arithmetic": "fixed"}, "has no fixed-point form"),
    ],
)
def test_settings_that_contradict_each_other(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_frontend(replace(SPEC, **change))


def test_other_front_ends_are_stored_as_before() -> None:
    plain = FrontendSpec(name="a")
    assert not {"filters", "quality", "order"} & set(stored(plain))
    assert isinstance(make_frontend(plain), Frontend)
    assert stored(SPEC)["filters"] == "iir" and build(FrontendSpec, stored(SPEC)) == SPEC
    assert to_dict(SPEC)["quality"] == 3
