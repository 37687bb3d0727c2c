"""Where the audio of a corpus lies: roots.json in data/<corpus>/raw, written by stage 0 and read by stage 1."""

from __future__ import annotations

import os
from pathlib import Path

from kestrel.corpus import audio
from kestrel.corpus.manifest import store_root
from kestrel.errors import KestrelError
from kestrel.store.atomic import read_json, write_json

ROOTS_FILE = "roots.json"


def write_roots(raw: str | os.PathLike, main: str | os.PathLike, test: str | os.PathLike | None) -> None:
    """Point stage 1 at the audio: paths inside `raw` are stored relative to it, others absolute."""
    roots = {"main": store_root(main, raw), "test": None if test is None else store_root(test, raw)}
    write_json(Path(raw) / ROOTS_FILE, roots)


def read_roots(raw: str | os.PathLike) -> tuple[Path, Path | None]:
    """(folder of the corpus, folder of its separate test clips or None). Raises KestrelError before stage 0."""
    path = Path(raw) / ROOTS_FILE
    if not path.exists():
        raise KestrelError(f"{path} does not exist; run stage 0 first")
    roots = read_json(path)
    base = Path(os.path.abspath(raw))
    return base / roots["main"], None if roots.get("test") is None else base / roots["test"]


def check_layout(folder: str | os.PathLike) -> None:
    """Raise KestrelError where `folder` does not look like Speech Commands: a folder per word with audio files."""
    root = Path(folder)
    if not root.is_dir():
        raise KestrelError(f"corpus folder {root} does not exist")
    try:
        for entry in os.scandir(root):
            if entry.is_dir() and not entry.name.startswith("."):
                with os.scandir(entry.path) as clips:
                    if any(audio.is_audio_name(clip.name) for clip in clips):
                        return
    except OSError as error:
        raise KestrelError(f"cannot list {error.filename or root}: {error.strerror}") from None
    raise KestrelError(f"{root} is not in GSC layout: expected one folder per word with .wav or .flac clips")
