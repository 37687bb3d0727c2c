"""Hashes: of files, of plain data, and keyed ranks that order names the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, as hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(data: Any) -> str:
    """SHA-256 of plain data, independent of the order of mapping keys."""
    return sha256_text(json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False))


def keyed_rank(key: str, text: str) -> str:
    """A sort key that depends on `key` and `text` alone: the same order on every machine and in every process."""
    return sha256_text(f"{key}:{text}")


def keyed_uniform(key: str, text: str) -> float:
    """A number in [0, 1) that depends on `key` and `text` alone."""
    return int(keyed_rank(key, text)[:13], 16) / 16**13
