"""Speed of the front ends, features only, in clips of one second per second.

    python -m bench.bench_frontend [--threads 2] [--clips 100] [--rounds 60] [--cpu-time]

Columns: one clip at a time with torchaudio's transform made anew for each (the loop of the original code bases);
torchaudio in batches; kestrel in the same batches; kestrel reading random rows of packed audio as well. The variants
take turns and the best round of each counts, because the machine may be shared; on a busy one, only the ratios of
--cpu-time mean something. "deviation" is the largest difference from torchaudio in float64, clip by clip. Spartus'
frames and filters have no torchaudio transform: the nearest one stands for its cost, without a deviation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kestrel.frontend._torchaudio import transforms
from kestrel.frontend.features import Frontend
from kestrel.frontend.filters import analysis_window
from kestrel.frontend.spec import FrontendSpec
from kestrel.settings import build, load_yaml
from kestrel.store.hdf5 import AudioFile, AudioWriter

CONF = Path(__file__).resolve().parents[1] / "conf" / "frontends"
NAMES = ("iscas21", "nas_kws40", "nas_kws", "hello_edge", "tinyspeech", "logmel40", "spartus")
RATE = 16000
LOOP_CLIPS = 8
LONGEST = 5.0


class _LogMel(nn.Module):
    def __init__(self, mel: nn.Module, spec: FrontendSpec) -> None:
        super().__init__()
        self.mel, self.spec = mel, spec

    def forward(self, wave: Tensor) -> Tensor:
        mel, floor = self.mel(wave), self.spec.log_floor
        return torch.log(mel + floor) if self.spec.log == "ln" else 20 * mel.clamp(min=floor).log10()


def torchaudio_transform(spec: FrontendSpec) -> nn.Module:
    """The torchaudio transform of a front end, or the nearest one: [B, S] -> [B, F, T]."""
    window = analysis_window(spec)
    options = {
        "n_fft": spec.n_fft, "win_length": spec.window, "hop_length": spec.hop, "window_fn": lambda _: window.float(),
        "f_min": spec.f_min, "f_max": spec.f_max, "n_mels": spec.mel_bands, "center": spec.center, "power": spec.power,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if spec.coefficients is None:
            return _LogMel(transforms.MelSpectrogram(RATE, **options), spec)
        return transforms.MFCC(RATE, spec.coefficients, log_mels=spec.log == "ln", melkwargs=options)


def deviation(spec: FrontendSpec, frontend: Frontend, wave: Tensor) -> float | None:
    """Largest difference of features of wave [B, S] from torchaudio in float64; None where it has no such transform."""
    if spec.mel_rule != "htk":
        return None
    if spec.framing == "window":  # the same frames for torchaudio: window in the middle of n_fft
        lead = (spec.n_fft - spec.window) // 2
        reference = nn.functional.pad(wave, (lead, spec.n_fft - spec.window - lead))
    else:
        reference = wave
    exact = torchaudio_transform(spec).double()
    ours = frontend(wave)
    worst = 0.0
    for clip, features in zip(reference.double(), ours, strict=True):
        wanted = exact(clip[None])[0].T[: len(features)]  # [T, F]
        worst = max(worst, float((features - wanted).abs().max()))
    return worst


def best_times(variants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of the best round of each variant; they take turns. At least 3 rounds, then `LONGEST` seconds."""
    begin = time.perf_counter()
    best = dict.fromkeys(variants, float("inf"))
    for variant in variants.values():
        variant()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begin > LONGEST:
            break
        for name, variant in variants.items():
            start = clock()
            variant()
            best[name] = min(best[name], clock() - start)
    return best


def speech_like(clips: int, seed: int = 0) -> np.ndarray:
    """int16 [clips, 16000]: noise with a falling spectrum under a slow envelope, of different loudness."""
    draw = np.random.default_rng(seed)
    spectrum = np.fft.rfft(draw.standard_normal((clips, RATE)))
    spectrum /= np.maximum(20.0, np.arange(spectrum.shape[1]))
    wave = np.fft.irfft(spectrum, RATE)
    wave *= 0.02 + np.sin(np.pi * np.arange(RATE) / RATE) ** 4
    wave *= draw.uniform(0.02, 0.9, (clips, 1)) / np.abs(wave).max(1, keepdims=True)
    return np.rint((wave + draw.normal(0, 2e-4, wave.shape)).clip(-1, 1) * 32767).astype(np.int16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, default=100, help="clips of a batch")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its CPU time instead of the clock")
    parser.add_argument("--frontends", nargs="+", default=list(NAMES))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    threads = 1 if arguments.cpu_time else arguments.threads
    torch.set_num_threads(threads)
    audio = speech_like(arguments.clips)
    wave = torch.from_numpy(audio).float() / 32768.0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.h5"
        names = [str(index) for index in range(4 * len(audio))]
        with AudioWriter(
            path, labels=[0] * len(names), utt_ids=names, speakers=names, clip_samples=RATE, sample_rate=RATE,
            classes=["word"], corpus="bench", protocol={"name": "bench"}, split="train",
        ) as writer:  # fmt: skip
            for _ in range(4):
                writer.append(audio)
        packed = AudioFile(path)
        order = np.random.default_rng(1).permutation(len(packed))[: len(audio)]
        for name in arguments.frontends:
            rows.append(measure(name, wave, packed, order, arguments.rounds, arguments.cpu_time))
    print(
        f"clips per second{' of CPU time' if arguments.cpu_time else ''}, {threads} threads, torch {torch.__version__}"
    )
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(name: str, wave: Tensor, packed: AudioFile, order: np.ndarray, rounds: int, cpu: bool) -> dict[str, object]:
    """Clips per second of all variants of one front end."""
    spec = build(FrontendSpec, load_yaml(CONF / f"{name}.yaml"), name)
    frontend, batched = Frontend(spec), torchaudio_transform(spec)

    @torch.no_grad()
    def loop() -> None:
        for clip in wave[:LOOP_CLIPS]:
            torchaudio_transform(spec)(clip[None])

    @torch.no_grad()
    def batches() -> None:
        batched(wave)

    def reading() -> None:
        for part in np.array_split(order, max(1, len(order) // 128)):
            frontend(torch.from_numpy(packed.rows(part)))

    variants: dict[str, Callable[[], object]] = {
        "loop": loop, "torchaudio": batches, "kestrel": lambda: frontend(wave), "kestrel and reading": reading,
    }  # fmt: skip
    seconds = best_times(variants, rounds, time.thread_time if cpu else time.perf_counter)
    speed = {key: (LOOP_CLIPS if key == "loop" else len(wave)) / value for key, value in seconds.items()}
    shape = f"{frontend.frames(RATE)} x {frontend.width}"
    title = f"{name} ({spec.window}/{spec.hop}, {spec.mel_bands} mels)"
    return {"front end": title, "shape": shape, **speed, "deviation": deviation(spec, frontend, wave[:16])}


def print_table(rows: list[dict]) -> None:
    """The figures as a Markdown table."""
    columns = ("loop", "torchaudio", "kestrel", "kestrel and reading")
    print(f"| front end | frames x width | {' | '.join(columns)} | ratio | with reading | deviation |")
    print("|---" * 9 + "|")
    for row in rows:
        speeds = [f"{row[column]:,.0f}" for column in columns]
        ratios = [f"{row[column] / row['torchaudio']:.1f}x" for column in columns[2:]]
        shown = "-" if row["deviation"] is None else f"{row['deviation']:.1e}"
        print(f"| {' | '.join([row['front end'], row['shape'], *speeds, *ratios, shown])} |")


if __name__ == "__main__":
    main()
