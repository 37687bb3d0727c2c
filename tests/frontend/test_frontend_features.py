"""Front ends against torchaudio in float64, a naive definition, and themselves in other batches."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import UsageError
from kestrel.frontend._torchaudio import transforms
from kestrel.frontend.features import Frontend
from kestrel.frontend.filters import analysis_window, dct_matrix, frame_count, mel_filters
from kestrel.frontend.spec import FrontendSpec
from kestrel.frontend.spectrum import (
    FoldedPower,
    FourierPower,
    SharedHalfPower,
    largest_prime_factor,
    power_spectrum,
)
from kestrel.settings import build, load_yaml

ROOT = Path(__file__).resolve().parents[2]
OTHERS = {"filters: iir", "arithmetic: shift-add"}  # front ends with tests of their own
CONF = sorted(
    path
    for path in (ROOT / "conf" / "frontends").glob("*.yaml")
    if not OTHERS & {line.partition("#")[0].strip() for line in path.read_text().splitlines()}
)
SHAPES = {
    "iscas21": (50, 40),
    "hello_edge": (49, 10),
    "hello_edge40": (49, 40),
    "spartus": (61, 16),
    "nas_kws": (51, 10),
    "nas_kws20": (51, 20),
    "nas_kws40": (51, 40),
    "tinyspeech": (94, 12),
    "logmel40": (98, 40),
}


def spec_of(name: str) -> FrontendSpec:
    return build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / f"{name}.yaml"), name)


def clips(count: int = 6, samples: int = 16000, seed: int = 0) -> torch.Tensor:
    """Noise with a falling spectrum under a slow envelope, from very quiet to loud; float32 [count, samples]."""
    draw = np.random.default_rng(seed)
    spectrum = np.fft.rfft(draw.standard_normal((count, samples)))
    spectrum /= np.maximum(20.0, np.arange(spectrum.shape[1]))
    wave = np.fft.irfft(spectrum, samples) * (0.02 + np.sin(np.pi * np.arange(samples) / samples) ** 4)
    wave *= np.geomspace(0.003, 0.9, count)[:, None] / np.abs(wave).max(1, keepdims=True)
    codes = np.rint((wave + draw.normal(0, 1e-4, wave.shape)).clip(-1, 1) * 32767)
    return torch.from_numpy(codes / 32768.0).float()


def torchaudio_features(spec: FrontendSpec, wave: torch.Tensor, kind: torch.dtype = torch.float64) -> torch.Tensor:
    """Features [B, T, F] of torchaudio in `kind`, one clip at a time (its top_db looks at the whole batch)."""
    window = analysis_window(spec)
    options = {
        "n_fft": spec.n_fft, "win_length": spec.window, "hop_length": spec.hop, "window_fn": lambda _: window.to(kind),
        "f_min": spec.f_min, "f_max": spec.f_max, "n_mels": spec.mel_bands, "center": spec.center, "power": spec.power,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if spec.coefficients is None:
            mel = transforms.MelSpectrogram(spec.sample_rate, **options).to(kind)
            rows = [torch.log(mel(clip[None])[0].T + spec.log_floor) for clip in wave.to(kind)]
        else:
            mfcc = transforms.MFCC(
                spec.sample_rate, spec.coefficients, log_mels=spec.log == "ln", melkwargs=options
            ).to(kind)
            rows = [mfcc(clip[None])[0].T for clip in wave.to(kind)]
    return torch.stack(rows)


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_front_end_has_its_papers_shape(path: Path) -> None:
    spec = build(FrontendSpec, load_yaml(path), path.stem)
    assert spec.name == path.stem
    frontend = Frontend(spec)
    features = frontend(clips(2))
    assert tuple(features.shape[1:]) == (frontend.frames(16000), frontend.width) == SHAPES[path.stem]
    assert features.dtype == torch.float32 and torch.isfinite(features).all()


EXPRESSIBLE = [name for name in SHAPES if name not in ("spartus", "logmel40")]


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_equals_torchaudio(name: str) -> None:
    spec = spec_of(name)
    wave = clips(12)
    assert (Frontend(spec)(wave) - torchaudio_features(spec, wave)).abs().max() <= 1e-3


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_extreme_clips_are_as_exact_as_float32_allows(name: str) -> None:
    """Full-scale tones and clicks leave bins near zero, where torchaudio's own error in float32 is the bar."""
    spec = spec_of(name)
    time = torch.arange(16000)
    click = torch.zeros(16000)
    click[5000] = 1.0
    tones = [0.9 * torch.sin(2 * math.pi * hertz / 16000 * time) for hertz in (440, 3100)]
    wave = torch.stack(
        [*tones, torch.sign(torch.sin(0.04 * time + 0.1)), click, torch.full((16000,), 0.25), torch.zeros(16000)]
    )
    exact, single = torchaudio_features(spec, wave), torchaudio_features(spec, wave, torch.float32)
    for mine, wanted, theirs in zip(Frontend(spec)(wave), exact, single, strict=True):
        allowed = max(1e-3, 2e-6 * wanted.abs().max(), 2 * (theirs - wanted).abs().max())
        assert (mine - wanted).abs().max() <= allowed


def test_window_framing_equals_torchaudio_on_moved_audio() -> None:
    spec = spec_of("logmel40")
    wave = clips()
    lead = (spec.n_fft - spec.window) // 2
    moved = torch.nn.functional.pad(wave, (lead, spec.n_fft - spec.window - lead))
    wanted = torchaudio_features(spec, moved)[:, : SHAPES["logmel40"][0]]
    assert (Frontend(spec)(wave) - wanted).abs().max() <= 1e-3


def naive_spartus(codes: np.ndarray) -> np.ndarray:
    """The log filter bank of DeltaRNN, one frame and one filter at a time, from int16 samples."""
    samples = codes.astype(np.int64) << 16
    frames = math.ceil(abs(len(samples) - 262) / 262)
    samples = np.append(samples, np.zeros(max(0, frames * 262 - len(samples)), np.int64))
    corners = [6, 14, 23, 33, 45, 58, 74, 92, 112, 136, 163, 195, 231, 273, 320, 376, 439, 512]
    features = np.zeros((frames, 16))
    for t in range(frames):
        magnitude = np.abs(np.fft.rfft(samples[262 * t : 262 * t + 262] * np.hamming(262), 1024)) / 1024
        for band in range(16):
            low, middle, high = corners[band : band + 3]
            rising = sum(magnitude[k] * (k - low) / (middle - low) for k in range(low, middle))
            falling = sum(magnitude[k] * (high - k) / (high - middle) for k in range(middle, high))
            total = rising + falling
            features[t, band] = 20 * math.log10(total if total != 0 else np.finfo(float).eps)
    return features


@pytest.mark.parametrize("samples", [16000, 15982, 16300, 100])
def test_spartus_equals_its_definition(samples: int) -> None:
    codes = np.rint(clips(2, 16384)[1].numpy()[:samples] * 32768).astype(np.int16)
    codes[: min(1000, samples // 2)] = 0  # whole frames of zeros
    features = Frontend(spec_of("spartus"))(torch.from_numpy(codes)[None])[0]
    wanted = naive_spartus(codes)
    assert features.shape == wanted.shape
    assert np.abs(features.numpy() - wanted).max() <= 1e-3
    if samples > 2000:
        assert features[0, 0] == pytest.approx(20 * math.log10(np.finfo(float).eps), abs=1e-3)


def test_spartus_filter_corners_are_those_of_the_paper() -> None:
    bank = mel_filters(spec_of("spartus"))
    corners = [6, 14, 23, 33, 45, 58, 74, 92, 112, 136, 163, 195, 231, 273, 320, 376, 439, 512]
    for band in range(16):
        assert bank[:, band].argmax() == corners[band + 1] and bank[corners[band + 1], band] == 1
        assert bank[: corners[band] + 1, band].sum() == 0 and bank[corners[band + 2] :, band].sum() == 0


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_clip_does_not_depend_on_its_batch(name: str) -> None:
    """Bit by bit: stage 2, training and scoring see the same features whatever their batches are."""
    frontend = Frontend(spec_of(name))
    wave = clips(37)
    together = frontend(wave)
    for size in (1, 2, 5, 8, 16, 19):
        for start in (0, 18):
            assert torch.equal(frontend(wave[start : start + size]), together[start : start + size])
    assert torch.equal(frontend(wave.flip(0)).flip(0), together)


def test_top_db_looks_at_one_clip_only() -> None:
    frontend = Frontend(spec_of("nas_kws"))
    quiet, loud = clips(1) * 1e-3, clips(2, seed=1)[1:]
    assert torch.equal(frontend(torch.cat([quiet, loud]))[:1], frontend(quiet))


def test_top_db_bounds_the_range_of_a_clip() -> None:
    spec = FrontendSpec(name="x", log="db", log_floor=1e-10, top_db=30.0, mel_bands=40)
    features = Frontend(spec)(clips())
    assert (features.amax((1, 2)) - features.amin((1, 2)) <= 30.0 + 1e-4).all()
    free = Frontend(FrontendSpec(name="x", log="db", log_floor=1e-10, mel_bands=40))(clips())
    assert (free.amax((1, 2)) - free.amin((1, 2)) > 31.0).all()
    assert torch.allclose(features, torch.maximum(free, free.amax((1, 2), keepdim=True) - 30.0), atol=1e-4)


def test_int16_samples_are_the_same_clip_and_stay_unchanged() -> None:
    frontend = Frontend(spec_of("iscas21"))
    codes = (clips(3) * 32768).round().to(torch.int16)
    before = codes.clone()
    assert torch.equal(frontend(codes), frontend(codes.float() / 32768))
    assert torch.equal(codes, before)


@settings(max_examples=40, deadline=None)
@given(
    n_fft=st.sampled_from([16, 23, 40, 61, 64, 101, 128]),
    shorter=st.integers(0, 12),
    hop=st.integers(3, 40),
    samples=st.integers(130, 400),
    center=st.booleans(),
    framing=st.sampled_from(["fft", "window"]),
    power=st.sampled_from([1.0, 2.0, 1.5]),
    window=st.sampled_from(["hann", "hamming"]),
    log=st.sampled_from(["ln", "db", "db20"]),
    mel_bands=st.integers(1, 40),
    kept=st.none() | st.integers(1, 40),
    rule=st.sampled_from(["htk", "bins"]),
)
def test_equals_a_naive_definition(
    n_fft: int, shorter: int, hop: int, samples: int, center: bool, framing: str, power: float, window: str, log: str,
    mel_bands: int, kept: int | None, rule: str,
) -> None:  # fmt: skip
    center = center and framing == "fft"
    spec = FrontendSpec(
        name="x", window=n_fft - shorter, n_fft=n_fft, hop=hop, center=center, framing=framing, power=power,  # type: ignore[arg-type]
        window_function=window, log=log, log_floor=1e-5, mel_bands=mel_bands, mel_rule=rule, f_min=100.0,  # type: ignore[arg-type]
        coefficients=None if kept is None else min(kept, mel_bands), spectrum_scale=0.5,
    )  # fmt: skip
    wave = clips(2, samples, seed=samples)
    features = Frontend(spec)(wave).double()
    bank, taper = mel_filters(spec).double().numpy(), analysis_window(spec).numpy()
    for clip, mine in zip(wave.double().numpy(), features.numpy(), strict=True):
        x = np.pad(clip, n_fft // 2, mode="reflect") if center else np.append(clip, np.zeros(spec.window))
        offset = (n_fft - spec.window) // 2 if framing == "fft" else 0
        assert len(mine) == frame_count(spec, samples)
        for t, row in enumerate(mine):
            frame = x[t * hop + offset : t * hop + offset + spec.window] * taper
            mel = (0.5 * np.abs(np.fft.rfft(frame, n_fft))) ** power @ bank
            values = (
                np.log(mel + 1e-5) if log == "ln" else {"db": 10, "db20": 20}[log] * np.log10(np.maximum(mel, 1e-5))
            )
            if spec.coefficients is not None:
                values = values @ dct_matrix(mel_bands, spec.coefficients).numpy()
            assert np.abs(row - values).max() <= 2e-3


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 3000),
    window=st.integers(2, 300),
    hop=st.integers(1, 300),
    center=st.booleans(),
    longer=st.integers(0, 99),
)
def test_frame_count_is_that_of_torch_stft(samples: int, window: int, hop: int, center: bool, longer: int) -> None:
    spec = FrontendSpec(name="x", window=window, hop=hop, n_fft=window + longer, center=center)
    try:
        frames = frame_count(spec, samples)
    except UsageError:
        assert samples <= spec.n_fft // 2 if center else samples < spec.n_fft
        return
    stft = torch.stft(
        torch.zeros(samples), spec.n_fft, hop, window, torch.ones(window), center=center, return_complex=True
    )
    assert frames == stft.shape[1]


@pytest.mark.parametrize(("window", "n_fft"), [(641, 641), (640, 640), (480, 1024), (262, 1024), (401, 443)])
def test_folded_product_and_fft_agree(window: int, n_fft: int) -> None:
    taper = (
        torch.hann_window(window, dtype=torch.float64)
        if window != 262
        else torch.hamming_window(262, False, dtype=torch.float64)
    )
    padded = clips(3, 4000)
    frames = 1 + (4000 - n_fft) // 160
    results = []
    for kind in (FoldedPower, FourierPower):
        power = kind(taper, n_fft, 160, (n_fft - window) // 2, 1, 64)
        out = torch.empty(3, frames, 64)
        power(padded, power.workspace(3, frames, padded.device), out)
        results.append(out)
    scale = results[1].amax((1, 2), keepdim=True)
    assert ((results[0] - results[1]).abs() / scale).max() < 1e-5


@pytest.mark.parametrize(
    ("n_fft", "first_bin", "bins"), [(23, 0, 12), (29, 3, 5), (61, 1, 30), (101, 0, 51), (641, 1, 160)]
)
def test_shared_halves_and_fft_agree(n_fft: int, first_bin: int, bins: int) -> None:
    hop = n_fft // 2
    taper = 3.0 * torch.hann_window(n_fft, dtype=torch.float64)
    padded = clips(3, 5 * hop + 7 + n_fft) + 0.1  # a constant is what the window must keep out of other bins
    frames = 1 + (padded.shape[1] - n_fft) // hop
    power = power_spectrum(taper, n_fft, hop, 0, first_bin, bins)
    assert isinstance(power, SharedHalfPower)
    found = torch.empty(3, frames, bins)
    power(padded, power.workspace(4, frames, padded.device), found)
    framed = padded.double().unfold(1, n_fft, hop) * taper
    wanted = torch.fft.rfft(framed).abs().square()[..., first_bin : first_bin + bins]
    peak = framed.abs().sum(-1, keepdim=True).square()
    assert ((found - wanted).abs() / peak).max() < 1e-6
    assert ((found - wanted).abs() <= 1e-3 * wanted + 1e-9 * peak).all()


def test_the_way_to_the_spectrum_follows_the_sizes() -> None:
    hann = torch.hann_window(641, dtype=torch.float64)
    hamming = torch.hamming_window(641, False, dtype=torch.float64)
    for window, n_fft, hop, kind in (
        (torch.hann_window(640, dtype=torch.float64), 640, 320, FourierPower),
        (hann, 641, 320, SharedHalfPower),
        (hann, 641, 319, FoldedPower),
        (hamming, 641, 320, FoldedPower),
        (hann, 1024, 320, FourierPower),
        (hann, 643, 320, FoldedPower),
    ):
        assert type(power_spectrum(window, n_fft, hop, 0, 1, 16)) is kind


def test_folding_refuses_a_lopsided_window() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        FoldedPower(torch.arange(1, 9).double(), 8, 4, 0, 0, 4)


def test_largest_prime_factor() -> None:
    assert [largest_prime_factor(n) for n in (2, 640, 641, 1024, 2 * 331)] == [2, 5, 641, 2, 331]


def test_empty_filters_are_named() -> None:
    frontend = Frontend(spec_of("iscas21"))
    empty = frontend.empty_filters()
    assert len(empty) == 6
    assert (mel_filters(frontend.spec)[:, empty] == 0).all()
    line = frontend.describe_empty_filters()
    assert line is not None and "6 of 160" in line and "Hz" in line and "\n" not in line
    assert Frontend(spec_of("nas_kws")).describe_empty_filters() is None


def test_front_end_of_only_empty_filters_is_its_floor() -> None:
    spec = FrontendSpec(name="x", f_min=1.0, f_max=5.0, mel_bands=4)
    frontend = Frontend(spec)
    assert frontend.empty_filters() == [0, 1, 2, 3]
    assert torch.allclose(frontend(clips(2)), torch.tensor(math.log(1e-6)))


def test_dct_is_orthonormal() -> None:
    matrix = dct_matrix(40, 40)
    assert torch.allclose(matrix.T @ matrix, torch.eye(40, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 700}, "longer than n_fft"),
        ({"f_min": 9000.0}, "not below f_max"),
        ({"f_max": 9000.0}, "half the sample rate"),
        ({"coefficients": 41}, "more than mel_bands"),
        ({"framing": "window"}, "center: false"),
        ({"top_db": 80.0}, "log: db"),
        ({"log_floor": 0.0}, "log_floor"),
    ],
)
def test_contradicting_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Frontend(FrontendSpec(**{"name": "mine", **change}))
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("center", "samples"), [(True, 320), (False, 639)])
def test_too_short_clips_are_refused(center: bool, samples: int) -> None:
    frontend = Frontend(FrontendSpec(name="x", center=center))
    with pytest.raises(UsageError, match="too short"):
        frontend(torch.zeros(1, samples))
    assert frontend(torch.zeros(1, samples + 1)).shape[1] >= 1


def test_wrong_number_of_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="wave"):
        Frontend(FrontendSpec(name="x"))(torch.zeros(16000))


def test_holds_no_trained_state_and_can_be_copied() -> None:
    frontend = Frontend(spec_of("iscas21"))
    assert frontend.state_dict() == {}
    wave = clips(2)
    assert torch.equal(copy.deepcopy(frontend)(wave), frontend(wave))
    assert not frontend(wave.requires_grad_()).requires_grad
    assert frontend(torch.zeros(0, 16000)).shape == (0, 50, 40)


def test_torchaudio_loads_without_its_compiled_extension() -> None:
    code = """
import logging, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchaudio._extension":
            raise OSError("libcudart.so.13: cannot open shared object file\\nmore lines")
sys.meta_path.insert(0, Broken())
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
from kestrel.frontend._torchaudio import transforms
import torch
print(tuple(transforms.MFCC(16000, 4, melkwargs={"n_mels": 8, "n_fft": 256})(torch.zeros(1, 1600)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 4,")
    lines = [line for line in done.stderr.splitlines() if line.startswith("kestrel DEBUG")]
    assert len(lines) == 1 and "cannot open shared object" in lines[0] and "more lines" not in lines[0]


def test_torchaudio_is_imported_in_one_place() -> None:
    places = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kestrel").rglob("*.py")
        if any(
            line.strip().startswith(("import torchaudio", "from torchaudio")) for line in path.read_text().splitlines()
        )
    ]
    assert places == ["kestrel/frontend/_torchaudio.py"]
