"""HDF5 stores: feature files ("kestrel-features-1"), packed audio ("kestrel-audio-1") and packed noise
("kestrel-noise-1").

Feature file: `features` (N, T, F) float32, or uint8/int16 with attributes `scale` and `offset` (value = stored * scale
+ offset); `labels` int64 (N,); `utt_id`, `speaker` UTF-8 (N,); file attributes format, classes, frontend, corpus,
protocol, split. Packed audio: the same with `audio` int16 (N, samples) in place of `features`, and the attribute
sample_rate.

Files are written under a temporary name and renamed when complete; the same content gives the same bytes. Large sets
are laid out without chunks, so that a row is one read at a known place: random rows cost about a microsecond each
beside the copy, and no reader holds more than the rows it was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kestrel.errors import KestrelError
from kestrel.store.hashing import sha256_json
from kestrel.store.row_reader import MEMORY_LIMIT, RowReader
from kestrel.store.row_writer import RowWriter

FEATURES_FORMAT = "kestrel-features-1"
AUDIO_FORMAT = "kestrel-audio-1"
NOISE_FORMAT = "kestrel-noise-1"
SPLITS = ("train", "validation", "test")


def _rows_of(
    labels: ArrayLike, utt_ids: Sequence[str], speakers: Sequence[str]
) -> dict[str, NDArray[Any] | Sequence[str]]:
    numbers = np.asarray(labels, dtype=np.int64)
    if not (numbers.ndim == 1 and len(numbers) == len(utt_ids) == len(speakers)):
        raise ValueError(f"{numbers.shape} labels, {len(utt_ids)} ids and {len(speakers)} speakers do not fit together")
    return {"labels": numbers, "utt_id": list(utt_ids), "speaker": list(speakers)}


def _attributes(kind: str, classes: Sequence[str], corpus: str, protocol: dict[str, Any], split: str) -> dict[str, Any]:
    return {
        "format": kind,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "corpus": corpus,
        "protocol": json.dumps(protocol, ensure_ascii=False),
        "split": split,
    }


class FeatureWriter(RowWriter):
    """Writes a feature file: `with FeatureWriter(...) as writer: writer.append(...)`.

    One row of (`frames`, `width`) values for each of the N labels, ids and speakers. `dtype` "float32" stores values as
    they are; "uint8" and "int16" store round((value - offset) / scale), saturated. Raises KestrelError on a full disk
    or when not exactly N rows came; nothing is left under `path` then.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        labels: ArrayLike,
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        frames: int,
        width: int,
        classes: Sequence[str],
        frontend: dict[str, Any],
        corpus: str,
        protocol: dict[str, Any],
        split: str,
        dtype: str = "float32",
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        if dtype not in FeatureFile._kinds:
            raise ValueError(f"features are stored as {', '.join(FeatureFile._kinds)}, not {dtype}")
        attributes = _attributes(FEATURES_FORMAT, classes, corpus, protocol, split)
        attributes["frontend"] = json.dumps(frontend, ensure_ascii=False)
        self._scale, self._offset = float(scale), float(offset)
        set_attributes = {} if dtype == "float32" else {"scale": self._scale, "offset": self._offset}
        small = _rows_of(labels, utt_ids, speakers)
        shape = (len(utt_ids), frames, width)
        super().__init__(path, "features", shape, dtype, small, attributes, set_attributes)

    def append(self, features: ArrayLike) -> None:
        """Add the next rows: [n, T, F] in real units."""
        values = np.asarray(features)
        if self._dtype.kind != "f":
            bounds = np.iinfo(self._dtype)
            values = np.clip(np.rint((values - self._offset) / self._scale), bounds.min, bounds.max)
        self.write(values)


class AudioWriter(RowWriter):
    """Writes packed audio: one clip of `clip_samples` int16 samples for each label. Errors as FeatureWriter."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        labels: ArrayLike,
        utt_ids: Sequence[str],
        speakers: Sequence[str],
        clip_samples: int,
        sample_rate: int,
        classes: Sequence[str],
        corpus: str,
        protocol: dict[str, Any],
        split: str,
    ) -> None:
        attributes = _attributes(AUDIO_FORMAT, classes, corpus, protocol, split)
        attributes["sample_rate"] = sample_rate
        small = _rows_of(labels, utt_ids, speakers)
        super().__init__(path, "audio", (len(utt_ids), clip_samples), np.int16, small, attributes)

    def append(self, audio: NDArray[np.int16]) -> None:
        """Add the next rows: int16 [n, clip_samples]."""
        if audio.dtype != np.int16:
            raise ValueError(f"audio must be int16, not {audio.dtype}")
        self.write(audio)


class NoiseWriter(RowWriter):
    """Writes named int16 recordings as one set `noise` (M,) with `offsets` (K + 1,) and `names` (K,).

    `lengths` are the recordings' samples; `append` takes their samples in order, in blocks of any size.
    """

    def __init__(
        self, path: str | os.PathLike, *, names: Sequence[str], lengths: Sequence[int], sample_rate: int
    ) -> None:
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        small: dict[str, NDArray[Any] | Sequence[str]] = {"offsets": offsets, "names": list(names)}
        attributes = {"format": NOISE_FORMAT, "sample_rate": sample_rate}
        super().__init__(path, "noise", (int(offsets[-1]),), np.int16, small, attributes)

    def append(self, samples: NDArray[np.int16]) -> None:
        """Add the next samples: int16 [n]."""
        if samples.dtype != np.int16:
            raise ValueError(f"noise must be int16, not {samples.dtype}")
        self.write(samples)


@contextlib.contextmanager
def _open(path: Path, expected: str) -> Iterator[h5py.File]:
    """The HDF5 file at `path`, open for reading, its format checked. Raises KestrelError."""
    if not path.is_file():
        raise KestrelError(f"{path} does not exist: run stage 2, or name the folder of feature files with --feat-dir")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise KestrelError(f"cannot read {path}: {os.strerror(error.errno)}") from None
        raise KestrelError(f"{path} is not an HDF5 file or is damaged: remove it and run stage 2 again") from None
    with file:
        found = _text_attribute(file, "format")
        if found != expected:
            raise KestrelError(f"{path}: the attribute format is {found!r}, expected {expected!r}")
        yield file


def _data_set(file: h5py.File, name: str) -> h5py.Dataset:
    if not isinstance(file.get(name), h5py.Dataset):
        raise KestrelError(f"{file.filename} has no data set {name!r}: it is incomplete, make it again")
    return file[name]


def _json_attribute(file: h5py.File, name: str) -> Any:
    if name not in file.attrs:
        raise KestrelError(f"{file.filename} has no attribute {name!r}")
    try:
        return json.loads(file.attrs[name])
    except (ValueError, TypeError):
        raise KestrelError(f"{file.filename}: the attribute {name!r} is not JSON") from None


def _text_attribute(file: h5py.File, name: str) -> str:
    value = file.attrs.get(name, "")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _texts(file: h5py.File, name: str, rows: int) -> list[str]:
    data = _data_set(file, name)
    if data.shape != (rows,) or h5py.check_string_dtype(data.dtype) is None:
        raise KestrelError(f"{file.filename}: {name!r} must hold {rows} UTF-8 texts")
    return list(data.asstr()[:]) if rows else []


class _ClipFile:
    """What is common to feature files and packed audio: one row for each clip, with label, id and speaker.

    May be made before a fork and may be pickled: each process opens the file on its first read.
    """

    _format: ClassVar[str]
    _set_name: ClassVar[str]
    _kinds: ClassVar[tuple[str, ...]]
    _dimensions: ClassVar[int]

    def __init__(self, path: str | os.PathLike, memory_limit: int = MEMORY_LIMIT) -> None:
        self.path = Path(path)
        self._utt_ids: list[str] | None = None
        self._speakers: list[str] | None = None
        self._protocol: dict[str, Any] | None = None
        with _open(self.path, self._format) as file:
            data = _data_set(file, self._set_name)
            if data.ndim != self._dimensions or data.dtype.name not in self._kinds:
                raise KestrelError(
                    f"{self.path}: {self._set_name!r} is {data.dtype} with {data.ndim} dimensions; "
                    f"expected {self._dimensions} dimensions of {' or '.join(self._kinds)}"
                )
            self.shape: tuple[int, ...] = data.shape
            self._read_attributes(file, data)
            self._reader = RowReader(self.path, data, memory_limit)

    def _read_attributes(self, file: h5py.File, data: h5py.Dataset) -> None:
        classes = _json_attribute(file, "classes")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise KestrelError(f"{self.path}: the attribute 'classes' must be a JSON list of names")
        self.classes: list[str] = classes
        protocol = _json_attribute(file, "protocol")
        if not isinstance(protocol, dict) or not isinstance(protocol.get("name"), str):
            raise KestrelError(f"{self.path}: the attribute 'protocol' must be a JSON mapping with a name")
        self._stored_protocol: dict[str, Any] = protocol
        self.corpus, self.split = _text_attribute(file, "corpus"), _text_attribute(file, "split")
        labels = _data_set(file, "labels")
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise KestrelError(f"{self.path}: 'labels' must hold {len(self)} whole numbers")
        self.labels: NDArray[np.int64] = labels[:].astype(np.int64)
        if len(self) and not (self.labels.min() >= 0 and self.labels.max() < len(classes)):
            raise KestrelError(f"{self.path}: labels must lie in 0..{len(classes) - 1}, the numbers of its classes")
        for name in ("utt_id", "speaker"):
            if _data_set(file, name).shape != (len(self),):
                raise KestrelError(f"{self.path}: {name!r} must hold {len(self)} UTF-8 texts")

    def __len__(self) -> int:
        return self.shape[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what this process has open; a later read opens it again."""
        self._reader.close()

    @property
    def utt_ids(self) -> list[str]:
        """Utterance ids, one per row; ids may repeat."""
        if self._utt_ids is None:
            with _open(self.path, self._format) as file:
                self._utt_ids = _texts(file, "utt_id", len(self))
        return self._utt_ids

    @property
    def speakers(self) -> list[str]:
        """Speaker of each row."""
        if self._speakers is None:
            with _open(self.path, self._format) as file:
                self._speakers = _texts(file, "speaker", len(self))
        return self._speakers

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol; its `hash` is computed from ids and labels of the folder's three files where none is stored."""
        if self._protocol is None:
            protocol = dict(self._stored_protocol)
            if not protocol.get("hash"):
                protocol["hash"] = self._hash_of_folder()
            self._protocol = protocol
        return self._protocol

    def _hash_of_folder(self) -> str:
        paths = [self.path.with_name(f"{split}.h5") for split in SPLITS]
        if self.path not in paths:
            paths = [self.path]
        lists = {}
        for path in paths:
            if path == self.path:
                lists[path.stem] = [self.utt_ids, self.labels.tolist()]
            elif path.is_file():
                with _open(path, self._format) as file:
                    labels = _data_set(file, "labels")[:]
                    lists[path.stem] = [_texts(file, "utt_id", len(labels)), labels.tolist()]
        return sha256_json(lists)


class FeatureFile(_ClipFile):
    """A feature file. `shape` (N, T, F), `labels` int64 [N], `classes`, `frontend`, `corpus`, `split`, `protocol`.

    Raises KestrelError where the file is missing, damaged, of another format or incomplete.
    """

    _format = FEATURES_FORMAT
    _set_name = "features"
    _kinds = ("float32", "uint8", "int16")
    _dimensions = 3

    def _read_attributes(self, file: h5py.File, data: h5py.Dataset) -> None:
        super()._read_attributes(file, data)
        frontend = _json_attribute(file, "frontend")
        self.frontend: dict[str, Any] = frontend if isinstance(frontend, dict) else {"name": str(frontend)}
        self.scale = float(data.attrs.get("scale", 1.0))
        self.offset = float(data.attrs.get("offset", 0.0))
        if not (np.isfinite(self.scale) and np.isfinite(self.offset)):
            raise KestrelError(f"{self.path}: scale and offset of 'features' must be finite numbers")

    def rows(self, rows: ArrayLike) -> NDArray[np.float32]:
        """float32 [n, T, F] of the given row numbers, in their order; repeats are allowed."""
        values = self._reader.read(rows).astype(np.float32, copy=False)
        if self.scale != 1.0:
            values *= np.float32(self.scale)
        if self.offset != 0.0:
            values += np.float32(self.offset)
        return values

    def iterate(self, batch: int = 256) -> Iterator[NDArray[np.float32]]:
        """Blocks float32 [<= batch, T, F] in the order of the file."""
        for start in range(0, len(self), batch):
            yield self.rows(np.arange(start, min(start + batch, len(self))))


class AudioFile(_ClipFile):
    """Packed audio. `shape` (N, samples), `sample_rate`; the rest as FeatureFile."""

    _format = AUDIO_FORMAT
    _set_name = "audio"
    _kinds = ("int16",)
    _dimensions = 2

    def _read_attributes(self, file: h5py.File, data: h5py.Dataset) -> None:
        super()._read_attributes(file, data)
        if "sample_rate" not in file.attrs:
            raise KestrelError(f"{self.path} has no attribute 'sample_rate'")
        self.sample_rate = int(file.attrs["sample_rate"])

    def rows(self, rows: ArrayLike) -> NDArray[np.int16]:
        """int16 [n, samples] of the given row numbers, in their order; repeats are allowed."""
        return self._reader.read(rows)

    def iterate(self, batch: int = 256) -> Iterator[NDArray[np.int16]]:
        """Blocks int16 [<= batch, samples] in the order of the file."""
        for start in range(0, len(self), batch):
            yield self.rows(np.arange(start, min(start + batch, len(self))))


def read_noise(path: str | os.PathLike) -> tuple[NDArray[np.int16], NDArray[np.int64], list[str]]:
    """Noise samples int16 [M], offsets int64 [K + 1] of the recordings, and their K names."""
    with _open(Path(path), NOISE_FORMAT) as file:
        noise, offsets = _data_set(file, "noise"), _data_set(file, "offsets")
        places = offsets[:].astype(np.int64)
        if noise.dtype != np.int16 or places.ndim != 1 or not len(places) or places[-1] != len(noise) or places[0] != 0:
            raise KestrelError(f"{path}: 'offsets' does not fit 'noise'; remove the file and run stage 2 again")
        return noise[:], places, _texts(file, "names", len(places) - 1)


def open_folder(folder: str | os.PathLike) -> dict[str, FeatureFile]:
    """The three feature files of a folder by split. Raises KestrelError where one is missing or unlike the others."""
    files = {split: FeatureFile(Path(folder) / f"{split}.h5") for split in SPLITS}
    first = files[SPLITS[0]]
    for split, file in files.items():
        for what, mine, theirs in (
            ("frames and width", file.shape[1:], first.shape[1:]),
            ("classes", file.classes, first.classes),
            ("protocol", file.protocol["name"], first.protocol["name"]),
            ("front end", file.frontend, first.frontend),
        ):
            if mine != theirs:
                raise KestrelError(f"{file.path}: {what} {mine} differ from {theirs} of {first.path.name}")
        if not len(file):
            raise KestrelError(f"{file.path} has no clips in split {split}")
    return files
