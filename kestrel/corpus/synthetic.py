"""The embedded corpus: words of Speech Commands spoken by eSpeak NG with many invented speakers.

It exists so that every stage runs anywhere, without a download. Its speakers differ in pitch, vocal tract, accent,
speed, room and background noise, and never straddle splits; but they all are one synthesiser, so an accuracy on it
says that the pipeline works and nothing about human voices.

eSpeak NG is a GPL-3 library; it is loaded at run time from the optional package espeakng-loader and is no part of
Kestrel. Its engine keeps state from clip to clip, so clips are made in fixed blocks of speakers, each in a fresh
process: the files are the same for any number of workers.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import logging
import os
import random
import shutil
import tempfile
import wave
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kestrel.corpus.rules import MARK, NOISE_FOLDER, hash_split
from kestrel.corpus.spec import CorpusSpec
from kestrel.corpus.workers import WorkerPool
from kestrel.errors import KestrelError
from kestrel.store.atomic import atomic_folder, disk_error

CORE_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")  # said `keyword_takes` times
# fmt: off
WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
    "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
    "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)
# fmt: on
SAMPLE_RATE = 16000
CLIP_SAMPLES = 16000
BLOCK = 16  # speakers of one process; part of what the corpus is: another value gives other files
_ENGINE_RATE = 22050
_LONGEST = 26460  # engine samples kept of one word (1.2 s; slow words take 1 s), the silence around it taken off
_PADDED = 33075  # the same with 0.3 s for its echo; 441 * 75, so that it becomes 320 * 75 samples at 16 kHz

# Voice files of the English accents below the engine's data folder (names such as `en-gb` refuse own variants).
_ACCENTS = (
    "gmw/en-US",
    "gmw/en",
    "gmw/en-GB-scotland",
    "gmw/en-GB-x-rp",
    "gmw/en-GB-x-gbclan",
    "gmw/en-GB-x-gbcwmd",
    "gmw/en-029",
    "gmw/en-US-nyc",
)
# eSpeak NG's speak_lib.h: playback mode, parameters, character mode and position type
_SYNCHRONOUS = 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8 = 1
_PATH_LIMIT = 120  # the engine copies its data path into 160 bytes and adds file names


@dataclass(frozen=True)
class Speaker:
    """An invented speaker: `identity` is the name used in files, `variant` the text of an eSpeak voice file."""

    identity: str
    variant: str
    accent: str
    rate: float  # words per minute
    room_seconds: float
    room_level: float  # reverberation against the direct sound, as an amplitude ratio
    tilt: float  # colour of the microphone: coefficient of a first-order filter


def _identity(seed: int, index: int) -> str:
    """Eight hex digits that the official rule puts into the wanted split: of ten speakers, one each into
    validation and test. A corpus of few speakers has all three splits this way."""
    wanted = {4: "validation", 9: "test"}.get(index % 10, "train")
    for attempt in range(10_000):
        name = hashlib.sha256(f"kestrel-speaker:{seed}:{index}:{attempt}".encode()).hexdigest()[:8]
        if hash_split(f"{name}{MARK}0.wav", 10.0, 10.0) == wanted:
            return name
    raise AssertionError("10,000 hashes in a row missed a split of ten percent")


def speaker(seed: int, index: int) -> Speaker:
    """Speaker `index` of the corpus with this seed; the same on every machine."""
    draw = random.Random(f"kestrel-voice:{seed}:{index}")
    kind = draw.choice(("man", "man", "man", "woman", "woman", "woman", "child"))
    pitch = draw.uniform(*{"man": (80, 145), "woman": (160, 235), "child": (225, 290)}[kind])  # Hz
    tract = draw.uniform(*{"man": (90, 104), "woman": (108, 121), "child": (120, 134)}[kind])  # formants in percent
    lines = [
        "language variant",
        f"name k{index}",
        f"gender {'male' if kind == 'man' else 'female'}",
        f"pitch {pitch:.0f} {pitch * draw.uniform(1.15, 1.45):.0f}",
        f"flutter {draw.randint(0, 10)}",
        f"roughness {draw.randint(0, 3)}",
        f"voicing {draw.randint(85, 110)}",
        f"consonants {draw.randint(75, 115)} {draw.randint(75, 115)}",
    ]
    for formant in range(9):
        frequency, height, width = tract * draw.uniform(0.96, 1.04), draw.uniform(80, 118), draw.uniform(85, 140)
        lines.append(f"formant {formant} {frequency:.0f} {height:.0f} {width:.0f}")
    if draw.random() < 0.3:
        lines.append("breath " + " ".join(str(draw.randint(0, 3)) for _ in range(8)))
    if draw.random() < 0.15:
        lines.append(f"klatt {draw.randint(1, 5)}")
    return Speaker(
        identity=_identity(seed, index),
        variant="\n".join(lines) + "\n",
        accent=draw.choice(_ACCENTS),
        rate=draw.uniform(120, 195),
        room_seconds=draw.uniform(0.04, 0.25),
        room_level=draw.uniform(0.05, 0.5),
        tilt=draw.uniform(-0.4, 0.4),
    )


class _Engine:
    """eSpeak NG through ctypes. One per process: the library has global state."""

    def __init__(self, data_parent: str) -> None:
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_SetSynthCallback.argtypes = [callback]
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._library = library
        self._pieces: list[np.ndarray] = []
        self._callback = callback(self._receive)  # the engine keeps the pointer, so it must stay referenced
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_parent.encode(), 0)
        if rate != _ENGINE_RATE:
            raise KestrelError(f"eSpeak NG did not start (answer {rate}); reinstall it: pip install espeakng-loader")
        library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer, count: int, events: int) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    @staticmethod
    def _check(answer: int, what: str) -> None:
        if answer != 0:
            raise KestrelError(
                f"eSpeak NG failed to {what} (answer {answer}); reinstall it: pip install espeakng-loader"
            )

    def set_voice(self, name: str) -> None:
        self._check(self._library.espeak_SetVoiceByName(name.encode()), f"load the voice {name}")

    def say(self, word: str, rate: int, pitch: int, pitch_range: int, seed: int) -> np.ndarray:
        """One word as float64 in -1..1 at 22,050 Hz."""
        self._pieces.clear()
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._check(self._library.espeak_SetParameter(parameter, value, 0), "take a parameter")
        self._library.espeak_ng_SetRandSeed(seed)
        text = word.encode() + b"\0"
        self._check(self._library.espeak_Synth(text, len(text), 0, 1, 0, _UTF8, None, None), f"say {word!r}")
        self._check(self._library.espeak_Synchronize(), f"say {word!r}")
        if not any(np.abs(piece).max() > 64 for piece in self._pieces):
            raise KestrelError(f"eSpeak NG said nothing for {word!r}; reinstall it: pip install espeakng-loader")
        sound = np.concatenate(self._pieces)
        loud = np.flatnonzero(np.abs(sound) > 64)
        return sound[loud[0] : loud[-1] + 1][:_LONGEST] / 32768.0


def _data_folder(speakers: Sequence[tuple[int, Speaker]]) -> str:
    """A short temporary folder with the engine's data and our voice files beside its own."""
    import espeakng_loader

    base = tempfile.gettempdir()
    parent = tempfile.mkdtemp(prefix="ks", dir=base if len(base) < _PATH_LIMIT - 40 else "/tmp")
    source, data = espeakng_loader.get_data_path(), os.path.join(parent, "espeak-ng-data")
    variants = os.path.join(data, "voices", "!v")
    os.makedirs(variants)
    for name in os.listdir(source):
        if name != "voices":
            os.symlink(os.path.join(source, name), os.path.join(data, name))
    for index, who in speakers:
        Path(variants, f"k{index}").write_text(who.variant, encoding="ascii")
    return parent


def _response(who: Speaker, draw: np.random.Generator) -> np.ndarray:
    """Resampling gain, room and microphone of a speaker as a frequency response [bins] at 16 kHz."""
    count = _PADDED * 320 // 441
    length = int(who.room_seconds * SAMPLE_RATE)
    decay = np.exp(-6.9 * np.arange(length) / length)  # -60 dB at the end
    room = draw.normal(size=length) * decay
    room *= who.room_level / np.sqrt(np.sum(room**2))
    room[0] = 1.0
    spectrum = np.fft.rfft(room, count) * (320 / 441)
    return spectrum * (1 + who.tilt * np.exp(-2j * np.pi * np.arange(len(spectrum)) / count))


def _coloured(count: int, colour: float, draw: np.random.Generator) -> np.ndarray:
    """`count` samples of noise with unit power and an amplitude spectrum of f^-colour (0 white, 0.5 pink, 1 brown)."""
    spectrum = np.fft.rfft(draw.normal(size=count))
    spectrum[0] = 0
    spectrum[1:] *= np.arange(1, len(spectrum)) ** -colour
    noise = np.fft.irfft(spectrum, count)
    return noise / np.sqrt(np.mean(noise**2))


def _record(word: np.ndarray, response: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A dry word at the engine's rate as a one-second recording, int16 [CLIP_SAMPLES]."""
    # one pass through the spectrum: resampling by 320/441 (bins above 8 kHz are left out), room and microphone
    wet = np.fft.irfft(np.fft.rfft(word, _PADDED)[: len(response)] * response, _PADDED * 320 // 441)
    loud = np.flatnonzero(np.abs(wet) > 0.03 * np.abs(wet).max())
    speech = wet[loud[0] : loud[-1] + 1][:CLIP_SAMPLES]

    level = 10 ** (draw.uniform(-30, -16) / 20)  # RMS of the word against full scale
    speech = speech * (level / (np.sqrt(np.mean(speech**2)) + 1e-12))
    clip = _coloured(CLIP_SAMPLES, draw.uniform(0, 0.8), draw) * level * 10 ** (-draw.uniform(10, 40) / 20)
    # people speak near the middle of the second that is recorded
    slack = CLIP_SAMPLES - len(speech)
    start = int(slack * draw.uniform(0.2, 0.8))
    clip[start : start + len(speech)] += speech
    return np.rint(np.clip(clip, -1, 1) * 32767).astype(np.int16)


def write_wav(path: str | os.PathLike, samples: np.ndarray) -> None:
    """Write int16 samples [N] as a mono WAV file at 16 kHz."""
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def _speak_block(job: tuple[str, str, int, range, tuple[str, ...], int]) -> int:
    """All clips of one block of speakers; returns their number."""
    out, data_parent, seed, indices, words, takes = job
    engine = _Engine(data_parent)
    clips = 0
    for index in indices:
        who = speaker(seed, index)
        engine.set_voice(f"{who.accent}+k{index}")
        response = _response(who, np.random.default_rng([seed, index]))  # all clips of a speaker: one room
        for number, word in enumerate(words):
            for take in range(takes if word in CORE_WORDS else 1):
                draw = np.random.default_rng([seed, index, number, take])
                spoken = engine.say(
                    word,
                    rate=int(who.rate * draw.uniform(0.88, 1.12)),
                    pitch=int(draw.uniform(38, 62)),
                    pitch_range=int(draw.uniform(25, 80)),
                    seed=int(draw.integers(1, 2**31 - 1)),
                )
                samples = _record(spoken, response, draw)
                write_wav(os.path.join(out, word, f"{who.identity}{MARK}{take}.wav"), samples)
                clips += 1
    return clips


def _noise(name: str, seed: int) -> np.ndarray:
    """One long recording of background noise, int16, 30 to 60 seconds."""
    number = sorted(_NOISES).index(name)
    draw = np.random.default_rng([seed, 0x6E6F, number])
    count = SAMPLE_RATE * int(draw.integers(30, 61))
    sound = _NOISES[name](count, draw)
    sound *= 10 ** (-18 / 20) / np.sqrt(np.mean(sound**2))
    return np.rint(np.clip(sound, -1, 1) * 32767).astype(np.int16)


def _wander(count: int, seconds: float, draw: np.random.Generator) -> np.ndarray:
    """A smooth random curve in 0..1 [count] with a corner every `seconds`."""
    knots = draw.uniform(size=int(count / (seconds * SAMPLE_RATE)) + 2)
    return np.interp(np.arange(count), np.linspace(0, count, len(knots)), knots)


def _machine(count: int, draw: np.random.Generator) -> np.ndarray:
    """A motor: harmonics of a wandering rotation, and its rattle."""
    phase = 2 * np.pi * np.cumsum(40 + 25 * _wander(count, 3.0, draw)) / SAMPLE_RATE
    tone = sum(np.sin(k * phase + draw.uniform(0, 6.3)) / k for k in range(1, 13))
    return tone + 0.6 * _coloured(count, 0.5, draw) * (0.6 + 0.4 * np.sin(phase))


def _crowd(count: int, draw: np.random.Generator) -> np.ndarray:
    """A murmur: noise of the speech band that rises and falls at the pace of syllables."""
    sound = np.zeros(count)
    frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    for centre in (350.0, 700.0, 1300.0, 2300.0):
        band = np.exp(-0.5 * (np.log2(np.maximum(frequency, 1) / centre) / 0.4) ** 2)
        noise = np.fft.irfft(np.fft.rfft(draw.normal(size=count)) * band, count)
        sound += noise / np.sqrt(np.mean(noise**2)) * _wander(count, 0.15, draw) ** 2 * (350 / centre) ** 0.5
    return sound


def _dishes(count: int, draw: np.random.Generator) -> np.ndarray:
    """Clatter: ringing knocks at random moments over soft noise."""
    sound = 0.05 * _coloured(count, 0.5, draw)
    length = SAMPLE_RATE // 4
    time = np.arange(length) / SAMPLE_RATE
    for start in draw.integers(0, count - length, size=3 * count // SAMPLE_RATE):
        ring = sum(np.sin(2 * np.pi * draw.uniform(800, 6000) * time) for _ in range(4))
        sound[start : start + length] += draw.uniform(0.1, 1) * ring * np.exp(-time / draw.uniform(0.01, 0.06))
    return sound


_NOISES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "clattering_dishes": _dishes,
    "murmuring_crowd": _crowd,
    "pink_noise": lambda count, draw: _coloured(count, 0.5, draw),
    "running_machine": _machine,
    "running_water": lambda count, draw: _coloured(count, 0.15, draw) * (0.5 + _wander(count, 0.8, draw)),
    "white_noise": lambda count, draw: _coloured(count, 0.0, draw),
}


def _make_noises(job: tuple[str, int]) -> None:
    out, seed = job
    for name in _NOISES:
        write_wav(os.path.join(out, NOISE_FOLDER, f"{name}.wav"), _noise(name, seed))


def _engine_version() -> str:
    try:
        import espeakng_loader  # noqa: F401

        return importlib.metadata.version("espeakng-loader")
    except ImportError:
        raise KestrelError(
            "synthetic speech needs espeakng-loader (it brings eSpeak NG, GPL-3): pip install espeakng-loader"
        ) from None


def synthesise(
    out_dir: str | os.PathLike,
    spec: CorpusSpec,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    words: Sequence[str] = WORDS,
) -> int:
    """Make the corpus in `out_dir` (a new folder, or in place of the old one); returns the number of clips.

    Layout of Speech Commands: `<word>/<speaker>_nohash_<take>.wav`, one second at 16 kHz, and six noise files in
    `_background_noise_`. `spec.speakers` speakers say each core keyword `spec.keyword_takes` times and every other
    word once. The files depend on `spec` and `words` alone. Raises KestrelError where espeakng-loader is missing.
    """
    version = _engine_version()
    log = logging.getLogger("kestrel")
    log.info(
        "synthetic speech: eSpeak NG (GPL-3, loaded at run time from espeakng-loader %s, no part of Kestrel)", version
    )
    indices = range(spec.speakers)
    blocks = [indices[start : start + BLOCK] for start in range(0, spec.speakers, BLOCK)]
    per_speaker = sum(spec.keyword_takes if word in CORE_WORDS else 1 for word in words)
    data_parent = _data_folder([(index, speaker(spec.seed, index)) for index in indices])
    done = 0
    try:
        with atomic_folder(out_dir) as folder:
            for name in (*words, NOISE_FOLDER):
                (folder / name).mkdir()
            jobs = [(str(folder), data_parent, spec.seed, block, tuple(words), spec.keyword_takes) for block in blocks]
            # a task per process: every block meets a fresh engine
            with WorkerPool(max(1, workers), max_tasks_per_child=1) as pool:
                noises = pool.submit(_make_noises, (str(folder), spec.seed))
                for clips in pool.map(_speak_block, jobs):
                    done += clips
                    if progress is not None:
                        progress(done, per_speaker * spec.speakers)
                noises.result()
    except BrokenProcessPool:
        raise KestrelError("a process of the speech synthesis died; run stage 0 again with --nproc 1") from None
    except OSError as error:
        raise disk_error(Path(error.filename or out_dir), error) from None
    finally:
        shutil.rmtree(data_parent, ignore_errors=True)
    log.info("synthetic corpus: %d clips of %d words by %d speakers", done, len(words), spec.speakers)
    return done
