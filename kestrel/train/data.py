"""Batches of a split: stored features, or audio that is augmented and turned into features while training."""

from __future__ import annotations

import atexit
import hashlib
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kestrel.errors import KestrelError
from kestrel.train.signals import held_stop_signals, ignore_stop_signals

if TYPE_CHECKING:
    from kestrel.corpus.augment import Augmenter, FeatureAugmenter
    from kestrel.frontend.make import AnyFrontend

_FULL_SCALE = 32768.0  # int16 audio to -1..1


class Rows(Protocol):
    """A file of clips: kestrel.store.hdf5.FeatureFile (float32 rows [n, T, F]) or AudioFile (int16 rows [n, S])."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Clips, then the shape of a clip."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Class of each clip, int64 [N]."""
        ...

    @property
    def utt_ids(self) -> Sequence[str]:
        """Name of each clip."""
        ...

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of the labels."""
        ...

    def rows(self, rows: np.ndarray, /) -> np.ndarray:
        """The clips at these positions, in this order."""
        ...


class Batch(NamedTuple):
    """`features` float32 [B, T, F], `labels` int64 [B], `rows` int64 [B]: positions of the clips in the file."""

    features: Tensor
    labels: Tensor
    rows: np.ndarray


def keyed_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n rows that depends on (seed, epoch) alone: the order of a counter-based generator's numbers."""
    key = int.from_bytes(hashlib.sha256(f"order:{seed}:{epoch}".encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class _Clips(Dataset):
    """Clips of a batch, by their rows: what loader processes run. Errors are values: a raised one loses its text."""

    def __init__(self, source: Rows, augmenter: Augmenter | None, epoch: int) -> None:
        self.source, self.augmenter, self.epoch = source, augmenter, epoch
        self.labels = np.asarray(source.labels)

    def __getitem__(self, rows: np.ndarray) -> Tensor | KestrelError:
        try:
            stored = self.source.rows(rows)
            if self.augmenter is not None:
                return self.augmenter(stored, self.labels[rows], rows, self.epoch)
            # A copy in torch's own, aligned memory: matrix products may round otherwise where an array starts elsewhere.
            clips = torch.from_numpy(stored)
            return clips.float() / _FULL_SCALE if stored.dtype == np.int16 else clips.clone()
        except KestrelError as error:
            return error


def _start_worker(number: int) -> None:
    ignore_stop_signals()


class Split:
    """Clips of one split in batches.

    Args:
        source: a FeatureFile, or an AudioFile together with `frontend`.
        batch_size: clips of a batch; the last one of an epoch may be shorter.
        training: shuffle by a permutation keyed by (seed, epoch); else the order of the file.
        frontend: turns audio [B, S] in -1..1 into features [B, T, F]; it runs in this process, on the split's device.
        augmenter: augments the audio of training clips, keyed by (seed, epoch, row).
        feature_augmenter: augments the features of training clips, keyed in the same way; it runs in this process.
        workers: loader processes that read (and augment); the batches are the same for any number.

    Raises KestrelError where the file has no clips or labels outside of its classes.
    """

    def __init__(
        self,
        source: Rows,
        *,
        batch_size: int,
        training: bool = False,
        seed: int = 0,
        frontend: AnyFrontend | None = None,
        augmenter: Augmenter | None = None,
        feature_augmenter: FeatureAugmenter | None = None,
        workers: int = 0,
    ) -> None:
        if augmenter is not None and (frontend is None or not training):
            raise ValueError("an augmenter works on training audio: give a front end and training=True")
        if feature_augmenter is not None and not training:
            raise ValueError("an augmenter works on training clips: give training=True")
        self.source, self.batch_size, self.training, self.seed = source, batch_size, training, seed
        self.frontend, self.augmenter, self.workers = frontend, augmenter, workers
        self.feature_augmenter = feature_augmenter
        self.device = torch.device("cpu")
        self.labels = np.asarray(source.labels, dtype=np.int64)
        self.classes = list(source.classes)
        if not len(self.labels):
            raise KestrelError(f"{self.name} has no clips: prepare the corpus again, or choose another one")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise KestrelError(f"{self.name} has labels outside of its {len(self.classes)} classes: make it again")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        """Where the clips come from, for messages."""
        return str(getattr(self.source, "path", None) or ("training split" if self.training else "split"))

    @property
    def shape(self) -> tuple[int, int]:
        """(T, F): frames and width of a clip's features."""
        if self.frontend is not None:
            return self.frontend.frames(int(self.source.shape[1])), self.frontend.width
        _, frames, width = self.source.shape
        return int(frames), int(width)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass over the clips."""
        return -(-len(self) // self.batch_size)

    def utt_ids(self, rows: np.ndarray) -> list[str]:
        """Names of the clips at `rows`."""
        names = self.source.utt_ids
        return [str(names[int(row)]) for row in rows]

    def to(self, device: torch.device) -> Split:
        """Compute features on, and hand out batches on, this device."""
        self.device = device
        if self.frontend is not None:
            self.frontend.to(device)
        return self

    def order(self, epoch: int) -> np.ndarray:
        """Rows in the order of an epoch, int64 [N]."""
        return keyed_permutation(len(self), self.seed, epoch) if self.training else np.arange(len(self))

    def batches(self, epoch: int = 0, start_batch: int = 0, rank: int = 0, world: int = 1) -> Generator[Batch]:
        """Batches of an epoch from number `start_batch` on; process `rank` of `world` gets every world-th clip of each.

        Where a short batch leaves a process without a clip, its batch has none. Global random numbers are not used up.
        Raises KestrelError where the file is damaged or a loader process dies.
        """
        order, size = self.order(epoch), self.batch_size
        shares = [order[start : start + size][rank::world] for start in range(start_batch * size, len(self), size)]
        clips = self._load(_Clips(self.source, self.augmenter, epoch), [rows for rows in shares if len(rows)])
        for rows in shares:
            labels = torch.from_numpy(self.labels[rows]).to(self.device)
            if len(rows):
                features = self._features(next(clips))
                if self.feature_augmenter is not None:
                    features = self.feature_augmenter(features, rows, epoch)
                yield Batch(features, labels, rows)
            else:
                yield Batch(torch.zeros(0, *self.shape, device=self.device), labels, rows)

    def ordered(self) -> Iterator[Tensor]:
        """Features [B, T, F] of all clips in the order of the file, never augmented (for statistics)."""
        clips = _Clips(self.source, None, 0)
        for start in range(0, len(self), self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, len(self)))
            yield self._features(_checked(clips[rows]))

    def _features(self, clips: Tensor) -> Tensor:
        clips = clips.to(self.device)  # [B, T, F], or audio [B, S]
        if self.frontend is None:
            return clips
        with torch.no_grad():
            return self.frontend(clips)  # [B, S] -> [B, T, F]

    def _load(self, clips: _Clips, shares: list[np.ndarray]) -> Iterator[Tensor]:
        if self.workers == 0 or not shares:
            for rows in shares:
                yield _checked(clips[rows])
            return
        # A generator of its own: a loader otherwise draws a seed from the global one, which training draws from.
        loader: DataLoader[Any] = DataLoader(
            clips,
            batch_size=None,
            sampler=shares,  # an item is the rows of a batch
            num_workers=min(self.workers, len(shares)),
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if sys.platform == "linux" else None,  # others start slowly in each epoch
            generator=torch.Generator(),
        )
        with held_stop_signals():
            loaded = iter(loader)
        # Ends the processes, as the loader's destructor does. Where that has not run when Python exits (a traceback
        # holds the loader, say), Python would send the processes a signal that they ignore, and wait for ever.
        end = loaded._shutdown_workers  # type: ignore[attr-defined]
        atexit.register(end)
        try:
            for item in loaded:
                yield _checked(item)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = f"a loader process died ({str(error)[:80]})"
            raise KestrelError(f"{reason}: lower train.workers, then run again") from None
        finally:
            end()
            atexit.unregister(end)


def _checked(item: Tensor | KestrelError) -> Tensor:
    if isinstance(item, KestrelError):
        raise item
    return item
