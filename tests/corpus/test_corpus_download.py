from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from kestrel.corpus import download
from kestrel.corpus.download import Archive, extract, fetch, load_archives
from kestrel.errors import KestrelError, UsageError

DATA = np.random.default_rng(5).bytes(3 * (1 << 20) + 77)  # several blocks
SIZE, SHA = len(DATA), hashlib.sha256(DATA).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>please log in</body></html>"


class Server(http.server.ThreadingHTTPServer):
    """Serves DATA in all the ways in which a server can go wrong; the path of the address says which."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None, str | None]] = []  # (path, Range, If-Range)
        self.faults = 0  # requests that still go wrong, for paths that recover
        self.etag = '"one"'

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{kind}/archive.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        kind = self.path.split("/")[1]
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        self.server.requests.append((kind, wanted, condition))
        faulty = self.server.faults > 0
        self.server.faults -= faulty
        if kind == "missing":
            return self.send_error(404)
        if kind == "busy" and faulty:
            return self.send_error(503)
        if kind == "html":
            return self.answer(200, PAGE, "text/html; charset=utf-8")
        if kind == "page":  # a web page that does not say so
            return self.answer(200, PAGE, "application/octet-stream")
        body = DATA
        if kind == "corrupt" or (kind == "corrupt-once" and faulty):
            body = DATA[: SIZE // 2] + bytes([DATA[SIZE // 2] ^ 1]) + DATA[SIZE // 2 + 1 :]
        if kind == "short":
            body = DATA[:-5]
        if kind == "long":
            body = DATA + b"more"
        start = 0
        if wanted and kind != "noranges" and condition in (None, self.server.etag):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(body):
                return self.send_error(416)
        if kind == "wrongrange" and start:
            start -= 1
        stop = len(body)
        if (kind in ("cut", "noranges", "cut-chunked") and faulty) or kind == "cut-always":
            stop = min(stop, start + (SIZE // 3 if kind != "cut-always" else 0))
        self.answer(206 if start else 200, body[start:stop], "application/gzip", start, len(body), kind)

    def answer(self, status, body, kind_of_content, start=0, total=None, kind=""):
        total = len(body) if total is None else total
        self.send_response(status)
        self.send_header("Content-Type", kind_of_content)
        if kind == "anonymous":
            pass
        elif self.server.etag:
            self.send_header("ETag", self.server.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if kind.endswith("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for position in range(0, len(body), 1 << 18):
                piece = body[position : position + (1 << 18)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if start + len(body) == total:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            self.wfile.write(body)
        self.close_connection = True

    protocol_version = "HTTP/1.1"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 10.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(server, dest, *kinds, size=SIZE, sha=SHA, **options):
    return fetch([server.url(kind) for kind in kinds], dest, size, sha, **options)


def refused(server, dest, *kinds, **options) -> str:
    with pytest.raises(KestrelError) as error:
        get(server, dest, *kinds, **options)
    assert "\n" not in str(error.value)
    assert not dest.exists()
    return str(error.value)


@pytest.fixture
def dest(tmp_path) -> Path:
    return tmp_path / "archives" / "archive.tar.gz"


def is_whole(dest: Path) -> bool:
    return dest.read_bytes() == DATA and os.listdir(dest.parent) == [dest.name]


def test_good_server(server, dest):
    seen = []
    assert get(server, dest, "good", progress=lambda *p: seen.append(p)) == dest
    assert is_whole(dest)
    assert seen[-1] == (SIZE, SIZE) and seen == sorted(seen)
    get(server, dest, "good")  # it is there already
    assert server.requests == [("good", None, None)]


@pytest.mark.parametrize("kind", ["cut", "cut-chunked"])
def test_cut_connections_continue_where_they_ended(server, dest, kind):
    server.faults = 2
    get(server, dest, kind)
    assert is_whole(dest)
    ranges = [wanted for _, wanted, _ in server.requests]
    assert ranges == [None, f"bytes={SIZE // 3}-", f"bytes={2 * (SIZE // 3)}-"]
    assert all(condition == '"one"' for _, wanted, condition in server.requests if wanted)


def test_a_later_run_continues(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = 1
    assert "put the file here" in refused(server, dest, "cut")
    assert dest.with_name("archive.tar.gz.part").stat().st_size == SIZE // 3
    get(server, dest, "cut")
    assert is_whole(dest) and server.requests[-1] == ("cut", f"bytes={SIZE // 3}-", '"one"')


def test_a_changed_file_on_the_server_starts_anew(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = 1
    refused(server, dest, "cut")
    server.etag = '"two"'  # the server then ignores the range
    get(server, dest, "cut")
    assert is_whole(dest)


def test_ignored_ranges(server, dest):
    server.faults = 2
    get(server, dest, "noranges")
    assert is_whole(dest) and len(server.requests) == 3


def test_wrong_ranges_are_noticed(server, dest, monkeypatch):
    server.faults = 1
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    refused(server, dest, "cut")
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    get(server, dest, "wrongrange")
    assert is_whole(dest)


def test_a_part_of_unknown_origin_is_not_used(server, dest):
    dest.parent.mkdir()
    dest.with_name("archive.tar.gz.part").write_bytes(b"something else")
    get(server, dest, "good")
    assert is_whole(dest) and server.requests == [("good", None, None)]


def test_a_part_from_a_damaged_file_gets_a_second_chance(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = 1
    refused(server, dest, "cut")
    part = dest.with_name("archive.tar.gz.part")
    part.write_bytes(b"x" + part.read_bytes()[1:])
    get(server, dest, "good")
    assert is_whole(dest)
    assert [wanted for _, wanted, _ in server.requests] == [None, f"bytes={SIZE // 3}-", None]


def test_a_server_that_recovers(server, dest):
    server.faults = 2
    get(server, dest, "busy")
    assert is_whole(dest)


def test_a_server_that_never_sends_anything(server, dest):
    assert "ended too early" in refused(server, dest, "cut-always")
    assert len(server.requests) == download.ATTEMPTS


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("corrupt", "SHA-256"),
        ("html", "web page"),
        ("page", f"{len(PAGE)} bytes instead of {SIZE:,}"),
        ("missing", "404"),
        ("short", f"{SIZE - 5:,} bytes instead of {SIZE:,}"),
        ("long", f"{SIZE + 4:,} bytes instead of {SIZE:,}"),
    ],
)
def test_bad_servers_are_refused_and_the_next_mirror_is_used(server, dest, kind, reason):
    text = refused(server, dest, kind)
    assert reason in text and f"put the file here: {dest}" in text and f"{SIZE:,} bytes" in text
    get(server, dest, kind, "good")
    assert is_whole(dest)


def test_wrong_page_does_not_hide_behind_unknown_size(server, dest):
    assert "web page" in refused(server, dest, "page", size=None, sha=None)


def test_unknown_size_and_hash(server, dest, caplog, monkeypatch):
    monkeypatch.setattr(download.log, "propagate", True)
    server.faults = 1
    get(server, dest, "cut", size=None, sha=None)
    assert is_whole(dest)
    assert "NO SHA-256 IS KNOWN" in caplog.text


def test_without_hash_a_part_is_not_continued_at_another_address(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = 1
    get(server, dest, "cut", "good", sha=None)
    assert is_whole(dest) and server.requests[-1] == ("good", None, None)


def test_with_hash_a_part_is_continued_at_another_address(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = 1
    get(server, dest, "cut", "good")
    assert is_whole(dest) and server.requests[-1] == ("good", f"bytes={SIZE // 3}-", None)


def test_no_server(server, dest, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    with contextlib.closing(__import__("socket").socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(KestrelError, match=r"put the file here: .*archive.tar.gz"):
        fetch([f"http://127.0.0.1:{port}/a"], dest, SIZE, SHA)
    with pytest.raises(KestrelError, match=r"put the file here"):
        fetch(["http://host.invalid/a"], dest, SIZE, SHA)


def test_a_file_put_there_by_hand(server, dest):
    dest.parent.mkdir()
    dest.write_bytes(DATA)
    fetch([], dest, SIZE, SHA)
    dest.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(KestrelError, match=r"not the right file: its SHA-256.*remove it"):
        fetch([server.url("good")], dest, SIZE, SHA)
    dest.write_bytes(DATA[:100])
    with pytest.raises(KestrelError, match=r"not the right file: it has 100 bytes"):
        fetch([server.url("good")], dest, SIZE, SHA)
    assert server.requests == []


def test_addresses_of_the_machine_itself_are_refused(dest):
    with pytest.raises(KestrelError, match="only http and https"):
        fetch(["file:///etc/hostname"], dest)


Usage = namedtuple("Usage", "total used free")


def test_too_little_space(server, dest, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, download.MARGIN + SIZE - 1))
    text = refused(server, dest, "good")
    assert "free some space" in text and server.requests == []
    assert "free some space" in refused(server, dest, "good", size=None)  # as soon as the server tells the size


# --- archives ---


def tar_of(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                content.name = name
                tar.addfile(content)
    return path


def special(kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("mode", ["w:gz", "w", "w:xz"])
def test_extract(tmp_path, mode):
    archive = tar_of(
        tmp_path / "a.tar", {"./": special(tarfile.DIRTYPE), "./yes/a.wav": b"1", "./list.txt": b"2"}, mode
    )
    seen = []
    extract(archive, tmp_path / "out", progress=lambda *p: seen.append(p))
    assert (tmp_path / "out/yes/a.wav").read_bytes() == b"1" and (tmp_path / "out/list.txt").read_bytes() == b"2"
    assert seen[-1] == (archive.stat().st_size,) * 2
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "out"]


def test_extract_strips_leading_folders(tmp_path):
    archive = tar_of(tmp_path / "a.tgz", {"top/": special(tarfile.DIRTYPE), "top/yes/a.wav": b"1"})
    extract(archive, tmp_path / "out", strip=1)
    assert [str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")] == ["yes", "yes/a.wav"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("../evil.wav", b"x", "a path out of its folder"),
        ("yes/../../evil.wav", b"x", "a path out of its folder"),
        ("yes\\..\\..\\evil.wav", b"x", "a path out of its folder"),
        ("/tmp/evil.wav", b"x", "an absolute path"),
        ("C:\\evil.wav", b"x", "an absolute path"),
        ("yes/evil.wav", special(tarfile.SYMTYPE, "/etc/passwd"), "a link"),
        ("yes/evil.wav", special(tarfile.SYMTYPE, "a.wav"), "a link"),
        ("yes/evil.wav", special(tarfile.LNKTYPE, "yes/a.wav"), "a link"),
        ("yes/evil.wav", special(tarfile.CHRTYPE), "a device"),
        ("yes/evil.wav", special(tarfile.BLKTYPE), "a device"),
        ("yes/evil.wav", special(tarfile.FIFOTYPE), "a device"),
    ],
)
def test_hostile_archives_are_refused_as_a_whole(tmp_path, name, content, reason):
    archive = tar_of(tmp_path / "a.tgz", {"yes/a.wav": b"1", name: content, "yes/b.wav": b"2"})
    with pytest.raises(KestrelError, match=rf"refused: its member .* is {reason}"):
        extract(archive, tmp_path / "sub" / "out")
    assert not (tmp_path / "sub" / "out").exists() and os.listdir(tmp_path / "sub") == []
    assert sorted(os.listdir(tmp_path)) == ["a.tgz", "sub"]


def test_damaged_archives(tmp_path):
    good = tar_of(tmp_path / "a.tgz", {f"yes/{k}.wav": DATA[k * 1000 : (k + 1) * 1000] for k in range(100)})
    whole = good.read_bytes()
    middle = len(whole) // 2
    for name, content in {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
        "text": b"no archive at all" * 99,
        "empty": b"",
        "tail": whole[:-6],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(KestrelError, match="damaged") as error:
            extract(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(KestrelError, match="holds no files"):
        extract(tar_of(tmp_path / "none.tgz", {"yes/": special(tarfile.DIRTYPE)}), tmp_path / "out")
    with pytest.raises(KestrelError):
        extract(tmp_path / "gone.tgz", tmp_path / "out")


def test_no_space_to_unpack(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "a.tgz", {"yes/a.wav": b"1" * 5000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, download.MARGIN + 4999))
    with pytest.raises(KestrelError, match="no space left"):
        extract(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tgz"]


# --- conf/corpora.yaml ---


def test_archives_of_the_repository():
    corpora = Path(__file__).resolve().parents[2] / "conf" / "corpora.yaml"
    both = load_archives(corpora, ["speech_commands_v0.02", "speech_commands_test_set_v0.02"])
    assert [a.folder for a in both.values()] == ["main", "test"]
    first = load_archives(corpora, ["speech_commands_v0.01"])["speech_commands_v0.01"]
    for archive in (*both.values(), first):
        assert isinstance(archive, Archive) and archive.bytes is not None and archive.bytes > 10**8
        assert archive.sha256 is not None and len(archive.sha256) == 64 and int(archive.sha256, 16)
        assert all(url.startswith(("https://", "http://")) and url.endswith(".tar.gz") for url in archive.urls)
    with pytest.raises(UsageError, match="did you mean"):
        load_archives(corpora, ["speech_commands_v0.2"])
    with pytest.raises(UsageError, match="main folder"):
        load_archives(corpora, ["speech_commands_test_set_v0.02"])
