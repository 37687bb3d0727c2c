"""Writes one large HDF5 data set row by row, such that a full disk is an ordinary error."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_path, disk_error

_SYSTEM_ERROR = re.compile(r"errno = (\d+)")
_RESERVE = 1 << 18  # bytes kept free beside the data, for HDF5's own tables


class RowWriter:
    """Writes the rows of the set `set_name`, block by block; everything small is known from the start.

    `shape` (N, ...) and `dtype` of the set; `small`: arrays or lists of texts, written as data sets beside it;
    attributes of the file and of the set. The file takes the name `path` when the with block ends after exactly N rows,
    else nothing is left.

    HDF5 crashes where the disk fills up under it. So it only lays out the file, the large set without its rows; the
    space is then reserved, and the rows are written to their place directly. A full disk shows at once, as a plain
    error.
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
            layout.set_obj_track_times(False)  # the same content gives the same bytes
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

    def write(self, values: NDArray[Any]) -> None:
        """Write the next rows [n, ...]; KestrelError on a full disk or where too many come."""
        if self._descriptor is None:
            raise ValueError("rows were given outside of the writer's with block")
        if values.shape[1:] != self.shape[1:]:
            raise ValueError(f"rows of shape {values.shape[1:]}, expected {self.shape[1:]}")
        data = np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8).data
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
