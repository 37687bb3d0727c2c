"""What delta layers transmitted: temporal sparsity by layer and clip, and traces for models of accelerators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DeltaTrace:
    """Which columns of a layer's matrices took part in each frame of one clip.

    `active` uint8 [steps, inputs + hidden] is 1 where the delta of an input (first) or of a hidden state was not 0.
    `gates` counts the gates: the matrices have gates * hidden rows.
    """

    layer: str
    inputs: int
    hidden: int
    gates: int
    active: np.ndarray


@dataclass(frozen=True)
class Sparsity:
    """Share of deltas that were 0: of the inputs, of the hidden states, and of both together (by elements)."""

    x: float
    h: float
    pooled: float


def _sparsity(zeros_x: int, all_x: int, zeros_h: int, all_h: int) -> Sparsity:
    def share(zeros: int, elements: int) -> float:
        return zeros / elements if elements else 0.0

    return Sparsity(share(zeros_x, all_x), share(zeros_h, all_h), share(zeros_x + zeros_h, all_x + all_h))


@dataclass
class LayerCounts:
    """Counts of one layer; the lists have one entry per clip, in the order in which the clips came."""

    inputs: int
    hidden: int
    gates: int
    zeros_x: list[int] = field(default_factory=list)
    zeros_h: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    packed: list[np.ndarray] = field(default_factory=list)  # bits of the trace, where traces are kept

    def sparsity(self, clip: int | None = None) -> Sparsity:
        """Of one clip, or of all."""
        picked = slice(None) if clip is None else slice(clip, clip + 1)
        frames = sum(self.frames[picked])
        zeros = sum(self.zeros_x[picked]), sum(self.zeros_h[picked])
        return _sparsity(zeros[0], frames * self.inputs, zeros[1], frames * self.hidden)


class DeltaStatistics:
    """Counts of transmitted deltas, filled by delta layers while `kestrel.nn.delta.collecting` is in force.

    Frames of padding are not counted. `traces`: keep what `trace` gives (about (I + H) / 8 bytes per frame and layer).
    """

    def __init__(self, traces: bool = False) -> None:
        self.keeps_traces = traces
        self.layers: dict[str, LayerCounts] = {}

    def add(self, layer: str, gates: int, moved: tuple[Tensor, Tensor], lengths: Tensor | None) -> None:
        """Count one batch: `moved` are bool [T, B, I] and [T, B, H]; `lengths` [B] where clips are padded."""
        moved_x, moved_h = moved
        steps, batch, inputs = moved_x.shape
        counts = self.layers.setdefault(layer, LayerCounts(inputs, moved_h.shape[2], gates))
        frames = torch.full((batch,), steps) if lengths is None else lengths.cpu()
        valid = torch.arange(steps)[:, None] < frames  # [T, B]
        for part, zeros in ((moved_x, counts.zeros_x), (moved_h, counts.zeros_h)):
            active = (part.cpu() & valid[..., None]).sum((0, 2))
            zeros += (frames * part.shape[2] - active).tolist()
        counts.frames += frames.tolist()
        if self.keeps_traces:
            both = torch.cat([moved_x, moved_h], dim=2).transpose(0, 1).cpu().numpy()  # [B, T, I + H]
            counts.packed += [
                np.packbits(clip[:length], axis=1) for clip, length in zip(both, frames.tolist(), strict=True)
            ]

    @property
    def clips(self) -> int:
        """Clips counted so far."""
        return max((len(counts.frames) for counts in self.layers.values()), default=0)

    def sparsity(self, clip: int | None = None) -> Sparsity:
        """Over all layers: of one clip, or of all."""
        parts = []
        for counts in self.layers.values():
            picked = slice(None) if clip is None else slice(clip, clip + 1)
            frames = sum(counts.frames[picked])
            zeros = sum(counts.zeros_x[picked]), sum(counts.zeros_h[picked])
            parts.append((zeros[0], frames * counts.inputs, zeros[1], frames * counts.hidden))
        columns = [sum(column) for column in zip(*parts, strict=True)] or [0, 0, 0, 0]
        return _sparsity(columns[0], columns[1], columns[2], columns[3])

    def trace(self, clip: int) -> list[DeltaTrace]:
        """The traces of one clip, one per layer. Raises ValueError where traces were not kept."""
        if not self.keeps_traces:
            raise ValueError("traces were not kept: collect with traces=True")
        made = []
        for name, counts in self.layers.items():
            width = counts.inputs + counts.hidden
            active = np.unpackbits(counts.packed[clip], axis=1, count=width)
            made.append(DeltaTrace(name, counts.inputs, counts.hidden, counts.gates, active))
        return made

    def traces(self) -> Iterator[list[DeltaTrace]]:
        """The traces of all clips, clip by clip."""
        return (self.trace(clip) for clip in range(self.clips))
