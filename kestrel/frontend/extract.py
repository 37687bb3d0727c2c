"""Stage 2: manifests to packed audio and noise, and packed audio to feature files. Memory does not grow with the clips'
audio."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from kestrel.corpus.audio import read_window
from kestrel.corpus.manifest import Clip, locate
from kestrel.corpus.noise import noise_part
from kestrel.errors import KestrelError
from kestrel.frontend.make import AnyFrontend, makes_codes
from kestrel.frontend.spec import stored
from kestrel.store.hdf5 import AudioFile, AudioWriter, FeatureWriter, NoiseWriter

Progress = Callable[[int, int], None]

_log = logging.getLogger("kestrel")
_BLOCK = 256  # clips in memory at a time
_NOISE_BLOCK = 1 << 20  # samples


def pack_audio(
    clips: Iterable[Clip],
    roots: Mapping[str, Path],
    protocol: dict[str, Any],
    split: str,
    path: Path,
    progress: Progress | None = None,
    workers: int = 1,
) -> None:
    """Write the clips of one split as packed audio (int16, all of `protocol["clip_samples"]` samples, in the manifest's
    order).

    `workers` threads decode; the file does not depend on their number. Raises KestrelError where a clip is gone or has
    changed, or the disk is full; nothing is left under `path` then.
    """
    rows = list(clips)
    samples = int(protocol["clip_samples"])

    def read(clip: Clip) -> np.ndarray:
        return read_window(locate(clip.path, roots), clip.start, clip.samples, samples, clip.gain)

    writer = AudioWriter(
        path,
        labels=[clip.label for clip in rows],
        utt_ids=[clip.utt_id for clip in rows],
        speakers=[clip.speaker for clip in rows],
        clip_samples=samples,
        sample_rate=int(protocol["sample_rate"]),
        classes=protocol["classes"],
        corpus=str(protocol.get("corpus", "")),
        protocol=protocol,
        split=split,
    )
    with writer, ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            writer.append(np.stack(list(pool.map(read, block))))
            if progress:
                progress(start + len(block), len(rows))


def pack_noise(protocol: dict[str, Any], roots: Mapping[str, Path], path: Path) -> None:
    """Write the training part (the first 80 %) of each noise file of the protocol as packed noise.

    Raises KestrelError as pack_audio.
    """
    names = list(protocol.get("noise_files", []))
    files = [locate(name, roots) for name in names]
    lengths = [noise_part(_noise_length(file, int(protocol["sample_rate"])), "train")[1] for file in files]
    with NoiseWriter(path, names=names, lengths=lengths, sample_rate=int(protocol["sample_rate"])) as writer:
        for file, length in zip(files, lengths, strict=True):
            for start in range(0, length, _NOISE_BLOCK):
                count = min(_NOISE_BLOCK, length - start)
                writer.append(read_window(file, start, count, count))


def _noise_length(path: Path, sample_rate: int) -> int:
    try:
        info = soundfile.info(str(path))
    except (OSError, RuntimeError) as error:
        raise KestrelError(f"cannot read {path} ({' '.join(str(error).split())}); run stage 1 again") from None
    if info.samplerate != sample_rate or info.channels != 1:
        raise KestrelError(f"{path} has changed since stage 1 looked at it; run stage 1 again")
    return info.frames


def extract(audio: AudioFile, frontend: AnyFrontend, path: Path, progress: Progress | None = None) -> None:
    """Write the features of packed audio as a feature file, row by row the same clips: float32, or of a fixed-point front
    end its int16 codes.

    The front end's settings are stored with them. A row holds exactly what `frontend` gives for its clip in any batch.
    Raises KestrelError where sample rates differ or the disk is full; nothing is left under `path` then.
    """
    spec = frontend.spec
    if audio.sample_rate != spec.sample_rate:
        raise KestrelError(
            f"{audio.path} holds {audio.sample_rate} samples per second, "
            f"front end {spec.name!r} expects {spec.sample_rate}"
        )
    note = frontend.describe_empty_filters()
    if note and audio.split == "train":  # once for the three splits
        _log.info("%s", note)
    clips, samples = audio.shape
    writer = FeatureWriter(
        path,
        labels=audio.labels,
        utt_ids=audio.utt_ids,
        speakers=audio.speakers,
        frames=frontend.frames(samples),
        width=frontend.width,
        classes=audio.classes,
        frontend=stored(spec),
        corpus=audio.corpus,
        protocol=audio.protocol,
        split=audio.split,
        dtype="int16" if makes_codes(frontend) else "float32",
        scale=frontend.scale if makes_codes(frontend) else 1.0,
    )
    device = next(iter(frontend.buffers())).device
    done = 0
    with writer:
        for block in audio.iterate(_BLOCK):
            wave = torch.from_numpy(block).to(device)
            if makes_codes(frontend):
                writer.write(frontend.codes(wave).cpu().numpy())  # [n, T, F]
            else:
                features = frontend(wave)  # [n, T, F]
                if not torch.isfinite(features).all():
                    raise KestrelError(f"{audio.path}: features of rows {done}..{done + len(block) - 1} are not finite")
                writer.append(features.cpu().numpy())
            done += len(block)
            if progress:
                progress(done, clips)
