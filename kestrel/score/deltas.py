"""What a delta network saves on the clips of a split: temporal and weight sparsity, multiply-adds, cycles."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kestrel.hw.delta_markdown import section as cycles_section
from kestrel.hw.delta_network import trace_meter
from kestrel.hw.delta_trace import TraceFigures
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.network import Network
from kestrel.nn.cbtd import weight_sparsity
from kestrel.nn.delta import collecting
from kestrel.nn.delta_trace import DeltaStatistics, DeltaTrace, Sparsity
from kestrel.store.markdown import percent, table

if TYPE_CHECKING:
    from kestrel.store.hdf5 import FeatureFile

CLIPS_FILE, SHARES_PICTURE, TRACE_PICTURE = "sparsity.csv", "sparsity.png", "deltas.png"
_DIGITS = 6
_KINDS = ("inputs", "states", "pooled")
_PERCENTILES = (("least", 0), ("5th percentile", 5), ("median", 50), ("95th percentile", 95), ("most", 100))


@dataclass(frozen=True)
class MacsPerFrame:
    """Multiply-adds of a frame: dense, with zero deltas skipped, and with pruned weights skipped as well."""

    dense: float
    temporal: float
    both: float


@dataclass(frozen=True)
class DeltaStudy:
    """`clips` [clips, 3]: shares of zero deltas of inputs, states and both, by clip; `shown`: the clip of the picture."""

    whole: Sparsity
    layers: dict[str, Sparsity]
    clips: np.ndarray
    by_layer: dict[str, np.ndarray]  # of each layer, [clips, 3]
    frames: list[int]
    cycles: list[float] | None  # of a frame, by clip
    weights: dict[str, float]  # zeros of each matrix, and of all together
    macs: dict[str, MacsPerFrame]  # by layer, and of the network
    shown: int
    trace: list[DeltaTrace]
    figures: TraceFigures | None
    obstacle: str

    def record(self) -> dict[str, Any]:
        """Entries of result.json."""
        macs = self.macs["all"]
        return {
            "temporal_sparsity": round(self.whole.pooled, _DIGITS),
            "weight_sparsity": round(self.weights["all"], _DIGITS),
            "sparsity": {
                **_shares(self.whole),
                "layers": {name: _shares(found) for name, found in self.layers.items()},
                "clips": {
                    kind: {name: round(float(np.percentile(column, place)), _DIGITS) for name, place in _PERCENTILES}
                    for kind, column in zip(_KINDS, self.clips.T, strict=True)
                },
                "weights": {name: round(value, _DIGITS) for name, value in self.weights.items()},
            },
            "effective_macs_per_frame": {name: round(value, 1) for name, value in vars(macs).items()},
            **(
                {"accelerator_obstacle": self.obstacle}
                if self.figures is None
                else {"accelerator": self.figures.record()}
            ),
        }


def _shares(found: Sparsity) -> dict[str, float]:
    values = (found.x, found.h, found.pooled)
    return {kind: round(value, _DIGITS) for kind, value in zip(_KINDS, values, strict=True)}


@contextlib.contextmanager
def recorded(net: Network) -> Iterator[DeltaStatistics | None]:
    """Inside, a delta network records what it transmits; None for other networks."""
    if not isinstance(net, DeltaNetwork):
        yield None
        return
    with collecting(net.rnn, traces=True) as statistics:
        yield statistics


def study(net: DeltaNetwork, statistics: DeltaStatistics, machine: str) -> DeltaStudy:
    """The figures of `statistics`, recorded on all clips of a split. Raises UsageError where the machine is unknown."""
    meter, obstacle = trace_meter(net, machine)
    layers = statistics.layers
    active = {name: np.zeros(counts.inputs + counts.hidden, np.int64) for name, counts in layers.items()}
    cycles: list[float] = []
    for clip in statistics.traces():
        for trace in clip:
            active[trace.layer] += trace.active.sum(0, dtype=np.int64)
        if meter is not None:
            cycles.append(float(meter.add([trace.active for trace in clip]).cycles.mean()))
    clips = range(statistics.clips)
    groups = {group.name: group.tensor for group in net.weight_groups()}
    whole = statistics.sparsity()
    by_clip = np.array([_row(statistics.sparsity(clip)) for clip in clips])
    return DeltaStudy(
        whole=whole,
        layers={name: counts.sparsity() for name, counts in layers.items()},
        clips=by_clip,
        by_layer={name: np.array([_row(counts.sparsity(clip)) for clip in clips]) for name, counts in layers.items()},
        frames=next(iter(layers.values())).frames,
        cycles=cycles if meter is not None else None,
        weights=weight_sparsity(groups),
        macs=_macs(net, groups, active, sum(next(iter(layers.values())).frames)),
        shown=int(np.argmin(np.abs(by_clip[:, 2] - np.median(by_clip[:, 2])))),
        trace=statistics.trace(int(np.argmin(np.abs(by_clip[:, 2] - np.median(by_clip[:, 2]))))),
        figures=meter.figures() if meter is not None else None,
        obstacle=obstacle,
    )


def _row(found: Sparsity) -> tuple[float, float, float]:
    return found.x, found.h, found.pooled


def _macs(
    net: DeltaNetwork, groups: dict[str, Any], active: dict[str, np.ndarray], frames: int
) -> dict[str, MacsPerFrame]:
    """By layer and in all. Layers behind the delta layers are dense in time."""
    found = {}
    for index, (name, columns) in enumerate(active.items()):
        kept = np.concatenate(
            [(groups[f"rnn.weight_{part}_l{index}"] != 0).sum(0).cpu().numpy() for part in ("ih", "hh")]
        )  # [I + H]
        rows = len(groups[f"rnn.weight_ih_l{index}"])
        found[name] = MacsPerFrame(
            rows * len(columns), rows * float(columns.sum()) / frames, float((columns * kept).sum()) / frames
        )
    for name in ("fc_extra", "cl"):
        if f"{name}.weight" in groups:
            weight = groups[f"{name}.weight"]
            found[name] = MacsPerFrame(weight.numel(), weight.numel(), int((weight != 0).sum()))
    totals = (sum(getattr(row, field) for row in found.values()) for field in ("dense", "temporal", "both"))
    return found | {"all": MacsPerFrame(*totals)}


def write_clips(found: DeltaStudy, data: FeatureFile, path: Path) -> None:
    """One row per clip: shares of zero deltas over all layers and of each, and cycles of a frame."""
    header = ["utt_id", "position", "frames", *_KINDS]
    header += [f"{name} {kind}" for name in found.by_layer for kind in _KINDS]
    header += [] if found.cycles is None else ["cycles_per_frame"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row, utt_id in enumerate(data.utt_ids):
            shares = [*found.clips[row], *(share for layer in found.by_layer.values() for share in layer[row])]
            cycles = [] if found.cycles is None else [f"{found.cycles[row]:.2f}"]
            writer.writerow([utt_id, row, found.frames[row], *(f"{share:.6f}" for share in shares), *cycles])


def section(found: DeltaStudy, utt_ids: Sequence[str]) -> str:
    """The report's sections on sparsity and cycles."""
    rows = [("all", *(percent(value) for value in _row(found.whole)))] if len(found.layers) > 1 else []
    rows += [(name, *(percent(value) for value in _row(each))) for name, each in found.layers.items()]
    spread = [
        (name, *(percent(float(np.percentile(column, place))) for column in found.clips.T))
        for name, place in _PERCENTILES
    ]
    macs = [
        (
            name,
            *(_count(value) for value in (row.dense, row.temporal, row.both)),
            f"{row.dense / max(row.both, 1e-9):.3g}",
        )
        for name, row in found.macs.items()
    ]
    weights = [(name, percent(value, 2)) for name, value in found.weights.items()]
    lines = [
        "## Sparsity",
        "",
        f"Shares of deltas that are 0, of {sum(found.frames):,} frames of {len(found.frames):,} clips:",
        "",
        table(("layer", *_KINDS), rows),
        "",
        f"Over clips ({CLIPS_FILE} has each):",
        "",
        table(("clips", *_KINDS), spread),
        "",
        f"![sparsity of clips]({SHARES_PICTURE})",
        "",
        f"![deltas of a clip]({TRACE_PICTURE})",
        "",
        f"The clip shown, {utt_ids[found.shown]!r}, has the median share of zeros.",
        "",
        "Weights that are 0 (biases are not counted):",
        "",
        table(("matrix", "zeros"), weights),
        "",
        "Multiply-adds of a frame on average:",
        "",
        table(("layer", "dense", "without zero deltas", "and without zero weights", "reduction"), macs),
        "",
        cycles_section(found.figures, found.obstacle),
    ]
    return "\n".join(lines)


def _count(value: float) -> str:
    return f"{value:,.0f}"
