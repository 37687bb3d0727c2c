"""Archives: fetch them over unreliable networks, and unpack them without trusting them."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import lzma
import os
import shutil
import socket
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kestrel.errors import KestrelError, UsageError, unknown
from kestrel.settings import build, load_yaml, setting
from kestrel.store.atomic import atomic_folder, disk_error, write_text
from kestrel.store.hashing import sha256_file

Progress = Callable[[int, int], None]

ATTEMPTS = 5  # in a row without a new byte, per address
PAUSE = 1.0  # seconds before the second attempt; doubles with each
TIMEOUT = 30.0  # seconds without a byte
MARGIN = 64 << 20  # bytes that a download leaves free on the disk
_BLOCK = 1 << 20
_SNIFF = 512
_AGENT = "kestrel-kws"
_WEB_PAGE = "it answers with a web page instead of the file (a login page or a proxy?)"

log = logging.getLogger("kestrel")


@dataclass
class Archive:
    """An entry of `archives` in conf/corpora.yaml."""

    urls: list[str] = setting([], "addresses, tried in turn")
    bytes: int | None = setting(None, "size of the archive; null = unknown", min=1)
    sha256: str | None = setting(None, "SHA-256 of the archive; null = unknown")
    folder: Literal["main", "test"] = setting("main", "folder of data/<corpus>/raw that it fills")
    strip: int = setting(0, "leading folders of its paths that are dropped", min=0)


def load_archives(corpora: Path, names: Sequence[str]) -> dict[str, Archive]:
    """The archives `names` of conf/corpora.yaml. Raises UsageError for a name that is not there."""
    known = load_yaml(corpora).get("archives", {})
    for name in names:
        if name not in known:
            raise unknown("archive", name, known)
    found = {name: build(Archive, known[name], f"archives.{name}") for name in names}
    folders = [archive.folder for archive in found.values()]
    if "main" not in folders or len(set(folders)) < len(folders):
        raise UsageError(
            "corpus.archives: expected one archive for the main folder and at most one for the test folder"
        )
    return found


class _Retry(Exception):
    """This attempt failed in a way that another one may not."""


class _NoSuchRange(_Retry):
    """What has been received does not fit the server's file."""


class _Refused(Exception):
    """This address does not have the file: go to the next one."""


@dataclass
class _Part:
    """What has been received of a file so far, and where from."""

    path: Path
    url: str = ""
    validator: str = ""  # ETag or Last-Modified of the version that the bytes belong to

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @classmethod
    def at(cls, path: Path) -> _Part:
        part = cls(path)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(part.note.read_text(encoding="utf-8"))
            part.url, part.validator = str(note["url"]), str(note["validator"])
        if not part.url:
            part.discard()  # bytes of unknown origin
        return part

    def begin(self, url: str, validator: str) -> None:
        self.url, self.validator = url, validator
        write_text(self.note, json.dumps({"url": url, "validator": validator}) + "\n")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.url = self.validator = ""


def _looks_like_html(head: bytes) -> bool:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))


def _check_space(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN:
        raise KestrelError(
            f"{name} needs {needed / 1e6:,.0f} MB in {folder}, but only {free / 1e6:,.0f} MB are free; "
            "free some space or link the folder to another disk"
        )


def _verify(path: Path, size: int | None, sha256: str | None) -> str | None:
    """What is wrong with a complete file, or None."""
    if size is not None and path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes instead of {size:,}"
    if sha256 is not None and (found := sha256_file(path)) != sha256.lower():
        return f"its SHA-256 is {found[:12]}... instead of {sha256[:12].lower()}..."
    return None


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Send a request; temporary failures become _Retry, lasting ones _Refused."""
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        text = f"the server answered {error.code} {error.reason}"
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Retry(text) from None
        if error.code == 416:
            raise _NoSuchRange("the server has no such range") from None
        raise _Refused(text) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror):
            raise _Refused(f"the name of its server is not known ({error.reason.strerror or error.reason})") from None
        raise _Retry(str(getattr(error.reason, "strerror", None) or error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(str(error) or type(error).__name__) from None


def _attempt(url: str, part: _Part, size: int | None, verified: bool, name: str, progress: Progress | None) -> None:
    """Receive the rest of the file from `url` into `part`; returns when it is complete.

    Bytes that are there already are kept where the server confirms that they belong to the same version
    (If-Range), or where the whole will be checked by its hash anyway (`verified`).
    """
    have = part.size
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT, "Accept-Encoding": "identity"})
    same = part.url == url and bool(part.validator)
    if have and (same or verified):
        request.add_header("Range", f"bytes={have}-")
        if same:
            request.add_header("If-Range", part.validator)
    elif have:
        part.discard()
        have = 0
    try:
        response = _open(request)
    except _NoSuchRange:
        part.discard()
        raise
    with response:
        headers = response.headers
        start = 0
        if response.status == 206:
            start, total = _content_range(headers.get("Content-Range", ""))
            if start != have:
                part.discard()
                raise _Retry("the server sent another range than asked for")
        else:  # the whole file: ranges are ignored, or it is another version
            length = headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
        if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise _Refused(_WEB_PAGE)
        if size is not None and total is not None and total != size:
            raise _Refused(f"its file has {total:,} bytes instead of {size:,}")
        expected = size if size is not None else total
        _check_space(part.path.parent, (expected or 0) - start, name)
        etag = headers.get("ETag", "")
        validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
        if start == 0 or part.url != url:
            part.begin(url, validator)
        _receive(response, part, start, expected, progress)


def _content_range(text: str) -> tuple[int, int | None]:
    """(first byte, length of the whole file) of a Content-Range header; first byte -1 where it makes no sense."""
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit.lower() != "bytes" or not first.isdigit():
        return -1, None
    return int(first), int(total) if total.isdigit() else None


def _read(response: http.client.HTTPResponse) -> tuple[bytes, str | None]:
    """(the next bytes, why there will be no more although the file is not complete)."""
    try:
        return response.read(_BLOCK), None
    except http.client.IncompleteRead as error:
        return error.partial, "the connection ended too early"
    except (OSError, http.client.HTTPException) as error:
        return b"", f"the connection broke ({error or type(error).__name__})"


def _receive(
    response: http.client.HTTPResponse, part: _Part, start: int, expected: int | None, progress: Progress | None
) -> None:
    received, broken = start, None
    try:
        with part.path.open("ab" if start else "wb") as file:
            while broken is None:
                block, broken = _read(response)
                if not block:
                    break
                if received == 0 and _looks_like_html(block[:_SNIFF]):
                    raise _Refused(_WEB_PAGE)
                received += len(block)
                if expected is not None and received > expected:
                    file.truncate(0)
                    raise _Refused(f"it sends more than {expected:,} bytes")
                file.write(block)
                if progress is not None and expected:
                    progress(received, expected)
    except OSError as error:
        raise disk_error(part.path, error) from None
    if broken is None and expected is not None and received < expected:
        broken = "the connection ended too early"
    if broken is not None:
        raise _Retry(f"{broken}, {received:,} bytes are here")


def _fetch_from(
    url: str, part: _Part, size: int | None, sha256: str | None, name: str, progress: Progress | None
) -> str | None:
    """Try one address until the file is complete and right; else the reason why not."""
    failures = damaged = 0
    while True:
        before = part.size
        resumed = before > 0
        try:
            if size is None or before != size:
                _attempt(url, part, size, sha256 is not None, name, progress)
            reason = _verify(part.path, size, sha256)
            if reason is None:
                return None
            part.discard()
            damaged += 1
            if damaged > 1 or not resumed:  # a resumed file may mix versions: it gets a second chance from its start
                return f"the file is damaged: {reason}"
            log.warning("%s: damaged (%s), fetched again from its start", name, reason)
            continue
        except _Refused as error:
            return str(error)
        except _Retry as error:
            failures = 1 if part.size > before else failures + 1
            if failures >= ATTEMPTS:
                return str(error)
            pause = PAUSE * 2 ** (failures - 1)
            log.warning("%s: %s; again in %.0f s", name, error, pause)
            time.sleep(pause)


def fetch(
    urls: Sequence[str],
    dest: str | os.PathLike,
    size: int | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download a file to `dest` from the first address that has it, and check its size and SHA-256.

    An interrupted download continues (`<dest>.part`), also in a later run. A file that is at `dest` already is
    checked and kept. `progress(bytes, total)`. Raises KestrelError: nothing at any address (with the place to put
    the file by hand), a wrong file at `dest`, too little free space.
    """
    dest = Path(dest)
    name = dest.name
    if dest.exists():
        if (reason := _verify(dest, size, sha256)) is not None:
            raise KestrelError(f"{dest} is not the right file: {reason}; remove it and run stage 0 again")
        return dest
    if sha256 is None:
        log.warning("%s: NO SHA-256 IS KNOWN, so its content cannot be checked", name)
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = _Part.at(dest.with_name(name + ".part"))
    if size is not None:
        if part.size > size:
            part.discard()
        _check_space(dest.parent, size - part.size, name)
    reasons = []
    for url in urls:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise KestrelError(f"{url}: only http and https addresses can be fetched")
        log.info("fetching %s", url)
        reason = _fetch_from(url, part, size, sha256, name, progress)
        if reason is None:
            os.replace(part.path, dest)
            part.note.unlink(missing_ok=True)
            return dest
        log.warning("%s: %s", url, reason)
        reasons.append(reason)
    about = f"{size:,} bytes" if size is not None else "size unknown"
    raise KestrelError(
        f"cannot download {name} ({reasons[-1] if reasons else 'no address'}); without internet, "
        f"put the file here: {dest} ({about}, from {urls[0] if urls else 'its publisher'})"
    )


def _check_member(member: tarfile.TarInfo, archive: Path) -> None:
    """Refuse what an archive of recordings never holds."""
    parts = member.name.replace("\\", "/").split("/")
    problem = None
    if member.name.startswith(("/", "\\")) or (len(member.name) > 1 and member.name[1] == ":"):
        problem = "an absolute path"
    elif ".." in parts:
        problem = "a path out of its folder"
    elif member.issym() or member.islnk():
        problem = "a link"
    elif not (member.isfile() or member.isdir()):
        problem = "a device or another special file"
    if problem:
        raise KestrelError(f"{archive} is refused: its member {member.name!r} is {problem}; get it from its publisher")


def _members(
    archive: Path, tar: tarfile.TarFile, strip: int, folder: Path, tell: Callable[[], None]
) -> Iterator[tarfile.TarInfo]:
    """The members to unpack, checked one by one, their leading `strip` folders dropped."""
    for member in tar:
        tell()
        _check_member(member, archive)
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if len(parts) <= strip:
            continue
        if member.size + MARGIN > shutil.disk_usage(folder).free:
            raise KestrelError(f"no space left to unpack {archive} into {folder.parent}; free some space")
        yield member.replace(name="/".join(parts[strip:]), deep=False)


def extract(
    archive: str | os.PathLike, dest: str | os.PathLike, strip: int = 0, progress: Progress | None = None
) -> None:
    """Unpack a tar archive (plain or compressed) as the folder `dest`, which appears only when it is complete.

    Absolute paths, paths with `..`, links and special files are refused, and with them the whole archive; the data
    filter of tarfile is applied on top. `strip` leading folders of each path are dropped. `progress(bytes, total)`
    counts bytes of the archive. Raises KestrelError for hostile or damaged archives and for a full disk.
    """
    archive, dest = Path(archive), Path(dest)
    try:
        total = archive.stat().st_size
        with atomic_folder(dest) as folder, archive.open("rb") as raw:

            def tell() -> None:
                if progress is not None:
                    progress(raw.tell(), total)

            count = 0
            with tarfile.open(fileobj=raw, mode="r:*") as tar:
                for member in _members(archive, tar, strip, folder, tell):
                    tar.extract(member, folder, filter="data", set_attrs=False)
                    count += member.isfile()
                # the checksum of a compressed archive stands behind its last member, where tarfile does not look
                while tar.fileobj is not None and tar.fileobj.read(_BLOCK):
                    tell()
            if count == 0:
                raise KestrelError(f"{archive} holds no files; remove it and run stage 0 again")
            if progress is not None:
                progress(total, total)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise KestrelError(
            f"{archive} is damaged or no tar archive ({reason}); remove it and run stage 0 again"
        ) from None
    except OSError as error:
        if error.errno is None:  # gzip and bz2 report damaged data this way
            raise KestrelError(f"{archive} is damaged ({error}); remove it and run stage 0 again") from None
        raise disk_error(Path(error.filename or dest), error) from None
