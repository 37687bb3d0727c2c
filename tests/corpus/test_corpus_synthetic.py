from __future__ import annotations

import builtins
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kestrel.corpus import synthetic
from kestrel.corpus.audio import probe, read_window
from kestrel.corpus.prepare import prepare
from kestrel.corpus.rules import hash_split, speaker_of
from kestrel.corpus.spec import CorpusSpec, ProtocolSpec
from kestrel.corpus.synthetic import BLOCK, CLIP_SAMPLES, CORE_WORDS, WORDS, speaker, synthesise
from kestrel.errors import KestrelError

SPEC = CorpusSpec(name="mini", kind="synthetic", speakers=BLOCK + 4, keyword_takes=2)
SAID = ("yes", "no", "bed", "six")


def digests(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.wav"))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
    root = tmp_path_factory.mktemp("mini") / "main"
    seen = []
    assert synthesise(root, SPEC, 1, lambda done, total: seen.append((done, total)), words=SAID) == SPEC.speakers * 6
    assert seen == [(BLOCK * 6, SPEC.speakers * 6), (SPEC.speakers * 6, SPEC.speakers * 6)]
    return root


def test_layout(corpus):
    assert sorted(os.listdir(corpus)) == sorted((*SAID, "_background_noise_"))
    for word in SAID:
        names = sorted(p.name for p in (corpus / word).iterdir())
        takes = 2 if word in CORE_WORDS else 1
        wanted = [f"{speaker(0, i).identity}_nohash_{k}.wav" for i in range(SPEC.speakers) for k in range(takes)]
        assert names == sorted(wanted)
        for name in names:
            assert len(speaker_of(word, name)) == 8 and int(speaker_of(word, name), 16) >= 0


def test_identical_for_any_number_of_workers_and_in_place_of_an_old_one(corpus, tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "old").write_text("goes")
    synthesise(tmp_path / "main", SPEC, 2, words=SAID)
    assert digests(tmp_path / "main") == digests(corpus)
    assert not (tmp_path / "main" / "old").exists()
    assert os.listdir(tmp_path) == ["main"]


def test_clips_are_sound_and_all_different(corpus):
    seen = Counter(digests(corpus).values())
    assert max(seen.values()) == 1
    for path in sorted(corpus.rglob("*.wav")):
        result = probe(path, 16000)
        assert result.reason is None
        wave = read_window(path, 0, result.samples, result.samples).astype(float)
        level = 20 * np.log10(np.sqrt(np.mean(wave**2)) / 32768)
        if path.parent.name == "_background_noise_":
            assert 30 * 16000 <= result.samples <= 60 * 16000 and -20 < level < -16
        else:
            assert result.samples == CLIP_SAMPLES and -45 < level < -10


def test_words_can_be_told_apart(corpus):
    """Mean spectra over time of one speaker's takes: two of one word are nearer than two of different words."""

    def bands(path):
        wave = read_window(path, 0, CLIP_SAMPLES, CLIP_SAMPLES) / 32768
        start = int(np.argmax(np.convolve(wave**2, np.ones(8000), "valid")))  # the loudest half second
        power = np.abs(np.fft.rfft(wave[start : start + 8000].reshape(10, 800))) ** 2  # [10 frames, 401 bins]
        return np.log(power.reshape(10, -1)[:, 1:].reshape(10, 20, 20).sum(2) + 1e-3).ravel()

    same, different = [], []
    for index in range(SPEC.speakers):
        who = speaker(0, index).identity
        yes, no = ([bands(corpus / w / f"{who}_nohash_{k}.wav") for k in (0, 1)] for w in ("yes", "no"))
        same += [np.linalg.norm(yes[0] - yes[1]), np.linalg.norm(no[0] - no[1])]
        different += [np.linalg.norm(yes[0] - no[0]), np.linalg.norm(yes[1] - no[1])]
    assert np.mean(same) < 0.9 * np.mean(different)


def test_it_can_be_prepared(corpus, tmp_path):
    protocol = ProtocolSpec(name="t", words=["yes", "no"])
    content = prepare(SPEC, corpus, None, protocol, tmp_path / "t")
    assert content["counts"]["train"] == {"yes": 32, "no": 32, "unknown": 7, "silence": 7}
    assert (
        content["counts"]["validation"] == content["counts"]["test"] == {"yes": 4, "no": 4, "unknown": 1, "silence": 1}
    )


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_speakers_are_different_and_well_split(seed):
    people = [speaker(seed, index) for index in range(160)]
    assert len({p.identity for p in people}) == len({p.variant for p in people}) == 160
    splits = Counter(hash_split(f"{p.identity}_nohash_0.wav", 10, 10) for p in people)
    assert splits == {"train": 128, "validation": 16, "test": 16}
    assert len({p.accent for p in people}) == 8


def test_seeds_and_speakers_are_fixed():
    assert speaker(0, 3) == speaker(0, 3)
    assert speaker(0, 3).identity != speaker(1, 3).identity
    assert [speaker(0, index).identity for index in (0, 4, 9)] == ["cc0616c2", "e562ec4f", "8d85fe08"]


def test_words_of_the_archive():
    assert len(WORDS) == len(set(WORDS)) == 35 and set(CORE_WORDS) <= set(WORDS)


def test_missing_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(KestrelError, match="pip install espeakng-loader") as error:
        synthesise(tmp_path / "main", SPEC)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "main").exists()


def test_a_failing_engine_leaves_nothing_behind(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
    monkeypatch.setattr(synthetic, "_speak_block", _fail)
    with pytest.raises(KestrelError, match="the engine failed"):
        synthesise(tmp_path / "main", SPEC, words=SAID)
    assert os.listdir(tmp_path) == []


def _fail(job):
    raise KestrelError("the engine failed")
