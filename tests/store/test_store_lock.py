"""Locks on folders: one holder, whatever is killed and however many want it."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kestrel.errors import KestrelError
from kestrel.store import lock as module
from kestrel.store.lock import lock

ROOT = Path(__file__).resolve().parents[2]
HEAD = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom kestrel.store.lock import lock\n"
HOLD = (
    HEAD + "with lock(sys.argv[1], 'the other run', wait=False):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of `folder` until its standard input is closed."""
    child = start(HOLD, str(folder))
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def foreign_lock(folder: Path, age: float) -> None:
    """A lock of another host, renewed `age` seconds ago."""
    content = {"what": "far run", "pid": 1, "birth": "1", "host": "elsewhere", "since": "2024-01-01 00:00:00"}
    (folder / ".lock").write_text(json.dumps(content))
    os.utime(folder / ".lock", (time.time() - age,) * 2)


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests may have switched the log off for pytest.
    monkeypatch.setattr(logging.getLogger("kestrel"), "propagate", True)


def test_the_lock_is_there_while_the_block_runs(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with lock(folder, "stage 3 pretrain", wait=False):
        found = json.loads((folder / ".lock").read_text())
        assert (found["what"], found["pid"], found["host"]) == ("stage 3 pretrain", os.getpid(), socket.gethostname())
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == []
    with pytest.raises(ZeroDivisionError), lock(folder, "stage 3 pretrain", wait=False):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []


def test_the_message_names_the_holder(tmp_path: Path) -> None:
    child = holder(tmp_path)
    with pytest.raises(KestrelError) as caught, lock(tmp_path, "this run", wait=False):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message and "in use by the other run" in message
    assert f"process {child.pid} on {socket.gethostname()}, since 2" in message
    child.communicate("")
    assert child.returncode == 0
    with lock(tmp_path, "this run", wait=False):
        pass


def test_waiting_says_so_once_and_gets_the_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    child = holder(tmp_path)
    assert child.stdin is not None
    threading.Timer(0.4, child.stdin.close).start()
    began = time.monotonic()
    with caplog.at_level("INFO", "kestrel"), lock(tmp_path, "this run", wait=True, poll=0.02):
        assert time.monotonic() - began > 0.3
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    child.wait(10)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"waiting for the other run (process {child.pid} on ")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    child = holder(tmp_path)
    child.kill()
    child.wait(10)
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path, "this run", wait=False):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell when a process began")
def test_a_zombie_and_a_reused_process_id_hold_nothing(tmp_path: Path) -> None:
    child = holder(tmp_path)
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while module._birth(child.pid) != "" and time.monotonic() < deadline:  # dead, and not yet waited for
        time.sleep(0.01)
    with lock(tmp_path, "this run", wait=False):
        pass
    child.wait(10)
    content = {"what": "old run", "pid": os.getppid(), "birth": "1", "host": socket.gethostname(), "since": "?"}
    (tmp_path / ".lock").write_text(json.dumps(content))
    with lock(tmp_path, "this run", wait=False):
        pass


def test_a_lock_of_another_host_counts_while_it_is_renewed(tmp_path: Path) -> None:
    foreign_lock(tmp_path, 10)
    with pytest.raises(KestrelError, match="far run .process 1 on elsewhere"), lock(tmp_path, "this run", wait=False):
        pass
    foreign_lock(tmp_path, module.STALE_SECONDS + 10)
    with lock(tmp_path, "this run", wait=False):
        pass


def test_a_damaged_lock_counts_for_a_while(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("{")
    with pytest.raises(KestrelError, match="another run .process [?] on [?]"), lock(tmp_path, "this run", wait=False):
        pass
    os.utime(tmp_path / ".lock", (time.time() - module.STALE_SECONDS - 10,) * 2)
    with lock(tmp_path, "this run", wait=False):
        pass


def test_the_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.02)
    with lock(tmp_path, "this run", wait=False):
        os.utime(tmp_path / ".lock", (1000, 1000))
        deadline = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime < 2000:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lost_lock_is_left_to_its_new_holder(tmp_path: Path) -> None:
    with lock(tmp_path, "this run", wait=False):
        foreign_lock(tmp_path, 0)
    assert json.loads((tmp_path / ".lock").read_text())["what"] == "far run"


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(module.os, "link", no_links)
    with lock(tmp_path, "first run", wait=False):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(KestrelError, match="in use by first run"), lock(tmp_path, "second run", wait=False):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KestrelError, match=r"cannot (make|write)"), lock(tmp_path / "file", "this run", wait=False):
        pass

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KestrelError, match="no space left while writing"), lock(tmp_path, "this run", wait=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


RACE = HEAD + (
    "from pathlib import Path\n"
    "folder, rounds = Path(sys.argv[1]), int(sys.argv[2])\n"
    "sys.stdin.readline()\n"
    "for _ in range(rounds):\n"
    "    with lock(folder, 'racer', wait=True, poll=0.001):\n"
    "        (folder / 'inside').touch(exist_ok=False)\n"
    "        count = int((folder / 'count').read_text())\n"
    "        (folder / 'count').write_text(str(count + 1))\n"
    "        (folder / 'inside').unlink()\n"
)


def test_many_processes_race(tmp_path: Path) -> None:
    """Eight processes meet a dead lock at once; each then takes the lock again and again, and no two are ever inside."""
    (tmp_path / "count").write_text("0")
    child = holder(tmp_path)
    child.kill()
    child.wait(10)
    racers = [start(RACE, str(tmp_path), "25") for _ in range(8)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert [racer.communicate(timeout=60) and racer.returncode for racer in racers] == [0] * 8
    assert (tmp_path / "count").read_text() == str(8 * 25)
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_one_of_many_gets_an_experiment_folder(tmp_path: Path) -> None:
    code = HEAD + (
        "sys.stdin.readline()\n"
        "try:\n"
        "    with lock(sys.argv[1], 'racer', wait=False):\n"
        "        print('mine', flush=True)\n"
        "        sys.stdin.read()\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, flush=True)\n"
    )
    racers = [start(code, str(tmp_path)) for _ in range(6)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    for racer in racers:
        racer.communicate("")
    assert sorted(said) == ["KestrelError"] * 5 + ["mine"]


def test_stealing_never_removes_a_lock_taken_meanwhile(tmp_path: Path) -> None:
    """Two runs have seen the same dead lock; the slower one must not remove what the faster one took."""
    foreign_lock(tmp_path, module.STALE_SECONDS + 10)
    module._steal(tmp_path / ".lock")
    assert not (tmp_path / ".lock").exists()
    with lock(tmp_path, "fast run", wait=False):
        module._steal(tmp_path / ".lock")
        assert json.loads((tmp_path / ".lock").read_text())["what"] == "fast run"
    module._steal(tmp_path / ".lock")
