"""Feature files, packed audio and packed noise: round trips, every storage layout, errors, full disks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import KestrelError
from kestrel.store import row_writer
from kestrel.store.hdf5 import AudioFile, AudioWriter, FeatureFile, FeatureWriter, NoiseWriter, open_folder, read_noise
from kestrel.store.row_reader import MEMORY_LIMIT

CLASSES = ["yes", "no", "unknown", "silence"]
FRONTEND = {"name": "test", "hop": 160}


def identities(count: int) -> dict[str, Any]:
    return {
        "labels": np.arange(count) % len(CLASSES),
        "utt_ids": [f"wörd/{index // 2:04d}_nohash_0" for index in range(count)],  # ids repeat
        "speakers": [f"speaker {index % 7}" for index in range(count)],
    }


def values(count: int = 23, frames: int = 4, width: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(10, 20, (count, frames, width)).astype(np.float32)


def write(path: Path, features: np.ndarray, block: int = 5, split: str = "train", **options: Any) -> Path:
    options = {
        "protocol": {"name": "p", "hash": "h"},
        "classes": CLASSES,
        "frontend": FRONTEND,
        "corpus": "c",
    } | options
    with FeatureWriter(
        path, frames=features.shape[1], width=features.shape[2], split=split, **identities(len(features)), **options
    ) as writer:
        for start in range(0, len(features), block):
            writer.append(features[start : start + block])
    return path


def rewrite(path: Path, **layout: Any) -> Path:
    """The same feature file with its large set stored in another way, as another program may write it."""
    copy = path.with_name("other.h5")
    with h5py.File(path) as old, h5py.File(copy, "w") as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value
        features = new.create_dataset("features", data=old["features"][:], **layout)
        for key, value in old["features"].attrs.items():
            features.attrs[key] = value
        new["labels"] = old["labels"][:].astype(np.int32)
        for name in ("utt_id", "speaker"):
            new.create_dataset(name, data=list(old[name].asstr()[:]), dtype=h5py.string_dtype())
    return copy


def test_round_trip(tmp_path: Path) -> None:
    features = values()
    file = FeatureFile(write(tmp_path / "train.h5", features))
    assert file.shape == features.shape and len(file) == len(features)
    assert np.array_equal(file.rows(np.arange(len(features))), features)
    wanted = identities(len(features))
    assert file.labels.dtype == np.int64 and np.array_equal(file.labels, wanted["labels"])
    assert file.utt_ids == wanted["utt_ids"] and file.speakers == wanted["speakers"]
    assert (file.classes, file.frontend, file.corpus, file.split) == (CLASSES, FRONTEND, "c", "train")
    assert file.protocol == {"name": "p", "hash": "h"}
    assert np.array_equal(np.concatenate(list(file.iterate(7))), features)


def test_a_plain_hdf5_program_can_read_the_file(tmp_path: Path) -> None:
    features = values()
    with h5py.File(write(tmp_path / "train.h5", features)) as file:
        assert np.array_equal(file["features"][:], features) and file["features"].dtype == np.float32
        assert file["labels"].dtype == np.int64
        assert list(file["utt_id"].asstr()[:]) == identities(len(features))["utt_ids"]
        assert file.attrs["format"] == "kestrel-features-1" and json.loads(file.attrs["classes"]) == CLASSES


@pytest.mark.parametrize(("dtype", "scale", "offset"), [("uint8", 0.5, -50.0), ("int16", 0.01, 3.0)])
def test_small_types_are_scaled_back(tmp_path: Path, dtype: str, scale: float, offset: float) -> None:
    features = values()
    features[0, 0, 0], features[1, 1, 1] = 1e6, -1e6  # beyond the range: saturated
    file = FeatureFile(write(tmp_path / "train.h5", features, dtype=dtype, scale=scale, offset=offset))
    bounds = np.iinfo(dtype)
    wanted = features.clip(bounds.min * scale + offset, bounds.max * scale + offset)
    found = file.rows(np.arange(len(features)))
    assert found.dtype == np.float32 and np.abs(found - wanted).max() <= scale / 2 + 1e-4
    assert os.path.getsize(file.path) < features.nbytes + 20000


LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunks": {"chunks": (4, 4, 3)},
    "partial chunks": {"chunks": (4, 2, 3)},
    "compressed": {"chunks": (4, 4, 3), "compression": "gzip"},
    "big endian": {"dtype": ">f4"},
}


@pytest.mark.parametrize("limit", [MEMORY_LIMIT, 0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_rows_asked_for(tmp_path: Path, layout: str, limit: int) -> None:
    features = values()
    path = rewrite(write(tmp_path / "train.h5", features), **LAYOUTS[layout])
    file = FeatureFile(path, memory_limit=limit)
    order = np.random.default_rng(1).integers(0, len(features), 50)  # unsorted, with repeats
    found = file.rows(order)
    assert found.dtype == np.float32 and found.dtype.isnative and np.array_equal(found, features[order])
    assert file.rows([]).shape == (0, 4, 3)
    assert np.array_equal(file.labels, identities(23)["labels"])


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, 22), max_size=40), limit=st.sampled_from([0, 1 << 20]), compressed=st.booleans())
def test_rows_are_those_of_an_array(tmp_path_factory: Any, rows: list[int], limit: int, compressed: bool) -> None:
    folder = tmp_path_factory.getbasetemp() / "rows"
    if not (folder / "other.h5").exists():
        rewrite(write(folder / "train.h5", values()), chunks=(4, 4, 3), compression="gzip")
    file = FeatureFile(folder / ("other.h5" if compressed else "train.h5"), memory_limit=limit)
    assert np.array_equal(file.rows(rows), values()[np.array(rows, np.int64)])


def test_returned_rows_are_the_callers_own(tmp_path: Path) -> None:
    path = rewrite(write(tmp_path / "train.h5", values()), compression="gzip", chunks=(23, 4, 3))
    file = FeatureFile(path)
    file.rows([3])[:] = 0
    file.rows(np.arange(23))[:] = 0
    assert np.array_equal(file.rows([3]), values()[[3]])


@pytest.mark.parametrize("rows", [[23], [-1], [0, 99]])
def test_rows_outside_of_the_file(tmp_path: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError, match=r"rows 0\.\.22"):
        FeatureFile(write(tmp_path / "train.h5", values())).rows(rows)


def test_only_lists_of_numbers_are_rows(tmp_path: Path) -> None:
    file = FeatureFile(write(tmp_path / "train.h5", values()))
    for wrong in (3, [[1, 2]], [1.5], np.ones(23, bool)):
        with pytest.raises(ValueError, match="row numbers"):
            file.rows(wrong)


def test_empty_file(tmp_path: Path) -> None:
    file = FeatureFile(write(tmp_path / "train.h5", values(0)))
    assert len(file) == 0 and file.rows([]).shape == (0, 4, 3) and file.utt_ids == [] and list(file.iterate()) == []


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one = write(tmp_path / "a" / "train.h5", values(), block=5)
    time.sleep(1.1)  # HDF5 counts whole seconds
    two = write(tmp_path / "b" / "train.h5", values(), block=23)
    assert one.read_bytes() == two.read_bytes()


def _child(file: FeatureFile, pipe: Any) -> None:
    pipe.send((file.rows([5, 2]), file.utt_ids[5]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("compressed", [False, True])
def test_an_open_file_works_in_another_process(tmp_path: Path, method: str, compressed: bool) -> None:
    path = write(tmp_path / "train.h5", values())
    file = FeatureFile(rewrite(path, compression="gzip", chunks=(4, 4, 3)) if compressed else path, memory_limit=0)
    file.rows([1])
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    process = context.Process(target=_child, args=(file, theirs))
    process.start()
    assert mine.poll(60)
    rows, name = mine.recv()
    process.join()
    assert np.array_equal(rows, values()[[5, 2]]) and name == identities(23)["utt_ids"][5]
    assert np.array_equal(file.rows([1]), values()[[1]])


def test_pickling_leaves_handles_and_memory_behind(tmp_path: Path) -> None:
    features = np.zeros((2000, 10, 20), np.float32)
    path = rewrite(write(tmp_path / "train.h5", features, block=2000), compression="gzip", chunks=(100, 10, 20))
    file = FeatureFile(path)
    file.rows([0])
    data = pickle.dumps(file)
    assert len(data) < 100_000
    assert np.array_equal(pickle.loads(data).rows([7]), features[[7]])


def test_close_and_read_again(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with FeatureFile(write(tmp_path / "train.h5", values())) as file:
        first = file.rows([4])
    assert before is None or len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(file.rows([4]), first)
    file.close()


# ------------------------------------------------------------------------------------------------- protocol and folders


def test_missing_hash_covers_the_three_files(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("validation", 5), ("test", 6)):
        write(tmp_path / f"{split}.h5", values(count), split=split, protocol={"name": "p", "percentage": 10})
    files = open_folder(tmp_path)
    hashes = {file.protocol["hash"] for file in files.values()}
    assert len(hashes) == 1 and len(hashes.pop()) == 64
    assert files["test"].protocol["percentage"] == 10

    before = files["train"].protocol["hash"]
    write(tmp_path / "test.h5", values(7), split="test", protocol={"name": "p"})
    after = FeatureFile(tmp_path / "train.h5").protocol["hash"]
    assert after != before
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        file["labels"][0] = 3
    assert FeatureFile(tmp_path / "train.h5").protocol["hash"] != after


def test_folder_must_fit_together(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.h5", values(), split=split)
    assert list(open_folder(tmp_path)) == ["train", "validation", "test"]
    for options, message in (
        ({"classes": ["a", "b", "c", "d"]}, "classes"),
        ({"protocol": {"name": "q"}}, "protocol"),
        ({"frontend": {"name": "other"}}, "front end"),
    ):
        write(tmp_path / "test.h5", values(), split="test", **options)
        with pytest.raises(KestrelError, match=rf"test\.h5: {message}"):
            open_folder(tmp_path)
    write(tmp_path / "test.h5", values(frames=5), split="test")
    with pytest.raises(KestrelError, match=r"\(5, 3\) differ from \(4, 3\)"):
        open_folder(tmp_path)
    write(tmp_path / "test.h5", values(0), split="test")
    with pytest.raises(KestrelError, match="no clips"):
        open_folder(tmp_path)
    (tmp_path / "test.h5").unlink()
    with pytest.raises(KestrelError, match=r"test\.h5 does not exist"):
        open_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------- wrong files


def _change(path: Path, change: Any) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def _replace(name: str, data: Any) -> Any:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = data

    return change


BROKEN = [
    (lambda f: f.attrs.__setitem__("format", "other"), "expected 'kestrel-features-1'"),
    (lambda f: f.attrs.__delitem__("format"), "format is '', expected"),
    (lambda f: f.__delitem__("features"), "no data set 'features'"),
    (lambda f: f.__delitem__("labels"), "no data set 'labels'"),
    (lambda f: f.__delitem__("utt_id"), "no data set 'utt_id'"),
    (lambda f: f.__delitem__("speaker"), "no data set 'speaker'"),
    (lambda f: f.attrs.__delitem__("classes"), "no attribute 'classes'"),
    (lambda f: f.attrs.__setitem__("classes", "yes,no"), "'classes' is not JSON"),
    (lambda f: f.attrs.__setitem__("classes", "{}"), "JSON list of names"),
    (lambda f: f.attrs.__setitem__("protocol", "[]"), "mapping with a name"),
    (lambda f: f.attrs.__setitem__("protocol", 3), "'protocol' is not JSON|mapping with a name"),
    (lambda f: f.attrs.__setitem__("classes", '["yes"]'), r"labels must lie in 0\.\.0"),
    (_replace("labels", np.arange(5)), "'labels' must hold 23"),
    (_replace("labels", np.zeros(23)), "'labels' must hold 23 whole numbers"),
    (_replace("labels", np.full(23, -1)), r"labels must lie in 0\.\.3"),
    (_replace("utt_id", ["a"]), "'utt_id' must hold 23"),
    (_replace("features", np.zeros((23, 4))), "float64 with 2 dimensions"),
    (_replace("features", np.zeros((23, 4, 3))), "expected 3 dimensions of float32 or uint8 or int16"),
    (lambda f: f["features"].attrs.__setitem__("scale", np.nan), "finite"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path / "train.h5", values())
    _change(path, change)
    with pytest.raises(KestrelError, match=message) as caught:
        FeatureFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_ids_must_be_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5", values())
    _change(path, _replace("utt_id", np.arange(23)))
    with pytest.raises(KestrelError, match="23 UTF-8 texts"):
        _ = FeatureFile(path).utt_ids


def test_missing_foreign_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(KestrelError, match="does not exist: run stage 2"):
        FeatureFile(tmp_path / "train.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(KestrelError, match="not an HDF5 file or is damaged"):
        FeatureFile(tmp_path / "text.h5")
    path = write(tmp_path / "train.h5", values(400))
    data = path.read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(KestrelError, match="damaged"):
        FeatureFile(tmp_path / "cut.h5")
    with pytest.raises(KestrelError, match="expected 'kestrel-audio-1'"):
        AudioFile(path)


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5", values(400))
    file = FeatureFile(path)
    os.truncate(path, os.path.getsize(path) - 2000)
    with pytest.raises(KestrelError, match="ends too early"):
        file.rows([399])


# -------------------------------------------------------------------------------------------------------------- writing


SHAPE: dict[str, Any] = {
    "frames": 4, "width": 3, "classes": CLASSES, "frontend": {}, "corpus": "c", "protocol": {"name": "p"}, "split": "s"
}  # fmt: skip


def test_too_few_or_too_many_rows_leave_nothing(tmp_path: Path) -> None:
    for count, message in ((4, "fewer rows came than the 5"), (6, "more rows came than the 5")):
        writer = FeatureWriter(tmp_path / "train.h5", **SHAPE, **identities(5))
        with pytest.raises(KestrelError, match=message), writer:
            writer.append(values(count))
        assert os.listdir(tmp_path) == []


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5", values())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="rows of shape"), FeatureWriter(path, **SHAPE, **identities(5)) as writer:
        writer.append(values(5, frames=5))
    with pytest.raises(KeyboardInterrupt), FeatureWriter(path, **SHAPE, **identities(5)) as writer:
        writer.append(values(2))
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["train.h5"]


def test_labels_and_ids_must_fit(tmp_path: Path) -> None:
    who = identities(5) | {"labels": [0, 1]}
    with pytest.raises(ValueError, match="do not fit together"):
        FeatureWriter(
            tmp_path / "x.h5", frames=1, width=1, classes=[], frontend={}, corpus="", protocol={}, split="", **who
        )


FULL = "no space left while writing"


@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate"])
def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    calls = 0

    def full(*_: Any) -> int:
        nonlocal calls
        calls += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(KestrelError, match=FULL) as caught:
        write(tmp_path / "train.h5", values())
    assert calls == 1 and "train.h5" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_too_little_free_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(KestrelError, match=FULL):
        write(tmp_path / "train.h5", values())
    assert os.listdir(tmp_path) == []


def test_errors_of_hdf5_keep_their_system_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("Can't decrement id ref count (file write failed,\n errno = 28, error message = 'No space')")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(KestrelError, match=FULL):
        write(tmp_path / "train.h5", values())
    assert os.listdir(tmp_path) == []


def test_systems_without_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert np.array_equal(FeatureFile(write(tmp_path / "train.h5", values())).rows([3]), values()[[3]])


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("guard", ["free space", "preallocation", "writing"])
def test_a_disk_that_is_really_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    if guard != "free space":
        monkeypatch.setattr(row_writer, "_RESERVE", -(1 << 40))
    if guard == "writing":
        monkeypatch.setattr(row_writer, "_reserve", lambda *_: None)
    path = small_disk / "feat" / "train.h5"
    with pytest.raises(KestrelError, match=FULL):
        write(path, values(100, 50, 40))
    assert os.listdir(path.parent) == []
    write(path, values(20, 10, 40))
    assert len(FeatureFile(path)) == 20


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KestrelError, match="cannot write"):
        write(tmp_path / "file" / "train.h5", values())


# ------------------------------------------------------------------------------------------------------ audio and noise


def test_audio_round_trip(tmp_path: Path) -> None:
    audio = np.random.default_rng(0).integers(-32768, 32767, (9, 50), np.int16, endpoint=True)
    with AudioWriter(
        tmp_path / "train.h5", clip_samples=50, sample_rate=8000, classes=CLASSES, corpus="c", protocol={"name": "p"},
        split="train", **identities(9),
    ) as writer:  # fmt: skip
        writer.append(audio[:4])
        writer.append(audio[4:])
        with pytest.raises(ValueError, match="int16"):
            writer.append(audio.astype(np.int32))
    file = AudioFile(tmp_path / "train.h5")
    order = np.array([8, 0, 3, 3])
    assert file.sample_rate == 8000 and file.shape == (9, 50) and file.rows(order).dtype == np.int16
    assert np.array_equal(file.rows(order), audio[order])
    assert np.array_equal(np.concatenate(list(file.iterate(4))), audio)
    assert file.utt_ids == identities(9)["utt_ids"] and file.split == "train"


def test_noise_round_trip(tmp_path: Path) -> None:
    pieces = [np.arange(10, dtype=np.int16), np.arange(7, dtype=np.int16) - 3]
    with NoiseWriter(tmp_path / "noise.h5", names=["a", "b"], lengths=[10, 7], sample_rate=16000) as writer:
        for piece in pieces:
            writer.append(piece)
    noise, offsets, names = read_noise(tmp_path / "noise.h5")
    assert noise.dtype == np.int16 and offsets.tolist() == [0, 10, 17] and names == ["a", "b"]
    assert np.array_equal(noise, np.concatenate(pieces))


def test_no_noise_is_an_empty_file(tmp_path: Path) -> None:
    with NoiseWriter(tmp_path / "noise.h5", names=[], lengths=[], sample_rate=16000):
        pass
    noise, offsets, names = read_noise(tmp_path / "noise.h5")
    assert len(noise) == 0 and offsets.tolist() == [0] and names == []


def test_noise_with_wrong_offsets_is_refused(tmp_path: Path) -> None:
    with NoiseWriter(tmp_path / "noise.h5", names=["a"], lengths=[3], sample_rate=16000) as writer:
        writer.append(np.zeros(3, np.int16))
    _change(tmp_path / "noise.h5", _replace("offsets", np.array([0, 9])))
    with pytest.raises(KestrelError, match="does not fit"):
        read_noise(tmp_path / "noise.h5")
