"""Rules of the Speech Commands protocols: who speaks, which split a name belongs to, how many clips a class gets.

Source: Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", arXiv:1804.03209 (2018),
section 7, and the README of the archive.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

from kestrel.corpus.audio import stem
from kestrel.errors import KestrelError

MARK = "_nohash_"
UNKNOWN_FOLDER = "_unknown_"
SILENCE_FOLDER = "_silence_"
NOISE_FOLDER = "_background_noise_"
_LARGEST = 2**27 - 1  # the archive's limit of clips per class; its rule takes the hash modulo this + 1


def hash_split(name: str, validation_percentage: float, testing_percentage: float) -> str:
    """The archive's rule: the split of a file name depends on what stands before `_nohash_`, so on its speaker.

    p = 100 (SHA-1(name) mod 2^27) / (2^27 - 1); p < validation: `validation`; p < validation + testing: `test`;
    else `train`. A name without the mark is hashed as a whole.
    """
    speaker = name.partition(MARK)[0]
    digest = int(hashlib.sha1(speaker.encode("utf-8"), usedforsecurity=False).hexdigest(), 16)
    share = (digest % (_LARGEST + 1)) * (100.0 / _LARGEST)
    if share < validation_percentage:
        return "validation"
    if share < validation_percentage + testing_percentage:
        return "test"
    return "train"


def speaker_of(folder: str, file_stem: str) -> str:
    """The speaker of a clip, or "" where its name has no `_nohash_`.

    Clips of `_unknown_` carry their word in front: the speaker of `backward_0c540988_nohash_0` is `0c540988`.
    """
    speaker, mark, _ = file_stem.partition(MARK)
    if not mark:
        return ""
    if folder == UNKNOWN_FOLDER and "_" in speaker:
        speaker = speaker.partition("_")[2]
    return speaker


def share_of(count: int, percentage: float | None) -> int:
    """Clips of a class that gets `percentage` clips per 100 of `count`, rounded up (0 where there is no such class)."""
    return 0 if percentage is None else math.ceil(count * Fraction(str(percentage)) / 100)


def split_size(keywords: int, unknown_percentage: float | None, silence_percentage: float | None) -> int:
    """Clips of a split with `keywords` keyword clips: 30,769 at 10 % and 10 % give 36,923."""
    return keywords + share_of(keywords, unknown_percentage) + share_of(keywords, silence_percentage)


def read_list(path: Path) -> set[str]:
    """The clips that a list file names, as `<word>/<stem>`: without ending, so that it serves wav and flac alike."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KestrelError(f"cannot read {path}: {error}") from None
    names = set()
    for number, line in enumerate(lines, 1):
        entry = line.strip().replace("\\", "/")
        if not entry:
            continue
        parts = entry.split("/")
        if len(parts) < 2 or not parts[-1] or not parts[-2]:
            raise KestrelError(f"{path} line {number}: expected <word>/<file>, not {entry!r}")
        names.add(f"{parts[-2]}/{stem(parts[-1])}")
    return names
