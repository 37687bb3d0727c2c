"""Long noise recordings: their division among the splits, and the windows of them that are silence clips."""

from __future__ import annotations

from dataclasses import dataclass

from kestrel.corpus.manifest import Clip
from kestrel.corpus.rules import SILENCE_FOLDER
from kestrel.store.hashing import keyed_uniform

_GAIN_DIGITS = 4  # gains are written to CSV and hashed: few digits, the same everywhere


@dataclass(frozen=True, slots=True)
class NoiseFile:
    """A usable file of `_background_noise_`: `path` is `<root>:<relative path>`."""

    path: str
    stem: str
    samples: int


def noise_part(samples: int, split: str) -> tuple[int, int]:
    """[start, stop) of the part of a noise file that a split may use.

    In time: the first 80 % for train, the next 10 % for validation, the last 10 % for test, so that no sample
    of noise is shared between splits.
    """
    first, second = samples * 8 // 10, samples * 9 // 10
    return {"train": (0, first), "validation": (first, second), "test": (second, samples)}[split]


def silence_windows(files: list[NoiseFile], split: str, count: int, clip_samples: int, label: int) -> list[Clip]:
    """`count` different windows of the split's part of the noise files, with gains in 0..1, fixed by a keyed hash.

    Fewer where there are not that many different windows. Files count in proportion to their number of windows.
    """
    parts = []
    for file in sorted(files, key=lambda f: f.path):
        start, stop = noise_part(file.samples, split)
        parts.append((file, start, max(0, stop - start - clip_samples + 1)))  # (file, first start, number of starts)
    total = sum(starts for _, _, starts in parts)
    chosen: set[int] = set()
    clips: list[Clip] = []
    draw = 0
    while len(clips) < min(count, total):
        # position among the windows of all files in a row; a draw that repeats one is skipped
        position = min(int(keyed_uniform(f"silence-{split}", str(draw)) * total), total - 1)
        draw += 1
        if position in chosen:
            continue
        chosen.add(position)
        file, start = _window_at(parts, position)
        utt_id = f"{SILENCE_FOLDER}/{file.stem}@{start}"
        gain = round(keyed_uniform(f"silence-gain-{split}", utt_id), _GAIN_DIGITS)
        clips.append(Clip(utt_id, file.path, SILENCE_FOLDER, label, "", start, clip_samples, gain))
    return clips


def _window_at(parts: list[tuple[NoiseFile, int, int]], position: int) -> tuple[NoiseFile, int]:
    for file, first, starts in parts:
        if position < starts:
            return file, first + position
        position -= starts
    raise IndexError(position)
