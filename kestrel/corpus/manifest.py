"""Manifests: one CSV file per split that lists its clips, and the protocol.json beside them."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_path, read_json
from kestrel.store.hashing import sha256_json

SPLITS = ("train", "validation", "test")
PROTOCOL_FILE = "protocol.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One row of a manifest: a window of an audio file and its label.

    `utt_id` is `<folder>/<file stem>`; windows cut from noise are `_silence_/<noise file stem>@<start>`.
    `path` is `<root>:<path below that root>` with the root `main` or `test`.
    `start` and `samples` are the window in samples of the file; `gain` is a factor on its samples.
    """

    utt_id: str
    path: str
    word: str
    label: int
    speaker: str
    start: int
    samples: int
    gain: float

    def locate(self, roots: Mapping[str, Path]) -> Path:
        """The audio file. Raises KestrelError where the root of `path` is not among `roots`."""
        return locate(self.path, roots)


COLUMNS = tuple(field.name for field in dataclasses.fields(Clip))


def locate(path: str, roots: Mapping[str, Path]) -> Path:
    """The file that `<root>:<relative path>` names. Raises KestrelError for an unknown root."""
    root, separator, relative = path.partition(":")
    if not separator or root not in roots:
        raise KestrelError(f"{path!r} does not begin with one of the roots {', '.join(roots)}; run stage 1 again")
    return roots[root] / relative


def write_manifest(path: str | os.PathLike, clips: Iterable[Clip]) -> None:
    """Write a manifest atomically, in the order given."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(clip) for clip in clips)


def iterate_manifest(path: str | os.PathLike) -> Iterator[Clip]:
    """The clips of a manifest, one at a time. Raises KestrelError for a missing or damaged file."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != COLUMNS:
                raise KestrelError(
                    f"{path} is not a manifest (its columns must be {','.join(COLUMNS)}); run stage 1 again"
                )
            for utt_id, clip_path, word, label, speaker, start, samples, gain in reader:
                yield Clip(utt_id, clip_path, word, int(label), speaker, int(start), int(samples), float(gain))
    except OSError as error:
        raise KestrelError(f"cannot read {path}: {error.strerror}; run stage 1 first") from None
    except (ValueError, csv.Error) as error:
        raise KestrelError(f"{path} is damaged ({error}); run stage 1 again") from None


def read_manifest(path: str | os.PathLike) -> list[Clip]:
    """All clips of a manifest. Raises KestrelError for a missing or damaged file."""
    return list(iterate_manifest(path))


def protocol_hash(splits: Mapping[str, Iterable[Clip]]) -> str:
    """SHA-256 of a protocol: of (utt_id, label, start, gain) of every clip of the three splits, in order."""
    return sha256_json([[[c.utt_id, c.label, c.start, c.gain] for c in splits[split]] for split in SPLITS])


def read_protocol(folder: str | os.PathLike) -> dict[str, Any]:
    """protocol.json of a protocol's folder, as stage 1 wrote it."""
    path = Path(folder) / PROTOCOL_FILE
    if not path.exists():
        raise KestrelError(f"{path} does not exist; run stage 1 first")
    return read_json(path)


def store_root(root: str | os.PathLike, folder: str | os.PathLike) -> str:
    """`root` as it is stored by a file in `folder`: relative where it lies inside `folder`, else absolute."""
    absolute, base = Path(os.path.abspath(root)), Path(os.path.abspath(folder))
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)


def protocol_roots(protocol: Mapping[str, Any], protocol_folder: str | os.PathLike) -> dict[str, Path]:
    """The audio folders of a protocol; relative ones lie below data/<corpus>, the parent of `protocol_folder`."""
    base = Path(os.path.abspath(protocol_folder)).parent
    return {name: base / root for name, root in protocol["roots"].items() if root is not None}
