"""A copy of the code to run in, and a small corpus of tones: what tests of whole runs stand on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CODE = ("run.sh", "path.sh", "cmd.sh", "pyproject.toml", "steps", "local", "conf", "recipes", "kestrel", "runtime")
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
OTHERS = ("bed", "cat")
SPEAKERS = {"train": 18, "validation": 6, "test": 6}
RATE = 16000


@dataclass(frozen=True)
class Checkout:
    """A copy of the code with its own data/, feat/ and exp/: what runs in it leaves nothing in the repository."""

    root: Path

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment for run.sh: this Python, none of the caller's virtual environments."""
        kept = {
            key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
        }
        return {**kept, "KESTREL_PYTHON": sys.executable, **changes}

    def command(self, *arguments: str) -> list[str]:
        """The command line of a run."""
        return ["bash", str(self.root / "run.sh"), *arguments]

    def run(
        self, *arguments: str, cwd: Path | None = None, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Call run.sh and wait for it."""
        return subprocess.run(
            self.command(*arguments),
            cwd=cwd or self.root,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def files(self) -> set[str]:
        """Everything below data/, feat/ and exp/, as paths below the root."""
        found: set[str] = set()
        for folder in ("data", "feat", "exp"):
            found |= {str(path.relative_to(self.root)) for path in (self.root / folder).rglob("*")}
        return found


def copy_code(root: Path) -> Checkout:
    """Copy the code to `root`."""
    root.mkdir(parents=True)
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", ".tmp-*"))
        else:
            shutil.copy2(source, root / name)
    for name in ("data", "feat", "exp"):
        (root / name).mkdir()
    return Checkout(root)


def _split(speaker: str) -> str:
    # The archive's rule for 10 % validation and 10 % test, written down a second time.
    share = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 2**27 * 100 / (2**27 - 1)
    return "validation" if share < 10 else "test" if share < 20 else "train"


def speakers_of(split: str, count: int | None = None) -> list[str]:
    """Speaker ids (8 hex digits) that the hash rule puts into `split`."""
    names = (hashlib.sha1(f"speaker {number}".encode()).hexdigest()[:8] for number in range(10_000))
    return [name for name in names if _split(name) == split][: SPEAKERS[split] if count is None else count]


def write_wave(path: Path, samples: np.ndarray) -> None:
    """Write samples in -1..1 as 16-bit mono at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def write_tone_corpus(folder: Path, counts: Mapping[str, int] = SPEAKERS) -> Path:
    """A corpus in GSC layout: each of 12 words is a gliding tone of its own, said once by each speaker.

    `counts` has the number of speakers of each split, 30 in all where not given.
    """
    speakers = [name for split, count in counts.items() for name in speakers_of(split, count)]
    for number, word in enumerate(KEYWORDS + OTHERS):
        for speaker in speakers:
            draw = np.random.default_rng([number, int(speaker, 16)])
            time = np.arange(int(RATE * draw.uniform(0.5, 1.0))) / RATE
            pitch = 200 * 1.28**number * draw.uniform(0.95, 1.05)
            glide = pitch * (time + (0.3 if number % 2 else -0.3) * time**2)
            tone = np.sin(2 * np.pi * glide) * np.hanning(len(time))
            write_wave(folder / word / f"{speaker}_nohash_0.wav", 0.5 * tone + 0.02 * draw.standard_normal(len(time)))
    for number in range(2):
        noise = np.random.default_rng([99, number]).standard_normal(24 * RATE)
        write_wave(folder / "_background_noise_" / f"noise_{number}.wav", 0.1 * noise)
    return folder
