"""Clips with noise at a signal-to-noise ratio, and their place in a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from score_kit import CLASSES, FEATURE_SCALE, IDENTITY, PROTOCOL, PROVENANCE, feature_file, spotter

from kestrel.errors import KestrelError
from kestrel.frontend.extract import extract
from kestrel.frontend.make import make_frontend
from kestrel.frontend.spec import FrontendSpec
from kestrel.score.noisy import NoisyClips
from kestrel.score.run import score
from kestrel.store.hdf5 import AudioFile, AudioWriter, FeatureFile

SPEC = {"name": "toy", "n_fft": 64, "window": 64, "hop": 32, "mel_bands": 6, "center": False}
CLIPS, SAMPLES = 40, 288
SILENCE = CLASSES.index("silence")


def packed(folder: Path, silence: float = 500.0, seed: int = 0) -> AudioFile:
    draw = np.random.default_rng(seed)
    labels = np.arange(CLIPS) % len(CLASSES)
    loud = np.where(labels == SILENCE, silence, 4000.0)
    audio = np.rint(draw.normal(0, 1, (CLIPS, SAMPLES)) * loud[:, None]).clip(-32768, 32767).astype(np.int16)
    audio[0] = 0  # a clip without sound
    names = [f"clip{row}" for row in range(CLIPS)]
    writer = AudioWriter(
        folder / "audio.h5",
        labels=labels,
        utt_ids=names,
        speakers=names,
        clip_samples=SAMPLES,
        sample_rate=16000,
        classes=CLASSES,
        corpus="toy",
        protocol=PROTOCOL,
        split="test",
    )
    with writer:
        writer.append(audio)
    return AudioFile(folder / "audio.h5")


class Heard:
    """A front end that gives the samples themselves."""

    width, scale = 1, 1.0

    def frames(self, samples: int) -> int:
        return samples

    def __call__(self, wave):
        return wave[:, :, None].float()


def test_ratio_of_powers(tmp_path: Path) -> None:
    audio = packed(tmp_path)
    rows = np.arange(CLIPS)
    clean = audio.rows(rows).astype(np.float64)
    for snr in (20.0, 5.0, -5.0):
        clips = NoisyClips(audio, Heard(), snr)  # type: ignore[arg-type]
        made = clips.rows(rows)[:, :, 0].astype(np.float64)
        again = clips.rows(rows[::-1])[::-1, :, 0]
        np.testing.assert_array_equal(made, again)
        for row in rows:
            if audio.labels[row] == SILENCE or not clean[row].any():
                np.testing.assert_array_equal(made[row], clean[row])
                continue
            noise = clean[clips.noise_row(int(row))]
            weights, *_ = np.linalg.lstsq(np.stack([clean[row], noise], 1), made[row], rcond=None)
            ratio = (weights[0] ** 2 * np.square(clean[row]).mean()) / (weights[1] ** 2 * np.square(noise).mean())
            assert 10 * np.log10(ratio) == pytest.approx(snr, abs=0.1)
            assert np.abs(made[row]).max() <= 0.99 * 32768 + 1
    ten, five = (NoisyClips(audio, Heard(), snr) for snr in (10.0, 5.0))  # type: ignore[arg-type]
    assert [ten.noise_row(row) for row in range(9)] == [five.noise_row(row) for row in range(9)]
    assert len({ten.noise_row(row) for row in range(CLIPS)}) > 3


def test_a_split_without_noise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KestrelError, match="all silence clips are 0"):
        NoisyClips(packed(tmp_path, silence=0.0), Heard(), 5.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("arithmetic", ["float", "fixed"])
def test_a_score_has_the_accuracy_at_each_ratio(tmp_path: Path, arithmetic: str) -> None:
    audio, front_end = packed(tmp_path), make_frontend(FrontendSpec(**SPEC, arithmetic=arithmetic))
    extract(audio, front_end, tmp_path / "test.h5")
    arguments = {"identity": IDENTITY, "split": "test", "seed": 3, "chip": 0, "batch_size": 50}
    shared = {**arguments, "provenance": PROVENANCE, "feature_scale": FEATURE_SCALE}
    data = FeatureFile(tmp_path / "test.h5")
    result = score(spotter(), data, tmp_path / "score", audio=audio, frontend=front_end, snrs=[60, 0], **shared)
    assert set(result["snr"]) == {"60", "0"}
    assert result["snr"]["60"]["n"] == CLIPS
    assert result["snr"]["60"]["accuracy"] == pytest.approx(result["accuracy"], abs=0.05)
    report = (tmp_path / "score" / "report.md").read_text()
    assert "## Noise" in report and "| 0 dB |" in report
    with pytest.raises(KestrelError, match="noise is added to sound"):
        score(spotter(), feature_file(tmp_path / "made"), tmp_path / "other", snrs=[5], **shared)
