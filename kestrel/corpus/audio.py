"""Audio files: check that a clip can be decoded as a whole, and read a window of it as 16-bit samples."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from kestrel.errors import KestrelError

SUFFIXES = (".wav", ".flac")
_BLOCK = 1 << 20  # samples decoded at a time: a long recording must not fill the memory
_UNKNOWN_LENGTH = 0xFFFFFFFF  # RIFF size written by programs that stream into a pipe
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE", "VORBIS", "OPUS")


@dataclass(frozen=True, slots=True)
class Probe:
    """What a look at one clip found: its length, and why it cannot be used (None: it can)."""

    samples: int
    reason: str | None = None


def stem(name: str) -> str:
    """A file name without its audio endings; the archive has names that end in `.wav.wav`."""
    while name.lower().endswith(SUFFIXES):
        name = name[: name.rindex(".")]
    return name


def _missing_wav_bytes(file: BinaryIO, size: int) -> int:
    """Bytes that the data chunk of a RIFF file declares beyond the end of the file.

    The decoder adjusts the length of a truncated WAV file without a word, so its header is read here.
    """
    head = file.read(12)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return 0
    position = 12
    while position + 8 <= size:
        file.seek(position)
        chunk, length = struct.unpack("<4sI", file.read(8))
        if chunk == b"data":
            return 0 if length == _UNKNOWN_LENGTH else max(0, position + 8 + length - size)
        position += 8 + length + (length & 1)
    return 0


def probe(path: str | os.PathLike, sample_rate: int, channels: int = 1) -> Probe:
    """Open and decode the whole file; never raises for a bad one, the reason says what is wrong with it."""
    name = os.fspath(path)
    try:
        if not os.path.isfile(name):
            return Probe(0, "not a file")
        size = os.path.getsize(name)
        if size == 0:
            return Probe(0, "empty file (zero bytes)")
        with open(name, "rb") as file:
            missing = _missing_wav_bytes(file, size)
            file.seek(0)
            return _decode(file, missing, sample_rate, channels)
    except OSError as error:
        return Probe(0, f"cannot be read ({error.strerror or error})")
    except soundfile.LibsndfileError as error:
        return Probe(0, f"not an audio file that can be decoded ({error.error_string.strip().rstrip('.')})")
    except (RuntimeError, ValueError, MemoryError) as error:
        return Probe(0, f"cannot be decoded ({' '.join(str(error).split())})")


def _decode(file: BinaryIO, missing_bytes: int, sample_rate: int, channels: int) -> Probe:
    with soundfile.SoundFile(file) as sound:
        declared = sound.frames
        if sound.samplerate != sample_rate:
            return Probe(declared, f"sample rate {sound.samplerate} Hz instead of {sample_rate}")
        if sound.channels != channels:
            return Probe(declared, f"{sound.channels} channels instead of {channels}")
        kind = "float32" if sound.subtype in _FLOAT_SUBTYPES else "int16"
        decoded, finite = 0, True
        try:
            while len(block := sound.read(_BLOCK, dtype=kind)):
                decoded += len(block)
                finite = finite and (kind == "int16" or bool(np.isfinite(block).all()))
        except soundfile.LibsndfileError as error:
            return Probe(decoded, f"damaged after {decoded} samples ({error.error_string.strip().rstrip('.')})")
    if missing_bytes:
        return Probe(decoded, f"truncated: {missing_bytes} bytes of the declared samples are missing")
    if decoded < declared:
        return Probe(decoded, f"truncated: {decoded} of {declared} samples")
    if decoded == 0:
        return Probe(0, "no samples (header only)")
    if not finite:
        return Probe(decoded, "NaN or infinite samples")
    return Probe(decoded)


def read_window(path: str | os.PathLike, start: int, samples: int, clip_samples: int, gain: float = 1.0) -> np.ndarray:
    """The window [start, start + samples) of a mono file as int16 [clip_samples].

    A shorter window is centred in zeros (the odd sample of padding behind it), a longer one is cut to its
    centre; floating-point files are clipped to -1..1, and `gain` is a factor on the result.
    Raises KestrelError where the file is gone or holds fewer samples than stage 1 saw.
    """
    cut = max(0, samples - clip_samples)
    begin, count = start + cut // 2, samples - cut
    try:
        with soundfile.SoundFile(os.fspath(path)) as sound:
            is_float = sound.subtype in _FLOAT_SUBTYPES
            sound.seek(begin)
            wave = sound.read(count, dtype="float32" if is_float else "int16")
    except (OSError, RuntimeError, soundfile.LibsndfileError) as error:
        text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
        raise KestrelError(f"cannot read {path} ({' '.join(text.split())}); run stage 1 again") from None
    if wave.shape != (count,):
        raise KestrelError(f"{path} has changed since stage 1 looked at it; run stage 1 again")
    if is_float or gain != 1.0:
        scale = gain * 32768 if is_float else gain
        wave = np.clip(np.rint(wave.astype(np.float64) * scale), -32768, 32767).astype(np.int16)
    if count == clip_samples:
        return wave
    clip = np.zeros(clip_samples, np.int16)
    front = (clip_samples - count) // 2
    clip[front : front + count] = wave
    return clip


def is_audio_name(name: str) -> bool:
    """Whether a file name has an ending of the formats that are read."""
    return Path(name).suffix.lower() in SUFFIXES
