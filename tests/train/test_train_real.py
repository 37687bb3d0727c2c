"""The loop with the real parts: packed audio, augmentation, a front end, quantised LSTM blocks; and its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from train_kit import CLASSES, make_job, quick_draw, write_audio, write_store

from kestrel.corpus.augment import Augmenter
from kestrel.corpus.spec import AugmentSpec
from kestrel.errors import RunAgain
from kestrel.frontend.features import Frontend
from kestrel.frontend.post import Post
from kestrel.frontend.spec import FrontendSpec
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.evaluate import predict
from kestrel.models.spotter import KeywordSpotter
from kestrel.store import checkpoint
from kestrel.store.hdf5 import AudioFile, FeatureFile
from kestrel.train import loop
from kestrel.train.data import Split
from kestrel.train.loop import Job, train
from kestrel.train.signals import StopFlag
from kestrel.train.validation import VALIDATION_CHIP

SAMPLES = 1600  # six frames
FRONTEND = FrontendSpec(window=640, hop=320, n_fft=640, mel_bands=20, f_min=20, coefficients=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training audio, and validation features made by the same front end."""
    path = tmp_path_factory.mktemp("audio")
    write_audio(path / "train.h5", 37, SAMPLES, seed=1)
    write_audio(path / "held_out.h5", 15, SAMPLES, seed=2)
    file = AudioFile(path / "held_out.h5")
    frontend = Frontend(FRONTEND)
    features = torch.cat(list(Split(file, batch_size=8, frontend=frontend).ordered())).numpy()
    attributes = {"format": "kestrel-features-1", "corpus": "c", "split": "validation", "frontend": '{"name": "f"}'}
    attributes |= {"classes": json.dumps(CLASSES), "protocol": '{"name": "p"}'}
    write_store(path / "validation.h5", {"features": features}, file.labels, file.utt_ids, attributes)
    return path


def train_blocks(folder: Path, job: Job, start: Path | None, **options: object) -> loop.Result:
    """One stage of two small LSTM blocks on augmented audio."""
    torch.manual_seed(5)
    noise = np.random.default_rng(3).integers(-9000, 9000, 20_000).astype(np.int16)
    augmenter = Augmenter(AugmentSpec(), noise, np.array([0, 8000, 20_000]), 16000, CLASSES.index("silence"), job.seed)
    batches = {"batch_size": 8, "training": True, "seed": job.seed, "workers": job.train.workers}
    split = Split(AudioFile(folder / "train.h5"), frontend=Frontend(FRONTEND), augmenter=augmenter, **batches)
    post = Post([{"normalise": "channel"}], split.shape)
    net = BlockLSTM(input_size=8, classes=3, hidden=6, n_msb=2, input_range=4.0, noise_train=0.1, noise_eval=0.1)
    spotter = KeywordSpotter(post, net)
    if start is None:
        post.fit(split.ordered())
    else:
        spotter.load_state_dict(checkpoint.load(start)["model"])
    held_out = Split(FeatureFile(folder / "validation.h5"), batch_size=8)
    return train(job, spotter, split, held_out, **options)  # type: ignore[arg-type]


def test_two_stages_on_audio_resume_exactly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DropConnect, then weight noise; stopped twice in each stage, with another number of workers afterwards."""
    monkeypatch.setattr(loop, "draw_curves", quick_draw)
    for name, stops in (("straight", ()), ("stopped", (4, 9))):
        start = None
        for stage in ("pretrain", "retrain"):
            job = make_job(tmp_path / name / stage, stage, {"epochs": 2, "lr": [0.01]}, {"batch_size": 8})
            for number, step in enumerate(stops):
                stop = StopFlag()
                job.train.workers = number

                def ask(done: int, total: int, text: str, step: int = step, stop: StopFlag = stop) -> None:
                    if done == step:
                        stop.set("test")

                with pytest.raises(RunAgain):
                    train_blocks(folder, job, start, stop=stop, progress=ask)
            result = train_blocks(folder, job, start)
            start = result.best
    for stage in ("pretrain", "retrain"):
        for file in ("best.pt", "last.pt", "metrics.csv", "curves.png"):
            one, other = (tmp_path / name / stage / file for name in ("straight", "stopped"))
            assert one.read_bytes() == other.read_bytes(), f"{stage}/{file}"
    header, *rows = (tmp_path / "straight" / "retrain" / "metrics.csv").read_text().splitlines()
    assert "penalty_range_l2,penalty_cosine,validation_loss" in header and len(rows) == 3


def test_validation_equals_scoring_the_same_split(folder: Path, tmp_path: Path) -> None:
    """Weight noise in evaluation is keyed, so a scorer that uses the same batches finds the accuracy again."""
    from kestrel.models.evaluate import accuracy, evaluation_noise

    job = make_job(tmp_path, "retrain", {"epochs": 1, "lr": [0.01]}, {"batch_size": 8})
    best = checkpoint.load(train_blocks(folder, job, None).best)
    post = Post([{"normalise": "channel"}], tuple(FeatureFile(folder / "validation.h5").shape[1:]))  # type: ignore[arg-type]
    net = BlockLSTM(input_size=8, classes=3, hidden=6, n_msb=2, input_range=4.0, noise_train=0.1, noise_eval=0.1)
    spotter = KeywordSpotter(post, net)
    spotter.load_state_dict(best["model"])
    file = FeatureFile(folder / "validation.h5")
    with evaluation_noise(job.seed, VALIDATION_CHIP, torch.device("cpu")):
        found = accuracy(predict(spotter, file, 8), file.labels)
    assert found.value == best["metrics"]["validation_accuracy"]


MEMORY = """
import sys
from pathlib import Path
import torch
from train_kit import make_job
from kestrel.frontend.post import Post
from kestrel.models.network import Network
from kestrel.models.spotter import KeywordSpotter
from kestrel.store.hdf5 import FeatureFile
from kestrel.train.data import Split
from kestrel.train.loop import train
class Net(Network):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(98 * 40, 3)
    def forward(self, x):
        return self.layer(x.flatten(1))
folder = Path(sys.argv[1])
file = FeatureFile(folder / "train.h5")
split = Split(file, batch_size=100, training=True)
spotter = KeywordSpotter(Post([], split.shape), Net())
job = make_job(folder / "out", phase={"steps": 40, "lr": [0.001]})
train(job, spotter, split, Split(FeatureFile(folder / "validation.h5"), batch_size=500))
# ru_maxrss would hold what the calling process had at the fork
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_training_on_36923_clips(tmp_path: Path) -> None:
    """At most 1.5 GB in all (the clips alone would take 0.58 GB as float32)."""
    draw = np.random.default_rng(0)
    for name, clips in (("train", 36923), ("validation", 1000)):
        data = np.tile(draw.integers(0, 256, (97, 98, 40), dtype=np.uint8), (clips // 97 + 1, 1, 1))[:clips]
        labels = draw.integers(0, 3, clips)
        attributes = {"format": "kestrel-features-1", "corpus": "c", "split": name, "frontend": '{"name": "f"}'}
        attributes |= {"classes": json.dumps(CLASSES), "protocol": '{"name": "p"}'}
        ids = [f"yes/{row}_nohash_0" for row in range(clips)]
        write_store(tmp_path / f"{name}.h5", {"features": data}, labels, ids, attributes)
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            file["features"].attrs["scale"], file["features"].attrs["offset"] = 0.02, -2.0
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0  # GiB; far below the limit, so that larger networks have room
