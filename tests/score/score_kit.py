"""A small trained spotter and a feature file for it, for tests of score and export."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.nn import functional

from kestrel.frontend.post import Post
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.spotter import KeywordSpotter
from kestrel.store.hdf5 import FeatureFile

CLASSES = ["yes", "no", "go", "silence"]
FRAMES, WIDTH = 8, 6
FEATURE_SCALE = 2.0**-10  # of integer features; they stay below 32
POST = [{"normalise": "channel"}, {"stack": 2}]
IDENTITY = {
    "recipe": "iscas21_lstm",
    "variant": "mini",
    "tag": "mini-toy-4-seed3",
    "seed": 3,
    "protocol": {"name": "toy-4", "hash": "ab" * 32},
    "classes": CLASSES,
    "frontend": {"name": "toy", "hop": 320, "coefficients": None},
    "feature": {"frontend": "toy", "post": POST},
    "config_hash": "cd" * 32,
}
PROVENANCE = {
    "checkpoint_sha256": "ef" * 32,
    "git_commit": "0123abcd",
    "git_dirty": False,
    "torch": torch.__version__,
    "device": "cpu",
    "train_seconds": 1.5,
    "command": "./run.sh --recipe iscas21_lstm",
}
PROTOCOL = {
    "name": "toy-4",
    "hash": "ab" * 32,
    "counts": {"train": {"yes": 1000, "no": 2}, "test": {"yes": 30}},
    "roots": {"main": "/home/someone/corpus", "test": None},
    "clip_samples": 16000,
    "rules": {"words": ["yes", "no", "go"], "unknown_percentage": None, "split": "hash"},
    "excluded": {"speaker is in the test set": 7},
    "notes": ["evaluation silence = noise windows fixed by hash"],
}


def clips(n: int, noise: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n, FRAMES, WIDTH] around one pattern per class, and labels."""
    patterns = np.random.default_rng(5).normal(0, 1, (len(CLASSES), FRAMES, WIDTH))
    rng = np.random.default_rng(n)
    labels = rng.integers(0, len(CLASSES), n)
    return (3 + patterns[labels] + rng.normal(0, noise, (n, FRAMES, WIDTH))).astype(np.float32), labels


def feature_file(folder: Path, n: int = 130, classes: list[str] | None = None, noise: float = 1.2) -> FeatureFile:
    """A test.h5 with `n` clips."""
    features, labels = clips(n, noise)
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "test.h5", "w") as file:
        file.attrs["format"], file.attrs["corpus"], file.attrs["split"] = "kestrel-features-1", "toy", "test"
        file.attrs["classes"] = json.dumps(classes or CLASSES)
        file.attrs["frontend"] = json.dumps({"name": "toy"})
        file.attrs["protocol"] = json.dumps(PROTOCOL)
        file["features"], file["labels"] = features, labels.astype(np.int64)
        ids = [f"{CLASSES[label]}/clip{row}_nohash_0" for row, label in enumerate(labels)]
        file.create_dataset("utt_id", data=ids, shape=(n,), dtype=h5py.string_dtype())
        file.create_dataset("speaker", data=["s"] * n, shape=(n,), dtype=h5py.string_dtype())
    return FeatureFile(folder / "test.h5")


@functools.cache
def _trained(quant_w: int | None) -> dict[str, torch.Tensor]:
    model = untrained(quant_w=quant_w)
    features, labels = (torch.from_numpy(array) for array in clips(200))
    model.post.fit([features])
    model.net.set_phase("retrain")
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(25):
        optimiser.zero_grad()
        functional.cross_entropy(model(features), labels).backward()
        optimiser.step()
        model.net.project()
    return model.state_dict()


def untrained(
    quant_w: int | None = None, noise_eval: float = 0.0, classes: int = len(CLASSES), **model: object
) -> KeywordSpotter:
    """Two blocks of 8 units, freshly initialised."""
    torch.manual_seed(1)
    net = BlockLSTM(
        input_size=2 * WIDTH,
        classes=classes,
        hidden=8,
        n_msb=2,
        input_range=4.0,
        quant_w=quant_w,
        noise_train=0.0,
        noise_eval=noise_eval,
        **model,
    )
    return KeywordSpotter(Post(POST, (FRAMES, WIDTH)), net)


def spotter(quant_w: int | None = None, noise_eval: float = 0.0) -> KeywordSpotter:
    """The same, trained for a moment."""
    model = untrained(quant_w, noise_eval)
    model.load_state_dict(_trained(quant_w))
    return model


def analog() -> KeywordSpotter:
    """A spotter with analog crossbar inputs, which has no integer form."""
    model = untrained(quant_inp=None)
    model.load_state_dict(_trained(None))
    return model


def metrics_csv(path: Path, rows: int = 12, first: float = 0.25) -> Path:
    """A metrics.csv as training writes it."""
    lines = ["step,epoch,phase,lr,train_loss,train_accuracy,penalty_cosine,validation_loss,validation_accuracy"]
    lines.append(f"0,0,retrain,0.001,,,,1.4,{first}")
    for row in range(1, rows):
        error = (1 - first) * 0.8**row
        lines.append(f"{100 * row},{row},retrain,0.001,{error + 0.1},{1 - error},0.01,{error + 0.2},{0.98 - error}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path
