"""Feature post-processing: an ordered list of steps between a feature file and the network.

The steps belong to the model: they are stored in its checkpoint and exported with it. On features [B, T, F]:

    normalise: channel | global    subtract mean, divide by deviation of the training split (per channel or over all)
    dct: K                         first K coefficients of the orthonormal DCT-II over the channels: [B, T, K]
    local_dct: [G, K]              channels in G groups of neighbours, K coefficients of each: [B, T, G * K]
    stack: N                       N neighbouring frames become one: [B, T // N, N * F]; left-over frames are dropped
    average: N                     mean of N neighbouring frames: [B, T // N, F]; left-over frames are dropped
    bands: N                       mean of N neighbouring channels: [B, T, F // N]; left-over channels are dropped
    crop: [START, STOP]            frames START .. STOP - 1
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kestrel.errors import KestrelError, UsageError, unknown
from kestrel.frontend.filters import dct_matrix

Shape = tuple[int, int]


class _Step(nn.Module):
    """One step; `output_shape` is (T', F')."""

    output_shape: Shape


class Normalise(_Step):
    """(x - mean) / deviation, with statistics of the training split. A constant channel becomes zero."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, scope: str, shape: Shape) -> None:
        super().__init__()
        self.scope = scope
        self.output_shape = shape
        width = shape[1] if scope == "channel" else 1
        self.register_buffer("mean", torch.full((width,), torch.nan))
        self.register_buffer("deviation", torch.full((width,), torch.nan))

    def fit(self, batches: Iterator[Tensor]) -> None:
        """Mean and (biased) standard deviation over batches [B, T, F], merged in float64 (Chan et al. 1983)."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            values = batch.detach().double().cpu()
            values = values.reshape(-1, values.shape[-1] if self.scope == "channel" else 1)  # [n, width]
            if not values.numel():
                continue
            n, batch_mean = values.shape[0], values.mean(0)
            batch_squares = (values - batch_mean).square().sum(0)
            difference = batch_mean - mean
            mean = mean + difference * (n / (count + n))
            squares = squares + batch_squares + difference.square() * (count * n / (count + n))
            count += n
        if not count:
            raise KestrelError("no training features to take statistics from")
        if not torch.isfinite(mean).all() or not torch.isfinite(squares).all():
            raise KestrelError("the training features hold values that are not finite: run stage 2 again with --force")
        deviation = (squares / count).sqrt()
        # A deviation below the resolution of float32 is rounding of a constant, which must not be blown up.
        constant = deviation <= (1e-7 * mean.abs()).clamp(min=1e-12)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(constant, 1.0, deviation))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class Dct(_Step):
    """Orthonormal DCT-II over the channels, first `kept` coefficients; of each of `groups` of neighbours by itself."""

    matrix: Tensor

    def __init__(self, kept: int, shape: Shape, groups: int = 1) -> None:
        super().__init__()
        self.output_shape = (shape[0], groups * kept)
        edges = [round(group * shape[1] / groups) for group in range(groups + 1)]
        blocks = [dct_matrix(high - low, kept) for low, high in itertools.pairwise(edges)]
        self.register_buffer("matrix", torch.block_diag(*blocks).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Stack(_Step):
    """Neighbouring frames side by side, in order of time."""

    def __init__(self, count: int, shape: Shape) -> None:
        super().__init__()
        self.output_shape = (shape[0] // count, count * shape[1])
        self.used = self.output_shape[0] * count

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.used].reshape(-1, *self.output_shape)


class Average(_Step):
    """Mean of neighbouring frames."""

    def __init__(self, count: int, shape: Shape) -> None:
        super().__init__()
        self.output_shape = (shape[0] // count, shape[1])
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        frames, width = self.output_shape
        return x[:, : frames * self.count].reshape(-1, frames, self.count, width).mean(2)


class Bands(_Step):
    """Mean of neighbouring channels."""

    def __init__(self, count: int, shape: Shape) -> None:
        super().__init__()
        self.output_shape = (shape[0], shape[1] // count)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        frames, width = self.output_shape
        return x[:, :, : width * self.count].reshape(-1, frames, width, self.count).mean(3)


class Crop(_Step):
    """Frames start .. stop - 1."""

    def __init__(self, start: int, stop: int, shape: Shape) -> None:
        super().__init__()
        self.start, self.stop = start, stop
        self.output_shape = (stop - start, shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]


def _whole(value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{where}: expected a whole number, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{where}: {value} is out of bounds ({low}..{high})")
    return value


def _normalise(value: Any, where: str, shape: Shape) -> _Step:
    if value not in ("channel", "global"):
        raise unknown(f"value of {where}", str(value), ("channel", "global"))
    return Normalise(value, shape)


def _crop(value: Any, where: str, shape: Shape) -> _Step:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise UsageError(f"{where}: expected [START, STOP], not {value!r}")
    start = _whole(value[0], f"{where}[0]", 0, shape[0] - 1)
    return Crop(start, _whole(value[1], f"{where}[1]", start + 1, shape[0]), shape)


def _local_dct(value: Any, where: str, shape: Shape) -> _Step:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise UsageError(f"{where}: expected [GROUPS, COEFFICIENTS], not {value!r}")
    groups = _whole(value[0], f"{where}[0]", 1, shape[1])
    return Dct(_whole(value[1], f"{where}[1]", 1, shape[1] // groups), shape, groups)


_STEPS: dict[str, Callable[[Any, str, Shape], _Step]] = {
    "normalise": _normalise,
    "dct": lambda value, where, shape: Dct(_whole(value, where, 1, shape[1]), shape),
    "local_dct": _local_dct,
    "stack": lambda value, where, shape: Stack(_whole(value, where, 1, shape[0]), shape),
    "average": lambda value, where, shape: Average(_whole(value, where, 1, shape[0]), shape),
    "bands": lambda value, where, shape: Bands(_whole(value, where, 1, shape[1]), shape),
    "crop": _crop,
}


def _look_for_statistics(post: nn.Module, _: Any) -> None:
    assert isinstance(post, Post)
    post._ready = all(bool(torch.isfinite(s.deviation).all()) for s in post.steps if isinstance(s, Normalise))


class Post(nn.Module):
    """The steps as one module: [B, T, F] -> [B, T', F']. `input_shape` and `output_shape` are (T, F) and (T', F').

    `steps` is the list of the settings, one mapping of one key each. A wrong step is a UsageError. Where a step needs
    statistics, `fit` must run (or a state_dict be loaded) before `forward`.
    """

    def __init__(self, steps: Sequence[Any], input_shape: Sequence[int]) -> None:
        super().__init__()
        shape: Shape = (int(input_shape[0]), int(input_shape[1]))
        self.input_shape = shape
        self.steps = nn.ModuleList()
        for index, step in enumerate(steps):
            where = f"feature.post[{index}]"
            if not isinstance(step, dict) or len(step) != 1:
                raise UsageError(f"{where}: expected one step such as 'normalise: channel', not {step!r}")
            ((name, value),) = step.items()
            if name not in _STEPS:
                raise unknown(f"step of {where}", str(name), _STEPS)
            module = _STEPS[name](value, f"{where}.{name}", shape)
            shape = module.output_shape
            self.steps.append(module)
        self.output_shape: Shape = shape
        self._ready = not any(isinstance(step, Normalise) for step in self.steps)
        self.register_load_state_dict_post_hook(_look_for_statistics)

    @property
    def fitted(self) -> bool:
        """Whether all statistics are there."""
        return self._ready

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Take the statistics of the training split from batches [B, T, F]; a no-op where no step needs any.

        A second `normalise` needs a second pass: `batches` must then be something that can be iterated again.
        """
        places = [index for index, step in enumerate(self.steps) if isinstance(step, Normalise)]
        if len(places) > 1 and iter(batches) is batches:
            raise ValueError("several normalise steps need batches that can be iterated more than once")
        for place in places:
            earlier = list(itertools.islice(self.steps, place))
            step = self.steps[place]
            assert isinstance(step, Normalise)
            device = step.mean.device
            step.fit(self._through(earlier, batch.to(device)) for batch in batches)
        self._ready = True

    @staticmethod
    def _through(steps: Iterable[nn.Module], x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, T, F] -> [B, T', F']."""
        if not torch.jit.is_tracing() and tuple(x.shape[1:]) != self.input_shape:
            raise KestrelError(
                f"the model takes features of {self.input_shape[0]} frames x {self.input_shape[1]}, these have "
                f"{' x '.join(str(size) for size in x.shape[1:])}: choose the front end that it was trained with"
            )
        if not self._ready:
            raise KestrelError("feature.post has no training statistics yet: they come with a checkpoint or from fit")
        return self._through(self.steps, x)
