"""Where to compute, and what a process does with freed memory."""

from __future__ import annotations

import ctypes
import platform

import pytest

from kestrel.train import device


def test_memory_is_kept_where_the_c_library_can() -> None:
    assert device.keep_memory() == (platform.libc_ver()[0] == "glibc")


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not device.keep_memory()
