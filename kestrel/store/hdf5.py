"""HDF5 stores: feature files ("kestrel-features-1"), packed audio ("kestrel-audio-1") and packed noise ("kestrel-noise-1").

Feature file: `features` (N, T, F) float32, or uint8/int16 with attributes `scale` and `offset` (value = stored * scale + offset);
`labels` int64 (N,); `utt_id`, `speaker` UTF-8 (N,); file attributes format, classes, frontend, corpus, protocol, split.
Packed audio: the same with `audio` int16 (N, samples) in place of `features`, and the attribute sample_rate.

Files are written under a temporary name and renamed when complete; the same content gives the same bytes. Large sets are laid
out without chunks, so that a row is one read at a known place: random rows cost about a microsecond each beside the copy, and no
reader holds more than the rows it was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_path, disk_error
from kestrel.store.hashing import sha256_json

FEATURES_FORMAT = "kestrel-features-1"
AUDIO_FORMAT = "kestrel-audio-1"
NOISE_FORMAT = "kestrel-noise-1"
SPLITS = ("train", "validation", "test")
MEMORY_LIMIT = 512 << 20  # bytes of a compressed set that a reader may hold in memory

_SYSTEM_ERROR = re.compile(r"errno = (\d+)")
_RESERVE = 1 << 18  # bytes kept free beside the data, for HDF5's own tables


# ---------------------------------------------------------------------------------------------------------------- writing


class _RowWriter:
    """Writes the rows of one large set, block by block; everything small is known from the start.

    HDF5 crashes where the disk fills up under it. So it only lays out the file, the large set without its rows; the space is
    then reserved, and the rows are written to their place directly. A full disk shows at once, as a plain error.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        set_name: str,
        shape: tuple[int, ...],
        dtype: Any,
        small: dict[str, NDArray[Any] | Sequence[str]],
        attributes: dict[str, Any],
        set_attributes: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.shape = shape
        self._set_name = set_name
        self._dtype = np.dtype(dtype).newbyteorder("=")
        self._small = small
        self._attributes = attributes
        self._set_attributes = set_attributes or {}
        self._stack = contextlib.ExitStack()
        self._descriptor: int | None = None
        self._place = self._end = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                size = int(np.prod(self.shape, dtype=np.int64)) * self._dtype.itemsize
                small = sum(_text_bytes(v) if isinstance(v, Sequence) else v.nbytes for v in self._small.values())
                if shutil.disk_usage(self.path.parent).free < size + small + _RESERVE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                temporary = stack.enter_context(atomic_path(self.path))
                self._place = self._lay_out(temporary)
                self._end = self._place + size
                self._descriptor = os.open(temporary, os.O_RDWR)
                stack.callback(self._close)
                _reserve(self._descriptor, self._end)
            except (OSError, RuntimeError) as error:  # h5py raises either of them
                raise _write_failed(self.path, error) from error
            self._stack = stack.pop_all()
        return self

    def _lay_out(self, temporary: Path) -> int:
        """Write all but the rows; return the place of the first row in the file, in bytes."""
        with h5py.File(temporary, "w") as file:
            for key, value in self._attributes.items():
                file.attrs[key] = value
            for name, values in self._small.items():
                if isinstance(values, Sequence):
                    encoded = [text.encode("utf-8") for text in values]
                    width = max((len(text) for text in encoded), default=1) or 1
                    kind = h5py.string_dtype("utf-8", width)
                    file.create_dataset(name, data=np.array(encoded, kind))
                else:
                    file.create_dataset(name, data=values)
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple(self.shape)
            kind = h5py.h5t.py_create(self._dtype, logical=True)
            identity = h5py.h5d.create(file.id, self._set_name.encode(), kind, space, dcpl=layout)
            data = h5py.Dataset(identity)
            for key, value in self._set_attributes.items():
                data.attrs[key] = value
            return data.id.get_offset() or 0

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is None and self._place != self._end:
            error = KestrelError(f"{self.path}: fewer rows came than the {self.shape[0]} announced")
            self._stack.__exit__(type(error), error, None)
            raise error
        return self._stack.__exit__(kind, error, trace)

    def _write(self, values: NDArray[Any]) -> None:
        if self._descriptor is None:
            raise ValueError("rows were given outside of the writer's with block")
        if values.shape[1:] != self.shape[1:]:
            raise ValueError(f"rows of shape {values.shape[1:]}, expected {self.shape[1:]}")
        data = memoryview(np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8))
        if self._place + len(data) > self._end:
            raise KestrelError(f"{self.path}: more rows came than the {self.shape[0]} announced")
        try:
            while len(data):
                written = os.pwrite(self._descriptor, data, self._place)
                data, self._place = data[written:], self._place + written
        except OSError as error:
            raise _write_failed(self.path, error) from error


def _text_bytes(texts: Sequence[str]) -> int:
    return len(texts) * max((4 * len(text) for text in texts), default=0)


def _reserve(descriptor: int, size: int) -> None:
    """Take the disk space of a file now, where the system can."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_failed(path: Path, error: Exception) -> KestrelError:
    """HDF5 gives the system's error number only inside its text: bring it back."""
    number = error.errno if isinstance(error, OSError) else None
    found = _SYSTEM_ERROR.search(str(error))
    if number is None and found:
        number = int(found.group(1))
    if number is None:
        return KestrelError(f"cannot write {path}: {' '.join(str(error).split())}")
    return disk_error(path, OSError(number, os.strerror(number)))


def _rows_of(
    labels: ArrayLike, utt_ids: Sequence[str], speakers: Sequence[str]
) -> dict[str, NDArray[Any] | Sequence[str]]:
    numbers = np.asarray(labels, dtype=np.int64)
    if not (numbers.ndim == 1 and len(numbers) == len(utt_ids) == len(speakers)):
        raise ValueError(f"{numbers.shape} labels, {len(utt_ids)} ids and {len(speakers)} speakers do not fit together")
    return {"labels": numbers, "utt_id": list(utt_ids), "speaker": list(speakers)}


def _attributes(
    kind: str, classes: Sequence[str], corpus: str, protocol: dict[str, Any], split: str
) -> dict[str, Any]:
    return {
        "format": kind,
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "corpus": corpus,
        "protocol": json.dumps(protocol, ensure_ascii=False),
        "split": split,
    }


class FeatureWriter(_RowWriter):
    """Writes a feature file: `with FeatureWriter(...) as writer: writer.append(...)`.

    One row of (`frames`, `width`) values for each of the N labels, ids and speakers. `dtype` "float32" stores values as they
    are; "uint8" and "int16" store round((value - offset) / scale), saturated. Raises KestrelError on a full disk or when not
    exactly N rows came; nothing is left under `path` then.
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
        self._write(values)


class AudioWriter(_RowWriter):
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
        self._write(audio)


class NoiseWriter(_RowWriter):
    """Writes named int16 recordings as one set `noise` (M,) with `offsets` (K + 1,) and `names` (K,).

    `lengths` are the recordings' samples; `append` takes their samples in order, in blocks of any size.
    """

    def __init__(self, path: str | os.PathLike, *, names: Sequence[str], lengths: Sequence[int], sample_rate: int) -> None:
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        small: dict[str, NDArray[Any] | Sequence[str]] = {"offsets": offsets, "names": list(names)}
        attributes = {"format": NOISE_FORMAT, "sample_rate": sample_rate}
        super().__init__(path, "noise", (int(offsets[-1]),), np.int16, small, attributes)

    def append(self, samples: NDArray[np.int16]) -> None:
        """Add the next samples: int16 [n]."""
        if samples.dtype != np.int16:
            raise ValueError(f"noise must be int16, not {samples.dtype}")
        self._write(samples)


# ---------------------------------------------------------------------------------------------------------------- reading


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
        found = file.attrs.get("format")
        if found != expected:
            raise KestrelError(f"{path}: the attribute format is {found!r}, expected {expected!r}")
        yield file


def _data_set(file: h5py.File, name: str) -> h5py.Dataset:
    if not isinstance(file.get(name), h5py.Dataset):
        raise KestrelError(f"{file.filename} has no data set {name!r}; it needs {name!r} as DESIGN section 3 says")
    return file[name]


def _json_attribute(file: h5py.File, name: str) -> Any:
    if name not in file.attrs:
        raise KestrelError(f"{file.filename} has no attribute {name!r}")
    try:
        return json.loads(file.attrs[name])
    except (ValueError, TypeError):
        raise KestrelError(f"{file.filename}: the attribute {name!r} is not JSON") from None


def _texts(file: h5py.File, name: str, rows: int) -> list[str]:
    data = _data_set(file, name)
    if data.shape != (rows,) or h5py.check_string_dtype(data.dtype) is None:
        raise KestrelError(f"{file.filename}: {name!r} must hold {rows} UTF-8 texts")
    return list(data.asstr()[:]) if rows else []


def _row_places(file: h5py.File, data: h5py.Dataset) -> NDArray[np.int64] | None:
    """The place in the file, in bytes, of every row of `data` [N, ...]; None where rows are not stored plainly."""
    rows, shape = data.shape[0], data.shape[1:]
    row_bytes = int(np.prod(shape, dtype=np.int64)) * data.dtype.itemsize
    if file.userblock_size or data.external or data.id.get_create_plist().get_nfilters():
        return None
    if data.chunks is None:
        start = data.id.get_offset()
        return None if start is None else start + np.arange(rows, dtype=np.int64) * row_bytes
    if data.chunks[1:] != shape:
        return None
    length = data.chunks[0]
    starts = np.full(-(-rows // length), -1, np.int64)

    def note(chunk: Any) -> None:
        starts[chunk.chunk_offset[0] // length] = chunk.byte_offset

    data.id.chunk_iter(note)
    if (starts < 0).any():
        return None
    number = np.arange(rows, dtype=np.int64)
    return starts[number // length] + number % length * row_bytes


class _RowFile:
    """Random access to the rows of one large set; what is common to feature files and packed audio.

    The file is opened by each process on its first read, so an object may be made before a fork and may be pickled. Rows that
    are stored plainly are read from their place in the file; a compressed set is read once and kept, in its stored type, where
    it is not larger than `memory_limit` bytes, and through HDF5 row by row otherwise.
    """

    _format: ClassVar[str]
    _set_name: ClassVar[str]
    _kinds: ClassVar[tuple[str, ...]]
    _dimensions: ClassVar[int]

    def __init__(self, path: str | os.PathLike, memory_limit: int = MEMORY_LIMIT) -> None:
        self.path = Path(path)
        self._memory_limit = memory_limit
        self._memory: NDArray[Any] | None = None
        self._handle: tuple[int, int] | None = None  # process id, file descriptor
        self._file: tuple[int, h5py.File] | None = None  # process id, HDF5 file
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
            self._dtype = data.dtype
            self._read_attributes(file, data)
            self._places = _row_places(file, data)
            if self._places is not None and len(self) and not self._places_hold(data):
                self._places = None

    def _read_attributes(self, file: h5py.File, data: h5py.Dataset) -> None:
        classes = _json_attribute(file, "classes")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise KestrelError(f"{self.path}: the attribute 'classes' must be a JSON list of names")
        self.classes: list[str] = classes
        protocol = _json_attribute(file, "protocol")
        if not isinstance(protocol, dict) or not isinstance(protocol.get("name"), str):
            raise KestrelError(f"{self.path}: the attribute 'protocol' must be a JSON mapping with a name")
        self._stored_protocol: dict[str, Any] = protocol
        self.corpus = str(file.attrs.get("corpus", ""))
        self.split = str(file.attrs.get("split", ""))
        labels = _data_set(file, "labels")
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise KestrelError(f"{self.path}: 'labels' must hold {len(self)} whole numbers")
        self.labels: NDArray[np.int64] = labels[:].astype(np.int64)
        if len(self) and not (0 <= self.labels.min() and self.labels.max() < len(classes)):
            raise KestrelError(f"{self.path}: labels must lie in 0..{len(classes) - 1}, the numbers of its classes")
        for name in ("utt_id", "speaker"):
            if _data_set(file, name).shape != (len(self),):
                raise KestrelError(f"{self.path}: {name!r} must hold {len(self)} UTF-8 texts")

    def _places_hold(self, data: h5py.Dataset) -> bool:
        ends = np.array([0, len(self) - 1])
        plain = self._read_plain(ends)
        self.close()
        return bool(all(plain[i].tobytes() == data[int(row)].tobytes() for i, row in enumerate(ends)))

    def __len__(self) -> int:
        return self.shape[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Close what this process has open; a later read opens it again."""
        if self._handle is not None and self._handle[0] == os.getpid():
            os.close(self._handle[1])
        if self._file is not None and self._file[0] == os.getpid():
            self._file[1].close()
        self._handle = self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_file": None, "_memory": None}

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

    def _read_plain(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        assert self._places is not None
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        out = np.empty((len(rows), *self.shape[1:]), self._dtype)
        if not out.size:
            return out
        descriptor, places = self._handle[1], self._places[rows]
        row_bytes = out.nbytes // len(rows)
        target = memoryview(out.reshape(-1).view(np.uint8))
        # Rows that follow each other in the file are read by one call.
        breaks = np.flatnonzero(np.diff(places) != row_bytes) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            first, last, place = begin * row_bytes, end * row_bytes, int(places[begin])
            while first < last:
                block = os.pread(descriptor, min(last - first, 1 << 24), place)
                if not block:
                    raise KestrelError(f"{self.path} ends too early: remove it and run stage 2 again")
                target[first : first + len(block)] = block
                first, place = first + len(block), place + len(block)
        return out

    def _read_hdf5(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), h5py.File(self.path, "r"))
        data = self._file[1][self._set_name]
        if self._memory is None and data.size * data.dtype.itemsize <= self._memory_limit:
            self._memory = data[:]
        if self._memory is not None:
            return self._memory[rows]
        unique, inverse = np.unique(rows, return_inverse=True)  # h5py takes increasing rows only, each once
        return data[unique][inverse] if len(unique) else np.empty((0, *self.shape[1:]), self._dtype)

    def _stored_rows(self, rows: ArrayLike) -> NDArray[Any]:
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError("rows must be a list of row numbers")
        index = index.astype(np.int64)
        if index.size and not (0 <= index.min() and index.max() < len(self)):
            raise IndexError(f"{self.path} has rows 0..{len(self) - 1}, asked for {index.min()}..{index.max()}")
        try:
            stored = self._read_hdf5(index) if self._places is None else self._read_plain(index)
        except OSError as error:
            raise KestrelError(f"cannot read {self.path}: {error.strerror or ' '.join(str(error).split())}") from None
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)


class FeatureFile(_RowFile):
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
        values = self._stored_rows(rows).astype(np.float32, copy=False)
        if self.scale != 1.0:
            values *= np.float32(self.scale)
        if self.offset != 0.0:
            values += np.float32(self.offset)
        return values

    def iterate(self, batch: int = 256) -> Iterator[NDArray[np.float32]]:
        """Blocks float32 [<= batch, T, F] in the order of the file."""
        for start in range(0, len(self), batch):
            yield self.rows(np.arange(start, min(start + batch, len(self))))


class AudioFile(_RowFile):
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
        return self._stored_rows(rows)

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
    """The three feature files of a folder by split. Raises KestrelError where one is missing or does not fit the others."""
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
