"""Stage 2: packed audio and noise from manifests, feature files from packed audio."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
import torch

from kestrel.corpus.audio import read_window
from kestrel.corpus.augment import Augmenter
from kestrel.corpus.manifest import Clip
from kestrel.corpus.spec import AugmentSpec
from kestrel.errors import KestrelError
from kestrel.frontend.extract import extract, pack_audio, pack_noise
from kestrel.frontend.features import Frontend
from kestrel.frontend.fixed import FixedFrontend
from kestrel.frontend.make import make_frontend
from kestrel.frontend.spec import FrontendSpec, stored
from kestrel.settings import build, load_yaml
from kestrel.store.hdf5 import AudioFile, FeatureFile, read_noise
from kestrel.train.data import Split

ROOT = Path(__file__).resolve().parents[2]
SPEC = FrontendSpec(name="small", mel_bands=20, coefficients=8)
PROTOCOL: dict[str, Any] = {
    "name": "tiny-3",
    "corpus": "tiny",
    "classes": ["yes", "no", "silence"],
    "hash": "0" * 64,
    "sample_rate": 16000,
    "clip_samples": 4000,
    "noise_files": ["main:_background_noise_/a.wav", "main:_background_noise_/b.flac"],
}


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[list[Clip], dict[str, Path]]:
    """Twenty clips of different lengths in two roots, wav and flac, and two silence windows with a gain."""
    draw = np.random.default_rng(0)
    roots = {"main": tmp_path / "main", "test": tmp_path / "elsewhere"}
    clips = []
    for index in range(20):
        root, suffix = ("test", "flac") if index % 3 == 0 else ("main", "wav")
        path = roots[root] / "yes" / f"s{index}_nohash_0.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = [4000, 3001, 5200][index % 3]
        soundfile.write(path, draw.integers(-9000, 9000, length).astype(np.int16), 16000)
        name = path.relative_to(roots[root]).as_posix()
        clips.append(Clip(f"yes/{path.stem}", f"{root}:{name}", "yes", index % 2, f"s{index}", 0, length, 1.0))
    for name, length in (("a.wav", 9001), ("b.flac", 12000)):
        path = roots["main"] / "_background_noise_" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, draw.integers(-9000, 9000, length).astype(np.int16), 16000)
    for start in (100, 3000):
        source = "main:_background_noise_/a.wav"
        clips.append(Clip(f"_silence_/a@{start}", source, "_silence_", 2, "", start, 4000, 0.25))
    return clips, roots


def source(clip: Clip, roots: dict[str, Path]) -> Path:
    root, _, name = clip.path.partition(":")
    return roots[root] / name


def test_packed_audio_is_the_manifest_in_order(tmp_path: Path, corpus: Any) -> None:
    clips, roots = corpus
    calls: list[tuple[int, int]] = []
    pack_audio(iter(clips), roots, PROTOCOL, "train", tmp_path / "audio" / "train.h5", lambda *n: calls.append(n))
    audio = AudioFile(tmp_path / "audio" / "train.h5")
    assert (
        audio.shape == (22, 4000) and audio.sample_rate == 16000 and audio.split == "train" and audio.corpus == "tiny"
    )
    assert audio.utt_ids == [clip.utt_id for clip in clips] and audio.speakers == [clip.speaker for clip in clips]
    assert audio.labels.tolist() == [clip.label for clip in clips] and audio.classes == PROTOCOL["classes"]
    assert audio.protocol == PROTOCOL and calls[-1] == (22, 22)
    for row, clip in enumerate(clips):
        wanted = read_window(source(clip, roots), clip.start, clip.samples, 4000, clip.gain)
        assert np.array_equal(audio.rows([row])[0], wanted)
    raw, _ = soundfile.read(source(clips[1], roots), dtype="int16")  # 3001 samples, centred in zeros
    assert np.array_equal(audio.rows([1])[0][499:3500], raw) and not audio.rows([1])[0][:499].any()
    noise, _ = soundfile.read(source(clips[-1], roots), dtype="int16")
    assert np.array_equal(audio.rows([21])[0], np.rint(noise[3000:7000] * 0.25).astype(np.int16))


def test_packs_do_not_depend_on_workers_or_blocks(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "test", tmp_path / "one.h5")
    monkeypatch.setattr("kestrel.frontend.extract._BLOCK", 3)
    pack_audio(clips, roots, PROTOCOL, "test", tmp_path / "two.h5", workers=4)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_noise_pack_holds_the_first_80_percent(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kestrel.frontend.extract._NOISE_BLOCK", 1000)
    _, roots = corpus
    pack_noise(PROTOCOL, roots, tmp_path / "noise.h5")
    noise, offsets, names = read_noise(tmp_path / "noise.h5")
    assert offsets.tolist() == [0, 7200, 16800] and names == PROTOCOL["noise_files"]
    for name, start, stop in zip(("a.wav", "b.flac"), offsets[:-1], offsets[1:], strict=True):
        raw, _ = soundfile.read(roots["main"] / "_background_noise_" / name, dtype="int16")
        assert np.array_equal(noise[start:stop], raw[: stop - start])


def test_protocol_without_noise(tmp_path: Path, corpus: Any) -> None:
    pack_noise(PROTOCOL | {"noise_files": []}, corpus[1], tmp_path / "noise.h5")
    assert len(read_noise(tmp_path / "noise.h5")[0]) == 0


def test_features_are_exactly_what_training_computes(
    tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "audio.h5")
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr("kestrel.frontend.extract._BLOCK", 9)
    with AudioFile(tmp_path / "audio.h5") as audio:
        extract(audio, Frontend(SPEC), tmp_path / "feat" / "train.h5", lambda *n: calls.append(n))
        features = FeatureFile(tmp_path / "feat" / "train.h5")
        order = np.array([20, 3, 3, 11, 0])
        wave = torch.from_numpy(audio.rows(order)).float() / 32768.0
        assert np.array_equal(features.rows(order), Frontend(SPEC)(wave).numpy())
        assert features.shape == (22, 13, 8) and np.array_equal(features.labels, audio.labels)
        assert (features.utt_ids, features.speakers, features.split) == (audio.utt_ids, audio.speakers, "train")
        assert features.protocol == PROTOCOL and features.corpus == "tiny"
        assert build(FrontendSpec, features.frontend) == SPEC and features.frontend == stored(SPEC)
        assert calls == [(9, 22), (18, 22), (22, 22)]
        extract(audio, Frontend(SPEC), tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == features.path.read_bytes()


def test_fixed_point_features_are_stored_as_codes(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "audio.h5")
    monkeypatch.setattr("kestrel.frontend.extract._BLOCK", 9)
    spec = FrontendSpec(**{**vars(SPEC), "arithmetic": "fixed"})
    with AudioFile(tmp_path / "audio.h5") as audio:
        extract(audio, make_frontend(spec), tmp_path / "train.h5")
        extract(audio, make_frontend(spec), tmp_path / "again.h5")
        wanted = FixedFrontend(spec)
        codes = wanted(audio.rows(np.arange(22)))
    with h5py.File(tmp_path / "train.h5") as file:
        assert file["features"].dtype == np.int16 and np.array_equal(file["features"][:], codes)
        assert (file["features"].attrs["scale"], file["features"].attrs["offset"]) == (wanted.scale, 0.0)
    features = FeatureFile(tmp_path / "train.h5")
    assert np.array_equal(features.rows([3, 1]), wanted.dequantise(codes[[3, 1]]))
    assert build(FrontendSpec, features.frontend) == spec and features.frontend["arithmetic"] == "fixed"
    assert (tmp_path / "again.h5").read_bytes() == features.path.read_bytes()


def test_training_batches_are_the_stored_codes(tmp_path: Path, corpus: Any) -> None:
    """Audio that augmentation leaves as it is gives the features of stage 2, whatever the number of loader processes."""
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "audio.h5")
    pack_noise(PROTOCOL, roots, tmp_path / "noise.h5")
    noise, offsets, _ = read_noise(tmp_path / "noise.h5")
    frontend = make_frontend(FrontendSpec(**{**vars(SPEC), "arithmetic": "fixed"}))
    audio = AudioFile(tmp_path / "audio.h5")
    extract(audio, frontend, tmp_path / "train.h5")
    stored_features = FeatureFile(tmp_path / "train.h5")
    for loudness, same in ((0.0, True), (0.5, False)):
        spec = AugmentSpec(time_shift_ms=0.0, noise_frequency=1.0, noise_volume=loudness)
        for workers in (0, 2):
            augmenter = Augmenter(spec, noise, offsets, 16000, None, 0)
            split = Split(audio, batch_size=8, training=True, frontend=frontend, augmenter=augmenter, workers=workers)
            assert split.shape == (13, 8)
            for batch in split.batches(1):
                wave = augmenter(audio.rows(batch.rows), audio.labels[batch.rows], batch.rows, 1)
                samples = np.rint(wave.numpy() * 32768).clip(-32768, 32767).astype(np.int16)
                made = FixedFrontend(frontend.spec)(samples)
                assert np.array_equal(batch.features.numpy(), made * np.float32(frontend.scale))
                assert np.array_equal(batch.features.numpy(), stored_features.rows(batch.rows)) == same


def test_empty_filters_are_reported_once(tmp_path: Path, corpus: Any, caplog: pytest.LogCaptureFixture) -> None:
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "audio.h5")
    spec = build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / "iscas21.yaml"))
    with caplog.at_level(logging.INFO, "kestrel"), AudioFile(tmp_path / "audio.h5") as audio:
        extract(audio, Frontend(spec), tmp_path / "features.h5")
        extract(audio, Frontend(SPEC), tmp_path / "features.h5")
        spec.arithmetic = "fixed"
        fixed = make_frontend(spec).describe_empty_filters()
    lines = [record.getMessage() for record in caplog.records if "mel filters are empty" in record.getMessage()]
    assert len(lines) == 1 and "6 of 160" in lines[0] and "28 and 275 Hz" in lines[0] and fixed == lines[0]


def test_missing_or_changed_clips_stop_the_stage(tmp_path: Path, corpus: Any) -> None:
    clips, roots = corpus
    out = tmp_path / "packs"
    soundfile.write(source(clips[4], roots), np.zeros(10, np.int16), 16000)
    with pytest.raises(KestrelError, match="run stage 1 again"):
        pack_audio(clips, roots, PROTOCOL, "train", out / "train.h5")
    source(clips[4], roots).unlink()
    with pytest.raises(KestrelError, match="run stage 1 again") as caught:
        pack_audio(clips, roots, PROTOCOL, "train", out / "train.h5")
    assert "\n" not in str(caught.value) and os.listdir(out) == []
    (roots["main"] / "_background_noise_" / "a.wav").write_bytes(b"")
    with pytest.raises(KestrelError, match="run stage 1 again"):
        pack_noise(PROTOCOL, roots, out / "noise.h5")
    soundfile.write(roots["main"] / "_background_noise_" / "a.wav", np.zeros(9001, np.int16), 8000)
    with pytest.raises(KestrelError, match="has changed"):
        pack_noise(PROTOCOL, roots, out / "noise.h5")
    with pytest.raises(KestrelError, match="roots main"):
        pack_audio(clips, {"main": roots["main"]}, PROTOCOL, "train", out / "train.h5")
    assert os.listdir(out) == []


def test_another_sample_rate_is_refused(tmp_path: Path, corpus: Any) -> None:
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "audio.h5")
    with AudioFile(tmp_path / "audio.h5") as audio, pytest.raises(KestrelError, match="16000 samples per second"):
        extract(audio, Frontend(FrontendSpec(name="x", sample_rate=8000, f_max=4000.0)), tmp_path / "features.h5")


def test_full_disk_while_extracting_is_one_line(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "audio.h5")
    write, written = os.pwrite, 0

    def full_after_two(descriptor: int, data: Any, place: int) -> int:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, place)

    monkeypatch.setattr("kestrel.frontend.extract._BLOCK", 5)
    monkeypatch.setattr(os, "pwrite", full_after_two)
    with AudioFile(tmp_path / "audio.h5") as audio, pytest.raises(KestrelError, match="no space left") as caught:
        extract(audio, Frontend(SPEC), tmp_path / "feat" / "train.h5")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path / "feat") == [] and written == 3


def test_short_writes_are_continued(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, roots = corpus
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "one.h5")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: write(descriptor, data[:1234], place))
    pack_audio(clips, roots, PROTOCOL, "train", tmp_path / "two.h5")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


PEAK = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kestrel.corpus.manifest import Clip
from kestrel.frontend.extract import extract, pack_audio
from kestrel.frontend.make import make_frontend
from kestrel.frontend.spec import FrontendSpec
from kestrel.store.hdf5 import AudioFile
folder, count, arithmetic = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
clips = [Clip(f"yes/{i}", "main:clip.wav", "yes", 0, "s", 0, 16000, 1.0) for i in range(count)]
protocol = {"name": "p", "classes": ["yes"], "sample_rate": 16000, "clip_samples": 16000}
pack_audio(clips, {"main": folder}, protocol, "train", folder / "audio.h5")
with AudioFile(folder / "audio.h5") as audio:
    spec = FrontendSpec(name="x", mel_bands=40, hop=160, arithmetic=arithmetic)
    extract(audio, make_frontend(spec), folder / "features.h5")
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("arithmetic", "clips"), [("float", 800), ("fixed", 250)])
def test_memory_does_not_grow_with_the_clips(tmp_path: Path, arithmetic: str, clips: int) -> None:
    """Peak memory of packing and extracting N and 8 N clips: of N = 800, 7 N are 179 MB of audio, 90 MB of float features.

    Names and labels take about 2 kB a clip (11 MB here), and the peak varies by some 10 MB from run to run.
    """
    soundfile.write(tmp_path / "clip.wav", np.ones(16000, np.int16), 16000)
    peaks = []
    for count in (clips, 8 * clips):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, tmp_path, str(count), arithmetic],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 40e6
