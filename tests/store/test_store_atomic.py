"""Atomic files and folders: old or new content under the final name, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kestrel.errors import KestrelError
from kestrel.store import atomic
from kestrel.store.atomic import atomic_folder, atomic_path, read_json, remove_stale, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "old\n" * 1000, "new\n" * 2000


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".tmp-"))


def full(*arguments: object, **keywords: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ------------------------------------------------------------------------------------------------------------- files


def test_text_and_json_round_trip(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "deep" / "a.txt", "zwölf\n")
    assert (tmp_path / "new" / "deep" / "a.txt").read_text(encoding="utf-8") == "zwölf\n"
    data = {"b": [1, 2.5, None, True], "a": {"ü": "x"}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json") == data
    assert leftovers(tmp_path) == []


def test_a_file_gets_the_rights_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        with atomic_folder(tmp_path / "f") as folder:
            (folder / "b").touch()
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o750


def test_an_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", OLD)
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text(NEW)
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == OLD
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    function: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    if exists:
        write_text(path, OLD)
    monkeypatch.setattr(atomic.os, function, full)
    with pytest.raises(KestrelError) as caught:
        write_text(path, NEW)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"no space left while writing {path}: free some space")
    assert path.exists() == exists
    if exists:
        assert path.read_text() == OLD
    assert leftovers(tmp_path) == []


def test_a_full_disk_while_the_block_writes(tmp_path: Path) -> None:
    with pytest.raises(KestrelError, match="no space left while writing"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        full()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_before_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.tempfile, "mkstemp", full)
    with pytest.raises(KestrelError, match="no space left while writing"):
        write_text(tmp_path / "a", NEW)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KestrelError, match="cannot write .*: (Not a directory|File exists)"):
        write_text(tmp_path / "file" / "a", NEW)
    with (
        pytest.raises(KestrelError, match="cannot write .*: (Not a directory|File exists)"),
        atomic_folder(tmp_path / "file" / "a"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(KestrelError, match="cannot write .*folder: Is a directory"):
        write_text(tmp_path / "folder", NEW)
    assert leftovers(tmp_path) == []


def test_an_error_about_another_file_is_not_called_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), atomic_path(tmp_path / "a"):
        (tmp_path / "source").read_text()
    with pytest.raises(FileNotFoundError, match="source"), atomic_folder(tmp_path / "f"):
        (tmp_path / "source").read_text()
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_missing_json_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(KestrelError, match=r"a\.json is damaged .*; remove it"):
        read_json(tmp_path / "a.json")
    with pytest.raises(KestrelError, match=r"cannot read .*b\.json"):
        read_json(tmp_path / "b.json")


# ----------------------------------------------------------------------------------------------------------- folders


def test_folders_replace_each_other(tmp_path: Path) -> None:
    for text in (OLD, NEW):
        with atomic_folder(tmp_path / "f") as folder:
            (folder / text[:3]).write_text(text)
            assert leftovers(tmp_path) == [folder.name]
        assert [path.name for path in (tmp_path / "f").iterdir()] == [text[:3]]
    assert leftovers(tmp_path) == []


def test_an_error_in_the_block_keeps_the_old_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text(OLD)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text(NEW)
        raise ZeroDivisionError
    with pytest.raises(KestrelError, match="no space left while writing .*f: free"), atomic_folder(tmp_path / "f"):
        full()
    assert (tmp_path / "f" / "a").read_text() == OLD
    assert leftovers(tmp_path) == []


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text(OLD)
    real = os.replace

    def second_fails(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-") and Path(target).name == "f":
            full()
        real(source, target)

    with pytest.raises(KestrelError, match="no space left"), atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text(NEW)
        monkeypatch.setattr(atomic.os, "replace", second_fails)
    assert (tmp_path / "f" / "a").read_text() == OLD
    assert leftovers(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------- kills

# Writes the new content and kills itself with SIGKILL at the named moment.
VICTIM = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from kestrel.store import atomic
moment, kind, path = sys.argv[1:]

def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

real = os.replace
def replace(source, target):
    final = Path(target) == Path(path)
    if moment == "before rename" and final:
        die()
    real(source, target)
    if moment == "after rename" and final:
        die()
    if moment == "between renames" and not final:
        die()
atomic.os.replace = replace
if moment == "sync":
    atomic.os.fsync = die
new = "new\\n" * 2000
if kind == "file":
    with atomic.atomic_path(path) as temporary, temporary.open("w") as file:
        file.write(new[:5000])
        file.flush()
        if moment == "half written":
            die()
        file.write(new[5000:])
else:
    with atomic.atomic_folder(path) as folder:
        (folder / "a").write_text(new)
        if moment == "half written":
            die()
        (folder / "b").write_text(new)
"""


@pytest.mark.parametrize(
    ("moment", "expected"), [("half written", OLD), ("sync", OLD), ("before rename", OLD), ("after rename", NEW)]
)
def test_a_kill_leaves_the_old_or_the_new_file(moment: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, OLD)
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM.format(root=str(ROOT)), moment, "file", str(path)], check=False
    )
    assert victim.returncode == -9
    assert path.read_text() == expected
    remove_stale(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("moment", "expected"),
    [("half written", {"a": OLD}), ("between renames", None), ("after rename", {"a": NEW, "b": NEW})],
)
def test_a_kill_leaves_no_part_of_a_folder(moment: str, expected: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "f"
    with atomic_folder(path) as folder:
        (folder / "a").write_text(OLD)
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM.format(root=str(ROOT)), moment, "folder", str(path)], check=False
    )
    assert victim.returncode == -9
    assert ({entry.name: entry.read_text() for entry in path.iterdir()} if path.exists() else None) == expected
    remove_stale(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["f"] if expected else [])
    with atomic_folder(path) as folder:
        (folder / "c").touch()
    assert [entry.name for entry in path.iterdir()] == ["c"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """A writer that alternates between two contents is killed at arbitrary times, and watched in between."""
    path = tmp_path / "a.json"
    contents = [json.dumps({"x": letter * 300_000}) for letter in "ab"]
    write_text(path, contents[0])
    writer = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from kestrel.store.atomic import write_text\n"
        f"contents = [open(name).read() for name in sys.argv[2:]]\n"
        "print('on', flush=True)\n"
        "while True:\n"
        "    for text in contents: write_text(sys.argv[1], text)\n"
    )
    for number, text in enumerate(contents):
        (tmp_path / f"source{number}").write_text(text)
    sources = [str(tmp_path / f"source{number}") for number in range(2)]
    seen = set()
    for looks in (3, 17, 60):
        child = subprocess.Popen([sys.executable, "-c", writer, str(path), *sources], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"on\n"
        for _ in range(looks):
            seen.add(path.read_text())
        child.kill()
        child.communicate()
        seen.add(path.read_text())
    assert seen <= set(contents)


def test_remove_stale_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-abc").mkdir()
    (tmp_path / ".tmp-abc" / "x").touch()
    (tmp_path / ".tmp-def.h5").touch()
    (tmp_path / ".done.json").touch()
    (tmp_path / "tmp-x").touch()
    remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".done.json", "tmp-x"]
    remove_stale(tmp_path / "none")
