"""Small stand-ins for training tests: feature files that can be learnt, and a network with every kind of randomness."""

from __future__ import annotations

import json
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from kestrel.errors import RunAgain
from kestrel.frontend.post import Post
from kestrel.models.network import Network
from kestrel.models.spotter import KeywordSpotter
from kestrel.store.hdf5 import FeatureFile
from kestrel.train import loop
from kestrel.train.data import Split
from kestrel.train.loop import Job, Result, train
from kestrel.train.signals import StopFlag, ignore_stop_signals
from kestrel.train.spec import PhaseSpec, TrainSpec

CLASSES = ["yes", "no", "silence"]
FRAMES, WIDTH = 5, 4
FILES = ("best.pt", "last.pt", "metrics.csv", "curves.png")


def write_features(path: Path, clips: int, seed: int = 0, spread: float = 1.5, poison: int | None = None) -> Path:
    """A feature file whose classes differ in their mean; row `poison` is not a number."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(len(CLASSES), FRAMES, WIDTH))
    labels = draw.integers(0, len(CLASSES), clips)
    features = centres[labels] + spread * draw.normal(size=(clips, FRAMES, WIDTH))
    if poison is not None:
        features[poison] = np.nan
    ids = [f"{CLASSES[label]}/s{row:03d}_nohash_0" for row, label in enumerate(labels)]
    attributes = {"format": "kestrel-features-1", "corpus": "c", "split": "x"}
    attributes |= {"classes": json.dumps(CLASSES), "frontend": '{"name": "none"}', "protocol": '{"name": "p"}'}
    return write_store(path, {"features": features.astype(np.float32)}, labels, ids, attributes)


def write_audio(path: Path, clips: int, samples: int = 400, seed: int = 0) -> Path:
    """Packed audio of random clips."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, len(CLASSES), clips)
    audio = draw.integers(-30000, 30000, (clips, samples)).astype(np.int16)
    ids = [f"{CLASSES[label]}/s{row:03d}_nohash_0" for row, label in enumerate(labels)]
    attributes: dict = {"format": "kestrel-audio-1", "corpus": "c", "split": "x", "sample_rate": 16000}
    attributes |= {"classes": json.dumps(CLASSES), "protocol": '{"name": "p"}'}
    return write_store(path, {"audio": audio}, labels, ids, attributes)


def write_store(path: Path, data: dict, labels: np.ndarray, ids: list[str], attributes: dict) -> Path:
    """An HDF5 store with one large set and its labels, ids and speakers."""
    with h5py.File(path, "w") as file:
        for key, value in attributes.items():
            file.attrs[key] = value
        for name, values in data.items():
            file[name] = values
        file["labels"] = labels.astype(np.int64)
        file["utt_id"] = ids
        file["speaker"] = [f"s{row % 7}" for row in range(len(ids))]
    return path


class NoisyNet(Network):
    """Dropout in pretraining, weight noise in retraining and evaluation, batch statistics, a penalty and a bound."""

    def __init__(self, noise: float = 0.05, drop: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.noise, self.drop = noise, drop
        self.first = nn.Linear(FRAMES * WIDTH, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.second = nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        if self.phase != "pretrain" and self.noise:
            weight = weight + self.noise * torch.randn_like(weight)
        hidden = self.norm(nn.functional.linear(x.flatten(1), weight, self.first.bias)).relu()
        if self.phase == "pretrain" and self.drop:
            hidden = nn.functional.dropout(hidden, self.drop)
        return self.second(hidden)

    def penalty(self) -> dict[str, Tensor]:
        return {"size": 1e-3 * self.first.weight.square().sum()}

    def project(self) -> None:
        self.second.weight.clamp_(-0.5, 0.5)


def make_spotter(seed: int = 0, **options: object) -> KeywordSpotter:
    """A spotter with fixed initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KeywordSpotter(Post([], (FRAMES, WIDTH)), NoisyNet(**options))  # type: ignore[arg-type]


def make_job(out_dir: Path, stage: str = "pretrain", phase: dict | None = None, shared: dict | None = None) -> Job:
    """Three epochs of Adam on the CPU, changed by `phase` and `shared`."""
    spec = PhaseSpec(**{"epochs": 3, "lr": [0.02, 0.005], **(phase or {})})
    if (phase or {}).get("steps") is not None and "epochs" not in (phase or {}):
        spec.epochs = None
    settings = TrainSpec(**{"batch_size": 16, "eval_batch_size": 16, "device": "cpu", **(shared or {})})
    identity = {"recipe": "r", "tag": "t", "classes": CLASSES, "config_hash": "0" * 64, "input_shape": [FRAMES, WIDTH]}
    return Job(stage, spec, settings, 3, out_dir, identity)  # type: ignore[arg-type]


def make_splits(folder: Path, job: Job) -> tuple[Split, Split]:
    """Training and validation split of the files train.h5 and validation.h5 in `folder`."""
    workers = job.train.workers
    options = {"batch_size": job.train.batch_size, "training": True, "seed": job.seed, "workers": workers}
    training = Split(FeatureFile(folder / "train.h5"), **options)  # type: ignore[arg-type]
    held_out = Split(FeatureFile(folder / "validation.h5"), batch_size=job.train.eval_batch_size, workers=workers)
    return training, held_out


def run(folder: Path, job: Job, **options: object) -> Result:
    """Train the stand-in network on the files in `folder`; `options` go to `train`."""
    spotter = options.pop("spotter", None) or make_spotter()
    return train(job, spotter, *make_splits(folder, job), **options)  # type: ignore[arg-type]


def contents(out_dir: Path) -> dict[str, bytes]:
    """The files of a stage that must not depend on how often it was started."""
    return {name: (out_dir / name).read_bytes() for name in FILES}


def quick_draw(path: Path, history: list, title: str) -> None:
    """In place of curves.draw_curves, where a test trains many times: the points as text."""
    path.write_text(f"{title} {history}")


def train_in_process(
    folder: str, out_dir: str, stage: str, shared: dict, pause: float, ready: Event, sent: str
) -> None:
    """Target of test processes: train, with `pause` seconds before each batch; exit code 75 as the step scripts do.

    Sets `ready` as soon as signals are handled; after it the last batch waits for the file `sent`, made when no more
    signals come. Outside this window they are ignored: the step scripts have handlers of their own there.
    """

    def wait(done: int, total: int, text: str) -> None:
        time.sleep(pause)
        while done == total and not Path(sent).exists():  # no lock, which a killed process would keep
            time.sleep(pause)

    ignore_stop_signals()
    loop.draw_curves = quick_draw
    code = 0
    with StopFlag() as stop:
        ready.set()
        torch.set_num_threads(1)
        job = make_job(Path(out_dir), stage, shared=shared)
        try:
            run(Path(folder), job, stop=stop, progress=wait)
        except RunAgain:
            code = 75
    raise SystemExit(code)
