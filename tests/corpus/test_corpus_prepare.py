from __future__ import annotations

import csv
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kestrel.corpus import prepare as stage
from kestrel.corpus.audio import read_window
from kestrel.corpus.manifest import SPLITS, protocol_hash, protocol_roots, read_manifest, read_protocol
from kestrel.corpus.noise import noise_part
from kestrel.corpus.prepare import prepare
from kestrel.corpus.rules import hash_split, split_size
from kestrel.corpus.spec import CorpusSpec, ProtocolSpec
from kestrel.errors import KestrelError, UsageError

CLIP = 800
PROTOCOL = ProtocolSpec(name="p", words=["yes", "no"], split="auto", clip_samples=CLIP)
CORPUS = CorpusSpec(name="c")
REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY.parent / "shared" / "data"


def names_of(split: str, count: int, start: int = 0) -> list[str]:
    """File stems of `count` different speakers that the hash rule puts into `split`."""
    found: list[str] = []
    number = start
    while len(found) < count:
        name = f"{number:08x}_nohash_0"
        if hash_split(name, 10, 10) == split:
            found.append(name)
        number += 1
    return found


def names(train: int, validation: int, test: int) -> list[str]:
    return names_of("train", train) + names_of("validation", validation) + names_of("test", test)


@pytest.fixture
def hashed(tmp_path, make_corpus):
    """13/3/2 clips of each of two keywords, more of other words than needed; split by hash."""
    speakers = names(13, 3, 2)
    return make_corpus(tmp_path / "gsc", {"yes": speakers, "no": speakers, "bed": speakers, "cat": speakers})


def run(root, out, protocol=PROTOCOL, test=None, **options):
    return prepare(CORPUS, root, test, protocol, out, **options)


def rows(out):
    return {split: read_manifest(Path(out) / f"{split}.csv") for split in SPLITS}


def files_below(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(root.rglob("*")) if p.is_file()}


def test_hash_split_with_the_count_rule(tmp_path, hashed):
    before = files_below(hashed)
    content = run(hashed, tmp_path / "data/c/p")
    assert content["roots"] == {"main": str(hashed), "test": None}  # outside data/c
    assert files_below(hashed) == before
    assert content["classes"] == ["yes", "no", "unknown", "silence"]
    for split, count in zip(SPLITS, (13, 3, 2), strict=True):
        extra = (2 * count + 9) // 10
        assert content["counts"][split] == {"yes": count, "no": count, "unknown": extra, "silence": extra}
        assert sum(content["counts"][split].values()) == split_size(2 * count, 10.0, 10.0)
    assert read_protocol(tmp_path / "data/c/p") == content
    assert content["rules"]["split"] == "hash"
    assert content["noise_files"] == [f"main:_background_noise_/noise{k}.wav" for k in (0, 1)]


def test_rows_are_right(tmp_path, hashed):
    content = run(hashed, tmp_path / "data/c/p")
    splits = rows(tmp_path / "data/c/p")
    roots = protocol_roots(content, tmp_path / "data/c/p")
    assert protocol_hash(splits) == content["hash"]
    for split, clips in splits.items():
        assert clips == sorted(clips, key=lambda c: (c.utt_id, c.start))
        for clip in clips:
            name = content["classes"][clip.label]
            if name == "silence":
                first, stop = noise_part(20 * CLIP, split)
                assert first <= clip.start <= stop - CLIP
                assert clip.utt_id == f"_silence_/{Path(clip.path).stem}@{clip.start}"
            else:
                assert (clip.start, clip.samples, clip.gain) == (0, CLIP, 1.0)
                assert clip.utt_id == f"{clip.word}/{clip.speaker}_nohash_0"
                assert clip.path == f"main:{clip.utt_id}.wav"
                assert hash_split(f"{clip.speaker}_nohash_0", 10, 10) == split
                assert name == clip.word or (name == "unknown" and clip.word in ("bed", "cat"))
            assert read_window(clip.locate(roots), clip.start, clip.samples, CLIP, clip.gain).shape == (CLIP,)


def test_every_file_is_accounted_for(tmp_path, hashed):
    (hashed / "yes" / "bad_nohash_0.wav").write_bytes(b"nothing")
    content = run(hashed, tmp_path / "p")
    speech = sum(clip.word != "_silence_" for clips in rows(tmp_path / "p").values() for clip in clips)
    found = sum(1 for p in hashed.rglob("*.wav") if p.parent.name != "_background_noise_")
    assert speech + sum(content["excluded"].values()) + content["rejected"] == found


def test_same_protocol_for_any_order_workers_and_progress(tmp_path, hashed, make_corpus, monkeypatch):
    monkeypatch.setattr(stage, "_CHUNK", 7)
    first = run(hashed, tmp_path / "one" / "p")
    seen = []
    run(hashed, tmp_path / "three" / "p", workers=3, progress=lambda done, total: seen.append((done, total)))
    for name in ("train.csv", "validation.csv", "test.csv", "rejected.csv", "protocol.json"):
        assert (tmp_path / "one/p" / name).read_bytes() == (tmp_path / "three/p" / name).read_bytes()
    total = 4 * 18 + 2
    assert seen[-1] == (total, total) and len(seen) == -(-total // 7) and seen == sorted(seen)

    # the same clips written in another order, by a file system that lists them in another order
    speakers = names(13, 3, 2)
    random.Random(1).shuffle(speakers)
    other = make_corpus(tmp_path / "other", dict.fromkeys(("cat", "no", "bed", "yes"), speakers))
    real = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = sorted(real(path), key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(stage.os, "scandir", Backwards)
    assert run(other, tmp_path / "b" / "p")["hash"] == first["hash"]


def test_same_protocol_in_any_locale_and_with_any_hash_seed(tmp_path, hashed):
    script = (
        "import sys; from kestrel.corpus.prepare import prepare; from kestrel.corpus.spec import *; "
        "p = ProtocolSpec(name='p', words=['yes', 'no'], clip_samples=800); "
        "print(prepare(CorpusSpec(), sys.argv[1], None, p, sys.argv[2])['hash'])"
    )
    found = {run(hashed, tmp_path / "here")["hash"]}
    for seed, locale in (("1", "C"), ("2", "C.UTF-8")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", script, str(hashed), str(tmp_path / f"p{seed}")]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    assert len(found) == 1


def test_the_hash_does_not_depend_on_where_the_corpus_lies(tmp_path, hashed):
    first = run(hashed, tmp_path / "a" / "p")
    moved = hashed.rename(tmp_path / "elsewhere")
    assert run(moved, tmp_path / "b" / "p")["hash"] == first["hash"]


def test_a_corpus_inside_the_data_folder_has_relative_roots(tmp_path, make_corpus):
    root = make_corpus(
        tmp_path / "data/c/raw/main", {"yes": names(3, 1, 1), "no": names(3, 1, 1), "bed": names(3, 1, 1)}
    )
    content = run(root, tmp_path / "data/c/p")
    assert content["roots"]["main"] == "raw/main"
    assert protocol_roots(content, tmp_path / "data/c/p")["main"] == root


def test_bad_clips_are_listed_and_do_not_stop_the_stage(tmp_path, hashed):
    good = np.arange(CLIP, dtype=np.int16)
    train = names_of("train", 30, start=500)
    yes = hashed / "yes"
    (yes / f"{train[0]}.wav").write_bytes(b"")
    (yes / f"{train[1]}.wav").write_text("no sound")
    soundfile.write(yes / f"{train[2]}.wav", good, 8000)
    soundfile.write(yes / f"{train[3]}.wav", np.stack([good, good], 1), 16000)
    soundfile.write(yes / f"{train[4]}.wav", np.full(CLIP, np.nan, np.float32), 16000, subtype="FLOAT")
    whole = (yes / f"{names(13, 3, 2)[0]}.wav").read_bytes()
    (yes / f"{train[5]}.wav").write_bytes(whole[:44])
    (yes / f"{train[6]}.wav").write_bytes(whole[:900])
    soundfile.write(yes / f"{train[7]}.wav", good[:0], 16000)
    (yes / "notes.txt").write_text("not a clip")
    (yes / ".DS_Store").write_text("hidden")
    (hashed / "README.md").write_text("beside the words")
    (hashed / "_background_noise_" / "README.md").write_text("as in the archive")
    (hashed / "_background_noise_" / "silent.wav").write_bytes(b"")
    content = run(hashed, tmp_path / "p")
    with (tmp_path / "p" / "rejected.csv").open(newline="") as file:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert len(listed) == content["rejected"] == 10
    expected = ["zero bytes", "not an audio", "8000 Hz", "2 channels", "NaN", "truncated", "truncated", "header only"]
    for name, reason in zip(train, expected, strict=False):
        assert reason in listed[f"main:yes/{name}.wav"]
    assert "not a .wav or .flac" in listed["main:yes/notes.txt"]
    assert "zero bytes" in listed["main:_background_noise_/silent.wav"]
    assert content["counts"]["train"]["yes"] == 13


def test_short_and_long_clips_are_used(tmp_path, hashed, write_clip):
    short, long = names_of("train", 2, start=900)
    write_clip(hashed / "yes" / f"{short}.wav", samples=300)
    write_clip(hashed / "yes" / f"{long}.flac", samples=3 * CLIP)
    run(hashed, tmp_path / "p")
    lengths = {c.utt_id: c.samples for c in rows(tmp_path / "p")["train"]}
    assert lengths[f"yes/{short}"] == 300 and lengths[f"yes/{long}"] == 3 * CLIP


def test_odd_names(tmp_path, hashed, write_clip):
    name, upper = names_of("train", 2, start=900)
    write_clip(hashed / "yes" / f"{name}.wav.wav")
    write_clip(hashed / "no" / f"{upper}.WAV")
    run(hashed, tmp_path / "p")
    found = {c.utt_id: c.path for c in rows(tmp_path / "p")["train"]}
    assert found[f"yes/{name}"] == f"main:yes/{name}.wav.wav"
    assert found[f"no/{upper}"] == f"main:no/{upper}.WAV"
    write_clip(hashed / "yes" / f"{name}.flac")
    with pytest.raises(KestrelError, match=r"one clip twice"):
        run(hashed, tmp_path / "p")


def test_names_that_are_no_text(tmp_path, hashed):
    path = os.fsencode(hashed / "yes") + b"/\xff\xfe_nohash_0.wav"
    try:
        with open(path, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert run(hashed, tmp_path / "p")["rejected"] == 1
    assert "file name is not UTF-8" in (tmp_path / "p" / "rejected.csv").read_text()


def test_names_without_speakers_are_split_by_name_and_said(tmp_path, make_corpus, caplog, monkeypatch):
    stems = [f"take{k}" for k in range(200)]
    root = make_corpus(tmp_path / "own", {"yes": stems, "no": stems})
    caplog.set_level(logging.INFO, "kestrel")
    monkeypatch.setattr(logging.getLogger("kestrel"), "propagate", True)
    run(root, tmp_path / "p", replace(PROTOCOL, unknown_percentage=None))
    for split, clips in rows(tmp_path / "p").items():
        for clip in clips:
            if clip.word != "_silence_":
                assert clip.speaker == "" and hash_split(f"{Path(clip.utt_id).name}.wav", 10, 10) == split
    assert "whether speakers straddle splits is unknown" in caplog.text


# --- lists ---


@pytest.fixture
def listed(tmp_path, make_corpus):
    """Flac clips of speakers s0..s11; the list files name wav files: s0, s1 validation, s2, s3 test."""
    speakers = [f"s{k}_nohash_0" for k in range(12)]
    words = dict.fromkeys(("yes", "no", "bed"), speakers)
    root = make_corpus(tmp_path / "listed", words, suffix=".flac")
    for name, members in (("validation_list.txt", speakers[:2]), ("testing_list.txt", speakers[2:4])):
        (root / name).write_text("".join(f"{word}/{member}.wav\n" for word in words for member in members))
    return root


def speakers_of(clips):
    return {clip.speaker for clip in clips} - {""}


def test_list_split(tmp_path, listed):
    content = run(listed, tmp_path / "p")
    assert content["rules"]["split"] == "list"
    found = rows(tmp_path / "p")
    assert speakers_of(found["validation"]) == {"s0", "s1"}
    assert speakers_of(found["test"]) == {"s2", "s3"}
    assert speakers_of(found["train"]) == {f"s{k}" for k in range(4, 12)}
    assert (
        run(listed, tmp_path / "q", replace(PROTOCOL, split="hash", validation_percentage=30, testing_percentage=40))[
            "hash"
        ]
        != content["hash"]
    )


def test_speakers_that_straddle_the_lists_leave_training(tmp_path, listed, write_clip):
    for name in ("s0_nohash_1", "s2_nohash_1", "s2_nohash_2"):
        write_clip(listed / "yes" / f"{name}.flac", seed=9)
    content = run(listed, tmp_path / "p")
    assert content["excluded"][stage.SPEAKER_VALIDATION] == 1
    assert content["excluded"][stage.SPEAKER_TEST] == 2
    found = rows(tmp_path / "p")
    assert not speakers_of(found["train"]) & (speakers_of(found["validation"]) | speakers_of(found["test"]))
    with pytest.raises(KestrelError, match="not the official corpus"):
        run(listed, tmp_path / "p", replace(PROTOCOL, benchmark=True))


def test_speakers_in_both_lists_stay_in_test(tmp_path, listed, write_clip):
    write_clip(listed / "no" / "s2_nohash_1.flac")
    with (listed / "validation_list.txt").open("a") as file:
        file.write("no/s2_nohash_1.wav\n")
    content = run(listed, tmp_path / "p")
    assert speakers_of(rows(tmp_path / "p")["validation"]) == {"s0", "s1"}
    assert content["excluded"][stage.SPEAKER_TEST] == 1


def test_clip_in_both_lists_is_an_error(tmp_path, listed):
    with (listed / "validation_list.txt").open("a") as file:
        file.write("yes/s2_nohash_0.wav\n")
    with pytest.raises(KestrelError, match=r"both validation_list\.txt and testing_list\.txt"):
        run(listed, tmp_path / "p")


def test_missing_clips_of_the_lists(tmp_path, listed):
    (listed / "yes" / "s0_nohash_0.flac").unlink()
    content = run(listed, tmp_path / "p")
    assert "1 clips of the list files are missing" in content["notes"]
    with pytest.raises(KestrelError, match=r"missing, first yes/s0_nohash_0"):
        run(listed, tmp_path / "p", replace(PROTOCOL, benchmark=True))
    assert not (tmp_path / "p" / "protocol.json").exists()


# --- a separate test folder ---


@pytest.fixture
def apart(tmp_path, write_clip):
    root = tmp_path / "tests"
    for word in ("yes", "no", "on"):
        for speaker in ("t0", "t1", "s7"):
            write_clip(root / word / f"{speaker}_nohash_0.wav")
    for name in ("backward_t2_nohash_0", "bed_s8_nohash_3"):
        write_clip(root / "_unknown_" / f"{name}.wav")
    for name in ("10", "11", "12"):
        write_clip(root / "_silence_" / f"{name}.wav")
    return root


def test_test_folder_is_used_as_it_is(tmp_path, listed, apart):
    (listed / "testing_list.txt").unlink()
    content = run(listed, tmp_path / "p", test=apart)
    assert content["counts"]["test"] == {"yes": 3, "no": 3, "unknown": 2, "silence": 3}
    assert content["excluded"][stage.OTHER_TEST_WORD] == 3
    assert "test clips of other words excluded: on 3" in content["notes"]
    found = rows(tmp_path / "p")
    assert all(c.path.startswith("test:") and c.gain == 1.0 for c in found["test"])
    assert "s8" in {c.speaker for c in found["test"] if c.word == "_unknown_"}
    # all that the list does not name is training, but for the speakers of the test folder
    assert speakers_of(found["train"]) == {f"s{k}" for k in range(2, 12)} - {"s7", "s8"}
    assert content["excluded"][stage.SPEAKER_TEST] == 6
    assert content["roots"] == {"main": "listed", "test": "tests"}
    assert Counter(c.label for c in found["test"]) == {0: 3, 1: 3, 2: 2, 3: 3}


def test_main_test_clips_are_excluded_beside_a_test_folder(tmp_path, listed, hashed, apart):
    assert run(listed, tmp_path / "p", test=apart)["excluded"][stage.MAIN_TEST] == 6
    assert run(hashed, tmp_path / "q", test=apart)["excluded"][stage.MAIN_TEST] == 8
    inside = run(hashed, tmp_path / "r", replace(PROTOCOL, test_folder=False), test=apart)
    assert inside["hash"] == run(hashed, tmp_path / "s")["hash"] and inside["roots"]["test"] is None


def test_test_folder_without_silence_takes_windows_of_noise(tmp_path, listed, make_corpus):
    test = make_corpus(tmp_path / "t", {"yes": ["t0_nohash_0"], "no": ["t0_nohash_0"]}, noise=0)
    content = run(listed, tmp_path / "p", test=test)
    assert content["counts"]["test"] == {"yes": 1, "no": 1, "unknown": 0, "silence": 1}
    clip = next(c for c in rows(tmp_path / "p")["test"] if c.label == 3)
    assert clip.path.startswith("main:_background_noise_/") and clip.start >= 0.9 * 20 * CLIP


# --- settings ---


def test_protocol_of_all_words(tmp_path, hashed):
    protocol = replace(PROTOCOL, words=["bed", "cat", "no", "yes"], unknown_percentage=None, silence_percentage=None)
    content = run(hashed, tmp_path / "p", protocol)
    assert content["classes"] == ["bed", "cat", "no", "yes"] and content["excluded"] == {}
    assert [sum(content["counts"][s].values()) for s in SPLITS] == [4 * 13, 4 * 3, 4 * 2]


def test_no_unknown_class(tmp_path, hashed):
    content = run(hashed, tmp_path / "p", replace(PROTOCOL, unknown_percentage=None))
    assert content["classes"] == ["yes", "no", "silence"]
    assert content["excluded"] == {stage.OTHER_WORD: 2 * 18}


def test_more_unknown_than_there_are(tmp_path, hashed):
    content = run(hashed, tmp_path / "p", replace(PROTOCOL, unknown_percentage=1000))
    assert content["counts"]["train"]["unknown"] == 26
    assert "train: only 26 of 260 unknown clips exist" in content["notes"]


def test_more_unknown_clips_contain_the_fewer(tmp_path, hashed):
    def chosen(percentage):
        run(hashed, tmp_path / "p", replace(PROTOCOL, unknown_percentage=percentage))
        return {c.utt_id for c in rows(tmp_path / "p")["train"] if c.label == 2}

    few, many = chosen(10), chosen(30)
    assert len(few) == 3 and len(many) == 8 and few < many


def test_benchmark_stops_on_a_rejected_clip(tmp_path, hashed):
    run(hashed, tmp_path / "p", replace(PROTOCOL, benchmark=True))
    assert (tmp_path / "p" / "protocol.json").exists()
    (hashed / "cat" / f"{names_of('test', 1)[0]}.wav").write_bytes(b"")
    with pytest.raises(KestrelError, match=r"needs every clip, but 1 cannot be used.*zero bytes"):
        run(hashed, tmp_path / "p", replace(PROTOCOL, benchmark=True))
    assert not (tmp_path / "p" / "protocol.json").exists()
    assert "zero bytes" in (tmp_path / "p" / "rejected.csv").read_text()


def test_benchmark_by_hash_stops_on_a_clip_that_the_lists_name(tmp_path, hashed):
    present = names_of("validation", 1)[0]
    (hashed / "validation_list.txt").write_text(f"yes/{present}.wav\nyes/gone_nohash_0.wav\n")
    protocol = replace(PROTOCOL, split="hash")
    assert run(hashed, tmp_path / "p", protocol)["counts"]["validation"]["yes"] == 3  # the rule is the hash
    with pytest.raises(KestrelError, match="1 of the list files are missing, first yes/gone_nohash_0"):
        run(hashed, tmp_path / "p", replace(protocol, benchmark=True))


def test_expected_counts(tmp_path, hashed):
    run(hashed, tmp_path / "p", replace(PROTOCOL, expect={"train": 32, "validation": 8, "test": 6}))
    with pytest.raises(KestrelError, match="validation must have 9 clips but has 8"):
        run(hashed, tmp_path / "p", replace(PROTOCOL, expect={"validation": 9}))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_errors_of_the_user(tmp_path, hashed, make_corpus, listed):
    out = tmp_path / "p"
    with pytest.raises(KestrelError, match="does not exist"):
        run(tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(KestrelError, match="GSC layout"):
        run(tmp_path / "empty", out)
    with pytest.raises(UsageError) as error:
        run(hashed, out, replace(PROTOCOL, words=["yess", "no"]))
    assert "'yess'; did you mean 'yes'?" in one_line(error)
    for words in (["yes", "yes"], ["yes", "silence"], []):
        with pytest.raises(UsageError):
            run(hashed, out, replace(PROTOCOL, words=words))
    silent = make_corpus(tmp_path / "silent", {"yes": names(3, 1, 1), "no": names(3, 1, 1)}, noise=0)
    with pytest.raises(KestrelError, match=r"protocol\.silence_percentage=null"):
        run(silent, out)
    run(silent, out, replace(PROTOCOL, silence_percentage=None))
    (listed / "testing_list.txt").unlink()
    with pytest.raises(KestrelError, match=r"no test clips by the list rule.*corpus.test_dir"):
        run(listed, out)
    (listed / "validation_list.txt").unlink()
    with pytest.raises(KestrelError, match=r"protocol\.split=hash"):
        run(listed, out, replace(PROTOCOL, split="list"))
    trainless = make_corpus(tmp_path / "few", {"yes": names(3, 1, 1), "no": names(0, 1, 1)})
    with pytest.raises(KestrelError, match="no training clips of no"):
        run(trainless, out)


def test_a_dead_worker_is_one_line(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(stage, "_CHUNK", 20)
    monkeypatch.setattr(stage, "_probe_chunk", _die)
    with pytest.raises(KestrelError, match="a worker process died"):
        run(hashed, tmp_path / "p", workers=2)


def _die(job):
    os._exit(9)


# --- real recordings ---

WORDS = ["yes", "no", "up", "down", "left", "right", "stop", "go"]


@pytest.mark.skipif(not (REAL / "gsc_subset").is_dir(), reason="the real recordings are not here")
def test_real_recordings(tmp_path):
    protocol = ProtocolSpec(name="gsc_subset-10", words=WORDS)
    content = prepare(CORPUS, REAL / "gsc_subset", REAL / "gsc_test_subset", protocol, tmp_path / "c/p", workers=2)
    assert content["rejected"] == 0
    extra = {"unknown": 280, "silence": 280}
    assert content["counts"]["train"] == dict.fromkeys(WORDS, 350) | extra
    assert content["counts"]["validation"] == dict.fromkeys(WORDS, 60) | {"unknown": 48, "silence": 48}
    assert sum(content["counts"]["test"].values()) == 3255 - 273 - 261
    assert content["excluded"][stage.OTHER_TEST_WORD] == 273 + 261
    assert "test clips of other words excluded: off 273, on 261" in content["notes"]
    assert stage.SPEAKER_TEST not in content["excluded"] and stage.SPEAKER_VALIDATION not in content["excluded"]
    assert content["hash"] == "5b9482d268010f4564e3da9078ea41652c662e5e4790e6c66eaf2d391d7f3ca4"


@pytest.mark.skipif(not (REAL / "gsc_subset").is_dir(), reason="the real recordings are not here")
def test_the_lists_of_the_archive_follow_the_hash_rule():
    listed_clips = (REAL / "gsc_subset" / "validation_list.txt").read_text().split()
    assert all(hash_split(Path(name).name, 10, 10) == "validation" for name in listed_clips)
    spoken = [p for word in WORDS for p in (REAL / "gsc_test_subset" / word).iterdir()]
    assert len(spoken) > 2000 and all(hash_split(p.name, 10, 10) == "test" for p in spoken)
