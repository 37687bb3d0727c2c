"""Small corpora in GSC layout, written clip by clip."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16000
CLIP = 800  # samples of the clips in these tests: long enough to tell them apart, short enough to write thousands

Write = Callable[..., Path]


@pytest.fixture
def write_clip() -> Write:
    """write_clip(path, samples=CLIP, seed=0): a mono 16-bit file of noise, wav or flac by its ending."""

    def write(path: Path, samples: int = CLIP, seed: int = 0, rate: int = RATE) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = np.random.default_rng(seed).integers(-9000, 9000, samples, dtype=np.int16)
        soundfile.write(path, wave, rate, subtype="PCM_16", format="FLAC" if path.suffix == ".flac" else "WAV")
        return path

    return write


@pytest.fixture
def make_corpus(write_clip: Write) -> Callable[..., Path]:
    """make_corpus(root, {word: names}): a folder in GSC layout with two noise files."""

    def make(root: Path, words: dict[str, Iterable[str]], noise: int = 2, suffix: str = ".wav") -> Path:
        for word, names in words.items():
            for number, name in enumerate(names):
                write_clip(root / word / f"{name}{suffix}", seed=number)
        for number in range(noise):
            write_clip(root / "_background_noise_" / f"noise{number}{suffix}", samples=20 * CLIP, seed=number)
        return root

    return make
