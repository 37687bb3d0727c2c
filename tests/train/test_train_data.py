"""Batches: order, shares, workers, audio."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from train_kit import CLASSES, FRAMES, WIDTH, write_audio, write_features

from kestrel.corpus.augment import FeatureAugmenter
from kestrel.corpus.spec import AugmentSpec
from kestrel.errors import KestrelError
from kestrel.store.hdf5 import AudioFile, FeatureFile
from kestrel.train.data import Split, keyed_permutation

CLIPS = 23


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("features") / "train.h5", CLIPS)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_audio(tmp_path_factory.mktemp("audio") / "train.h5", CLIPS)


class Frames(nn.Module):
    """A front end: four frames, their mean and their root mean square."""

    width = 2

    def frames(self, samples: int) -> int:
        return 4

    def forward(self, wave: Tensor) -> Tensor:
        parts = wave.view(len(wave), 4, -1)  # [B, S] -> [B, 4, S / 4]
        return torch.stack([parts.mean(-1), parts.square().mean(-1).sqrt()], dim=-1)  # [B, 4, 2]


class Shift:
    """An augmenter keyed by (epoch, row): a gain."""

    def __call__(self, clips: np.ndarray, labels: np.ndarray, rows: np.ndarray, epoch: int) -> Tensor:
        gain = 1 / (1 + epoch + rows % 5 + labels)
        return torch.from_numpy((clips / 32768 * gain[:, None]).astype(np.float32))


def from_audio(path: Path, **options: object) -> Split:
    return Split(AudioFile(path), batch_size=5, training=True, frontend=Frames(), augmenter=Shift(), **options)  # type: ignore[arg-type]


@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 1000))
def test_orders_are_permutations_keyed_by_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    order = keyed_permutation(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert (order == keyed_permutation(n, seed, epoch)).all()
    if n > 20:
        assert (order != keyed_permutation(n, seed, epoch + 1)).any()
        assert (order != keyed_permutation(n, seed + 1, epoch)).any()


def test_the_order_is_the_same_on_every_machine() -> None:
    assert keyed_permutation(10, 0, 0).tolist() == [7, 8, 9, 1, 0, 6, 4, 3, 2, 5]


def test_training_batches_hold_every_clip_once(features: Path) -> None:
    file = FeatureFile(features)
    split = Split(file, batch_size=5, training=True, seed=1)
    batches = list(split.batches(epoch=2))
    assert [len(batch.rows) for batch in batches] == [5, 5, 5, 5, 3] and split.batches_per_epoch == 5
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == list(range(CLIPS)) and rows.tolist() == split.order(2).tolist()
    for batch in batches:
        assert batch.features.dtype == torch.float32 and batch.features.shape[1:] == (FRAMES, WIDTH) == split.shape
        assert np.array_equal(batch.features.numpy(), file.rows(batch.rows))
        assert np.array_equal(batch.labels.numpy(), file.labels[batch.rows])
    assert split.utt_ids(rows[:2]) == [file.utt_ids[int(row)] for row in rows[:2]]


def test_evaluation_keeps_the_order_of_the_file(features: Path) -> None:
    split = Split(FeatureFile(features), batch_size=7)
    for epoch in (0, 3):
        assert np.concatenate([batch.rows for batch in split.batches(epoch)]).tolist() == list(range(CLIPS))
    blocks = list(split.ordered())
    assert np.array_equal(torch.cat(blocks).numpy(), FeatureFile(features).rows(np.arange(CLIPS)))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_gives_the_tail_of_the_epoch(features: Path, audio: Path, workers: int) -> None:
    for split in (Split(FeatureFile(features), batch_size=5, training=True), from_audio(audio)):
        whole = list(split.batches(1))
        split.workers = workers
        for start in range(7):
            tail = list(split.batches(1, start))
            assert len(tail) == max(0, 5 - start)
            for one, other in zip(tail, whole[start:], strict=True):
                assert torch.equal(one.features, other.features) and torch.equal(one.labels, other.labels)


@given(world=st.integers(1, 6), size=st.integers(1, 9))
def test_processes_share_each_batch(features: Path, world: int, size: int) -> None:
    split = Split(FeatureFile(features), batch_size=size, training=True)
    shares = [list(split.batches(0, 0, rank, world)) for rank in range(world)]
    for number, whole in enumerate(split.batches(0)):
        parts = [share[number] for share in shares]
        for rank, part in enumerate(parts):
            assert part.rows.tolist() == whole.rows[rank::world].tolist()
            assert part.features.shape == (len(part.rows), FRAMES, WIDTH)
            assert torch.equal(part.features, whole.features[rank::world])


def test_audio_becomes_features_of_augmented_clips(audio: Path) -> None:
    split, file = from_audio(audio), AudioFile(audio)
    assert split.shape == (4, 2)
    for epoch in range(2):
        for batch in split.batches(epoch):
            wave = Shift()(file.rows(batch.rows), file.labels[batch.rows], batch.rows, epoch)
            assert torch.equal(batch.features, Frames()(wave))
    plain = Split(file, batch_size=5, frontend=Frames())
    expected = Frames()(torch.from_numpy(file.rows(np.arange(CLIPS)).astype(np.float32) / 32768))
    torch.testing.assert_close(torch.cat([batch.features for batch in plain.batches()]), expected)
    torch.testing.assert_close(torch.cat(list(split.ordered())), expected)  # statistics see clips as they are


def test_loader_processes_leave_the_global_generator_alone(features: Path) -> None:
    split = Split(FeatureFile(features), batch_size=5, training=True, workers=2)
    state = torch.get_rng_state()
    list(split.batches(0))
    assert torch.equal(state, torch.get_rng_state())


def test_loader_processes_outlive_stop_signals(audio: Path) -> None:
    split = from_audio(audio, workers=2)
    expected = [batch.features for batch in from_audio(audio).batches(0)]
    batches = split.batches(0)
    seen = [next(batches).features]
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(child.pid or 0, number)
    seen += [batch.features for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_a_dead_loader_process_is_one_line(audio: Path) -> None:
    class Suicide(Shift):
        def __call__(self, *arguments: object) -> Tensor:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    split = from_audio(audio, workers=1)
    split.augmenter = Suicide()  # type: ignore[assignment]
    with pytest.raises(KestrelError, match=r"a loader process died .*lower train\.workers") as caught:
        list(split.batches(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_reader_keep_their_one_line(audio: Path, workers: int) -> None:
    class Refuses(Shift):
        def __call__(self, *arguments: object) -> Tensor:
            raise KestrelError("clip 7 is damaged: run stage 2 again")

    split = from_audio(audio, workers=workers)
    split.augmenter = Refuses()  # type: ignore[assignment]
    with pytest.raises(KestrelError) as caught:
        list(split.batches(0))
    assert str(caught.value) == "clip 7 is damaged: run stage 2 again"


def test_splits_that_cannot_be_trained_on_are_refused(tmp_path: Path, features: Path, audio: Path) -> None:
    with pytest.raises(KestrelError, match="has no clips"):
        Split(FeatureFile(write_features(tmp_path / "empty.h5", 0)), batch_size=5)

    class Wrong(FeatureFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.labels = np.full(CLIPS, len(CLASSES))

    with pytest.raises(KestrelError, match="labels outside"):
        Split(Wrong(features), batch_size=5)
    with pytest.raises(ValueError, match="augmenter"):
        Split(AudioFile(audio), batch_size=5, frontend=Frames(), augmenter=Shift())  # type: ignore[arg-type]


def test_python_ends_although_batches_are_left(features: Path) -> None:
    """Loader processes ignore the signal by which Python ends its children; it must not wait for them."""
    code = (
        "import sys; from kestrel.store.hdf5 import FeatureFile; from kestrel.train.data import Split\n"
        f"batches = Split(FeatureFile({str(features)!r}), batch_size=2, training=True, workers=2).batches(0)\n"
        "next(batches); sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_features_of_training_clips_are_augmented_by_row(features: Path) -> None:
    file = FeatureFile(features)
    augment = FeatureAugmenter(AugmentSpec(shift_frames=2, time_masks=1), seed=4)
    batches = Split(file, batch_size=7, training=True, seed=4).batches(1)
    plain = {int(row): x for batch in batches for row, x in zip(batch.rows, batch.features, strict=True)}
    split = Split(file, batch_size=5, training=True, seed=4, feature_augmenter=augment)
    changed = 0
    for batch in split.batches(1):
        for row, found in zip(batch.rows, batch.features, strict=True):
            expected = augment(plain[int(row)][None], [int(row)], 1)[0]
            assert torch.equal(found, expected)
            changed += not torch.equal(found, plain[int(row)])
    assert changed > 0
    assert all(torch.equal(x, plain[i]) for i, x in enumerate(torch.cat(list(split.ordered()))))  # statistics stay
    with pytest.raises(ValueError, match="training"):
        Split(file, batch_size=5, feature_augmenter=augment)
