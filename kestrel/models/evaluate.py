"""A trained spotter applied to a whole split: logits, accuracy with its interval, and repeatable evaluation noise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from kestrel.errors import KestrelError
from kestrel.store.hashing import sha256_json

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
ProgressCallback = Callable[[int, int], None]


class Features(Protocol):
    """What evaluation needs of a feature file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(clips, frames, width)."""
        ...

    def rows(self, rows: np.ndarray, /) -> np.ndarray:
        """Features of these rows, float32 [n, T, F]."""
        ...


class Passes:
    """One progress figure over several passes through the same clips."""

    def __init__(self, progress: ProgressCallback | None, clips: int, passes: int) -> None:
        self._progress, self._clips, self._passes, self._begun = progress, clips, passes, 0

    def next(self) -> ProgressCallback:
        """The callback of the next pass."""
        before = self._begun * self._clips
        self._begun += 1

        def advance(done: int, _: int) -> None:
            if self._progress is not None:
                self._progress(before + done, self._passes * self._clips)

        return advance


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` clips."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        """Share of correct clips, 0-1 (0 where there are no clips)."""
        return self.correct / self.n if self.n else 0.0

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % Wilson interval of the share."""
        return wilson(self.correct, self.n)


def wilson(correct: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a binomial share (E. B. Wilson, JASA 22 (1927) 209-212); (0, 1) where n is 0.

    Unlike the normal approximation it stays inside [0, 1] and keeps its coverage near 0 and 1.
    """
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Accuracy of the first largest of `logits` [N, C] against `labels` [N]."""
    return Accuracy(int((logits.argmax(axis=1) == labels).sum()), len(labels))


def ties(logits: np.ndarray) -> int:
    """Clips whose largest logit [N, C] stands more than once, as quantised logits may; the first class is taken."""
    return int(((logits == logits.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())


@contextlib.contextmanager
def evaluation_noise(seed: int, chip: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's default generators start from a number made of (seed, chip); afterwards they are as before.

    One `chip` is one draw of the hardware's random deviations, so scoring the same chip twice gives the same logits.
    """
    start = int(sha256_json(["evaluation noise", seed, chip])[:15], 16)
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(start)
        try:
            yield
        finally:
            if mps_state is not None:  # fork_rng does not know this device
                torch.mps.set_rng_state(mps_state)


def device_of(spotter: torch.nn.Module) -> torch.device:
    """Where the parameters of a module lie (the CPU where it has none)."""
    return next((parameter.device for parameter in spotter.parameters()), torch.device("cpu"))


def predict(
    spotter: KeywordSpotter, data: Features, batch_size: int, progress: ProgressCallback | None = None
) -> np.ndarray:
    """Logits of every clip in the order of the file, float32 [N, C], in the evaluation phase.

    Noise is drawn batch by batch, so `batch_size` is part of what makes a noisy evaluation repeatable.
    Raises KestrelError where a feature or a logit is not finite.
    """
    spotter.eval()
    spotter.net.set_phase("eval")
    device, clips = device_of(spotter), data.shape[0]
    if not clips:
        raise KestrelError("the split has no clips; check its manifest, or choose another split")
    parts: list[np.ndarray] = []
    with torch.no_grad():
        for start in range(0, clips, batch_size):
            index = np.arange(start, min(start + batch_size, clips))
            features = torch.as_tensor(data.rows(index), device=device)  # [B, T, F]
            refuse_not_finite(data, features, index)
            logits = spotter(features).float().cpu().numpy()  # [B, C]
            if not np.isfinite(logits).all():
                row = int(index[np.flatnonzero(~np.isfinite(logits).all(axis=1))[0]])
                raise KestrelError(
                    f"the network's logits of clip {row} are not finite; train again with a lower learning rate"
                )
            parts.append(logits)
            if progress is not None:
                progress(int(index[-1]) + 1, clips)
    return np.concatenate(parts)


def refuse_not_finite(data: object, features: torch.Tensor, rows: np.ndarray) -> None:
    """Raise KestrelError with the name of the clip unless all `features` [B, T, F] of the clips `rows` are finite."""
    broken = ~torch.isfinite(features).flatten(1).all(1).cpu().numpy()
    if broken.any():
        row = int(rows[int(np.flatnonzero(broken)[0])])
        names = getattr(data, "utt_ids", None)
        clip = f"{row} ({names[row]})" if names is not None else f"{row}"
        where = getattr(data, "path", None)
        raise KestrelError(f"{f'{where}: ' if where else ''}features of clip {clip} are not finite: make them again")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
