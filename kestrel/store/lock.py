"""A lock on a folder: one writer at a time, also across hosts that share the file system.

The lock is a file made with O_EXCL that names its holder. A lock whose process is gone (same host), or that was not
renewed for a while (another host), is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kestrel.errors import KestrelError
from kestrel.store.atomic import disk_error

RENEW_SECONDS = 20.0
STALE_SECONDS = 300.0

log = logging.getLogger("kestrel")


def _holder(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _birth(pid: int) -> str | None:
    """When a process began, where the system tells (Linux): a process id alone may be used again. "" = it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _alive(path: Path, holder: dict) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        birth = _birth(holder["pid"])
        return birth is None or birth == holder.get("birth")
    return age < STALE_SECONDS


def _describe(holder: dict) -> str:
    return f"{holder.get('what', 'another run')} (process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')})"


def _take(path: Path, what: str) -> bool:
    # The content is complete before the name exists: a hard link is as exclusive as O_EXCL and never seen empty.
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    pid = os.getpid()
    text = json.dumps({"what": what, "pid": pid, "birth": _birth(pid), "host": socket.gethostname(), "since": since})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(text, encoding="utf-8")
        try:
            os.link(own, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            with path.open("x", encoding="utf-8") as file:  # a file system without hard links
                file.write(text)
        return True
    except FileExistsError:
        if path.parent.is_dir():
            return False
        raise KestrelError(f"cannot make the lock {path}: {path.parent} is no folder") from None
    except OSError as error:
        raise disk_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            own.unlink()


def _steal(path: Path) -> None:
    """Remove a dead lock. Of several waiting runs one does, and none removes a lock that was taken meanwhile."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without flock: the checks below make a race unlikely
            fcntl.flock(file, fcntl.LOCK_EX)
        found = path.stat()
        opened = os.fstat(file.fileno())
        same = (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)
        holder = _holder(path)
        if same and holder is not None and not _alive(path, holder):
            path.unlink()


@contextlib.contextmanager
def lock(folder: str | os.PathLike, what: str, *, wait: bool, poll: float = 1.0) -> Iterator[None]:
    """Hold the lock of `folder` while the block runs.

    Args:
        folder: the folder that is written; the lock is the file `.lock` in it.
        what: shown to others that meet the lock, such as "stage 3 pretrain".
        wait: wait for the holder (shared data folders), or raise KestrelError that names it (experiment folders).
        poll: seconds between looks while waiting.
    """
    path = Path(folder) / ".lock"
    said = False
    while not _take(path, what):
        holder = _holder(path)
        if holder is None:
            continue
        if not _alive(path, holder):
            try:
                _steal(path)
            except OSError as error:
                raise KestrelError(f"{path} was left by {_describe(holder)}: remove it ({error.strerror})") from None
            continue
        if not wait:
            raise KestrelError(f"{folder} is in use by {_describe(holder)}; wait for it or stop it")
        if not said:
            log.info("waiting for %s, which holds %s", _describe(holder), folder)
            said = True
        time.sleep(poll)
    done = threading.Event()

    def ours() -> bool:  # a run that slept too long may have lost it
        holder = _holder(path) or {}
        return holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):
                if ours():
                    os.utime(path)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            if ours():
                path.unlink()
