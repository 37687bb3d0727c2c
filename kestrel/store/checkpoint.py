"""Checkpoints: one file of tensors and plain types, written atomically, verified by a digest, loaded safely.

A checkpoint is what `torch.save` writes (a zip archive), with the SHA-256 of the file in the archive's comment. Equal
content gives equal bytes. `torch.load(path, weights_only=True)` reads it too, without the check.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_path

_MARK = b"kestrel-checkpoint-1 sha256="
_DIGITS = 64
_END = b"PK\x05\x06"  # end-of-archive record of a zip file: 22 bytes, the last two are the length of the comment
_END_BYTES = 22


def _plain(value: Any, where: str, strings: dict[str, str]) -> Any:
    """A copy whose bytes, once pickled, depend on its value alone.

    Pickle writes an object once and refers to it afterwards, so two equal contents with differently shared strings,
    lists or storages differ in bytes. Here equal strings become one new object, everything else an object of its own.
    """
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        if value not in strings:
            strings[value] = bytes(value, "utf-8").decode("utf-8")
        return strings[value]
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"checkpoint: key {key!r} in {where or 'the content'} is neither str nor int")
        return {_plain(key, where, strings): _plain(item, f"{where}.{key}", strings) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{place}]", strings) for place, item in enumerate(value))
    raise TypeError(f"checkpoint: {where or 'the content'} is a {type(value).__name__}, not a tensor or a plain type")


def snapshot(content: dict[str, Any]) -> dict[str, Any]:
    """A deep copy on the CPU, which later training steps do not change. Raises TypeError for other than plain types."""
    return _plain(content, "", {})


def to_bytes(content: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(snapshot(content), buffer)
    data = bytearray(buffer.getvalue())
    if bytes(data[-_END_BYTES : -_END_BYTES + 4]) != _END:
        raise RuntimeError("torch.save wrote an archive with an unexpected end")
    data[-2:] = (len(_MARK) + _DIGITS).to_bytes(2, "little")
    data += _MARK
    return bytes(data) + hashlib.sha256(data).hexdigest().encode("ascii")


def from_bytes(data: bytes, name: str = "checkpoint") -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU. Raises KestrelError (with `name`) for a damaged or foreign one."""
    body, digest = data[:-_DIGITS], data[-_DIGITS:]
    if not body.endswith(_MARK):
        if data[:2] == b"PK" and _END not in data[-_END_BYTES:]:
            raise KestrelError(f"{name} is cut short or damaged; remove it and run its stage again")
        raise KestrelError(f"{name} is not a Kestrel checkpoint; give the best.pt or last.pt of a training stage")
    if hashlib.sha256(body).hexdigest().encode("ascii") != digest:
        raise KestrelError(f"{name} is damaged (its digest differs); remove it and run its stage again")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KestrelError(f"{name} cannot be loaded safely ({line[:120]})") from None
    if not isinstance(content, dict):
        raise KestrelError(f"{name} is not a Kestrel checkpoint; it holds a {type(content).__name__}")
    return content


def save(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write `content` (nested dicts, lists, tuples, str, int, float, bool, None, tensors) atomically.

    A reader finds the old file or the complete new one: the new one is written under a temporary name, read back,
    compared, synced and renamed. Raises KestrelError where that fails (disk full, read-only), TypeError for other
    types.
    """
    data = to_bytes(content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
        if temporary.read_bytes() != data:
            raise KestrelError(f"{path}: the file system returned other bytes than were written; the old file was kept")


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint; tensors come back on the CPU. Raises KestrelError for a missing, damaged or foreign file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise KestrelError(f"cannot read {path}: {error.strerror}") from None
    return from_bytes(data, str(path))
