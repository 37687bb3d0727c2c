"""The build of the native kernels reports one line and never stops a set-up."""

from __future__ import annotations

import stat

import pytest

from kestrel.errors import KestrelError
from kestrel.nn import build, native


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """No library is built yet; the cache folder is below tmp_path."""
    monkeypatch.setattr(build.sys, "prefix", build.sys.base_prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._load.cache_clear()
    yield tmp_path / "cache" / "kestrel"
    native._load.cache_clear()


def fake_compiler(path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def outcome(capsys) -> str:
    assert build.main() == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("\n") == 1
    return printed.out


def test_no_compiler(empty_cache, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "PyTorch path will be used (no C++ compiler" in outcome(capsys)
    assert build.find() is None
    assert not native.available()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'a.cpp:3:1: fatal error: no such header' >&2; exit 1", "fatal error: no such header"),
        ("exit 1", "no message"),
        ('while [ "$1" != -o ]; do shift; done; echo broken > "$2"', "does not load"),
    ],
)
def test_a_compiler_that_fails(empty_cache, monkeypatch, capsys, tmp_path, script: str, message: str) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "cxx", script))
    line = outcome(capsys)
    assert message in line and "PyTorch path will be used" in line
    assert build.find() is None
    assert not [path for path in empty_cache.rglob("*") if path.is_file()]


def test_no_folder_to_write(empty_cache, monkeypatch, capsys) -> None:
    empty_cache.parent.write_text("a file in the way of the folder")
    monkeypatch.setattr(build, "compiler", lambda: "c++")
    assert "cannot write" in outcome(capsys)


def test_a_changed_source_is_built_anew(empty_cache, monkeypatch, tmp_path) -> None:
    before = build.cache_folders()
    changed = tmp_path / build.SOURCES[0].name
    changed.write_bytes(build.SOURCES[0].read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCES", (changed, *build.SOURCES[1:]))
    assert build.cache_folders() != before
    assert len(before) == 1


def test_ready_library_is_found(native_library, capsys) -> None:
    assert "ready" in outcome(capsys)


def test_a_path_in_native_code_needs_the_library(empty_cache) -> None:
    with pytest.raises(KestrelError, match=r"python -m kestrel\.nn\.build"):
        native.kernels()
