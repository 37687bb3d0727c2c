"""Random access to the rows of one large HDF5 data set, in any process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kestrel.errors import KestrelError

MEMORY_LIMIT = 512 << 20  # bytes of a compressed set that a reader may hold in memory
_LONGEST_READ = 1 << 24


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


class RowReader:
    """Reads rows of the set `name` of the file `path`; `data` is that set, open while the reader is made.

    The file is opened by each process on its first read, so a reader may be made before a fork and may be pickled. Rows
    that are stored plainly are read from their place in the file; a compressed set is read once and kept, in its stored
    type, where it is not larger than `memory_limit` bytes, and through HDF5 otherwise.
    """

    def __init__(self, path: Path, data: h5py.Dataset, memory_limit: int = MEMORY_LIMIT) -> None:
        self.path, self.name = path, data.name
        self.shape: tuple[int, ...] = data.shape
        self.dtype: np.dtype = data.dtype
        self._memory_limit = memory_limit
        self._memory: NDArray[Any] | None = None
        self._descriptor: tuple[int, int] | None = None  # process, file descriptor
        self._file: tuple[int, h5py.File] | None = None  # process, HDF5 file
        self._places = _row_places(data.file, data)
        if self._places is not None and len(self._places) and not self._places_hold(data):
            self._places = None

    def _places_hold(self, data: h5py.Dataset) -> bool:
        ends = np.array([0, self.shape[0] - 1])
        plain = self._read_plain(ends)
        self.close()
        return all(plain[i].tobytes() == data[int(row)].tobytes() for i, row in enumerate(ends))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_file": None, "_memory": None}

    def close(self) -> None:
        """Close what this process has open; a later read opens it again."""
        if self._descriptor is not None and self._descriptor[0] == os.getpid():
            os.close(self._descriptor[1])
        if self._file is not None and self._file[0] == os.getpid():
            self._file[1].close()
        self._descriptor = self._file = None

    def read(self, rows: ArrayLike) -> NDArray[Any]:
        """The given rows in their order, [n, ...] in the stored type and native byte order; repeats are allowed.

        Raises KestrelError where the file cannot be read, IndexError for a row that it does not have.
        """
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError("rows must be a list of row numbers")
        index = index.astype(np.int64)
        count = self.shape[0]
        if index.size and not (index.min() >= 0 and index.max() < count):
            raise IndexError(f"{self.path} has rows 0..{count - 1}, asked for {index.min()}..{index.max()}")
        try:
            stored = self._read_hdf5(index) if self._places is None else self._read_plain(index)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise KestrelError(f"cannot read {self.path}: {reason}") from None
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)

    def _read_plain(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        assert self._places is not None
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            self._descriptor = (os.getpid(), os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not out.size:
            return out
        descriptor, places = self._descriptor[1], self._places[rows]
        row_bytes = out.nbytes // len(rows)
        target = out.reshape(-1).view(np.uint8).data
        # Rows that follow each other in the file are read by one call.
        breaks = np.flatnonzero(np.diff(places) != row_bytes) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            first, last, place = begin * row_bytes, end * row_bytes, int(places[begin])
            while first < last:
                block = os.pread(descriptor, min(last - first, _LONGEST_READ), place)
                if not block:
                    raise KestrelError(f"{self.path} ends too early: remove it and run stage 2 again")
                target[first : first + len(block)] = block
                first, place = first + len(block), place + len(block)
        return out

    def _read_hdf5(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), h5py.File(self.path, "r"))
        data = self._file[1][self.name]
        if self._memory is None and data.size * data.dtype.itemsize <= self._memory_limit:
            self._memory = data[:]
        if self._memory is not None:
            return self._memory[rows]
        unique, inverse = np.unique(rows, return_inverse=True)  # h5py takes increasing rows only, each once
        return data[unique][inverse] if len(unique) else np.empty((0, *self.shape[1:]), self.dtype)
