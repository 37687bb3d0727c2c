"""Atomic files: a reader sees the old file or the new one, never a part of either."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError

_PREFIX = ".tmp-"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(path: Path, error: OSError) -> KestrelError:
    """A one-line error for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return KestrelError(
            f"no space left while writing {path}: free some space or point the folder elsewhere, then run again"
        )
    return KestrelError(f"cannot write {path}: {error.strerror or error}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`, else removed.

    Raises KestrelError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename not in (None, str(temporary), str(path)):
            raise
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes its place, else it is removed.

    A folder cannot replace another in one step: a kill between the two renames leaves none under the final name, never
    a part of one. Raises KestrelError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path.parent))
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o777 & ~mask)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path.parent))
            os.replace(path, old / path.name)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old / path.name, path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(temporary)
        if inside or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(folder: str | os.PathLike) -> None:
    """Remove what a killed run left under temporary names in `folder` (call it while holding its lock)."""
    for left in Path(folder).glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON; a missing or damaged file is a KestrelError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KestrelError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise KestrelError(f"{path} is damaged ({error}); remove it and run its stage again") from None
