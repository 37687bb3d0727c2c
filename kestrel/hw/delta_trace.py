"""Figures of a delta network on an accelerator, from the deltas that it transmits on test clips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from kestrel.errors import UsageError
from kestrel.hw.delta_cycles import DeltaLayer, StepCycles, dense_cycles, network_cycles, place
from kestrel.hw.delta_spec import DeltaSpec

PERCENTILE = 95
DIGITS = 9  # significant digits in files


@dataclass(frozen=True)
class Spread:
    """A quantity of a frame over all frames."""

    mean: float
    p95: float
    worst: float


@dataclass(frozen=True)
class LayerFigures:
    """A layer over all frames: mean cycles of a frame, shares of active columns, balance of the arrays.

    mean_load, worst_load: active columns in a frame of an array on average, and of the array that has most.
    """

    inputs: int
    hidden: int
    gates: int
    nonzeros: int | None
    cycles: float
    input_occupancy: float
    hidden_occupancy: float
    balance: float
    mean_load: float
    worst_load: float


@dataclass(frozen=True)
class TraceFigures:
    """What a trace costs on a machine; a frame is a step of all layers.

    Attributes:
        machine: name of the file of constants. assumed: its constants that were not published.
        clips, frames: what was counted.
        cycles, microseconds: of a frame.
        dense_cycles, dense_microseconds: of a frame on the same machine with all columns active and all weights kept.
        dense_ops: operations of a frame without any sparsity, two for a multiply-add.
        effective_ops: dense_ops / mean time, per second.
        peak_ops: of the machine, per second.
        occupancy: share of columns that are active, input_occupancy and hidden_occupancy apart; 1 - temporal sparsity.
        balance: sum_t mean_n w / sum_t max_n w of the columns w of array n, weighted by beats over layers; 1 where
            nothing was active.
        utilisation: multiply-adds made / (PEs * cycles).
        weight_bytes, dense_weight_bytes: weights and indices read in a frame, and without any sparsity.
        vector_bytes: inputs and states with their references, read in a frame whatever the deltas.
        stored_bytes: weights and indices of the network in the machine's memory. fits: whether they have room there.
        energy_uj: of a frame, power * time; None where the power is not known. Waiting between frames is not counted.
        breakdown: mean cycles of a frame by cause; they add up to the mean of cycles.
        layers: figures of each layer.
    """

    machine: str
    assumed: Sequence[str]
    clips: int
    frames: int
    cycles: Spread
    microseconds: Spread
    dense_cycles: int
    dense_microseconds: float
    dense_ops: int
    effective_ops: float
    peak_ops: float
    input_occupancy: float
    hidden_occupancy: float
    occupancy: float
    balance: float
    utilisation: float
    weight_bytes: float
    dense_weight_bytes: float
    vector_bytes: float
    stored_bytes: float
    fits: bool
    energy_uj: float | None
    breakdown: Mapping[str, float]
    layers: Sequence[LayerFigures]

    @property
    def speedup(self) -> float:
        """Time of the same machine without any sparsity / mean time."""
        return self.dense_cycles / self.cycles.mean

    @property
    def over_peak(self) -> float:
        """Effective operations per second / peak: the speed-up over a dense execution that wastes no cycle."""
        return self.effective_ops / self.peak_ops

    @property
    def ops_per_watt(self) -> float | None:
        """Effective operations per second and watt, which is operations per joule."""
        return None if self.energy_uj is None else self.dense_ops / (1e-6 * self.energy_uj)

    def record(self) -> dict[str, Any]:
        """All figures as plain types."""
        derived = {"speedup": self.speedup, "over_peak": self.over_peak, "ops_per_watt": self.ops_per_watt}
        return _plain({**asdict(self), **derived})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


class TraceMeter:
    """Gathers clips one after the other; memory grows by 8 bytes per frame only."""

    def __init__(self, layers: Sequence[DeltaLayer], machine: DeltaSpec) -> None:
        """Raises UsageError where a layer does not fit the machine."""
        if not layers:
            raise UsageError("hardware model: a network needs at least one layer")
        self.layers, self.machine = tuple(layers), machine
        self._placed = [place(layer, machine) for layer in self.layers]
        self._dense = dense_cycles(self.layers, machine)
        self._cycles: list[np.ndarray] = []
        self._sums = [dict[str, float]() for _ in self.layers]

    def add(self, clip: Sequence[np.ndarray]) -> StepCycles:
        """Count a clip: uint8 or bool [T, inputs + hidden] for each layer, without frames that pad it.

        Returns its steps, layers added up. Raises UsageError, with the number of the clip, where it does not fit.
        """
        try:
            steps = network_cycles(self.layers, list(clip), self.machine)
        except UsageError as error:
            raise UsageError(f"clip {len(self._cycles)}: {error}") from None
        for sums, layer in zip(self._sums, steps, strict=True):
            for name, values in vars(layer).items():
                sums[name] = sums.get(name, 0) + values.sum().item()
        whole = reduce(add, steps)
        self._cycles.append(whole.cycles)
        return whole

    def figures(self) -> TraceFigures:
        """Figures of the clips so far. Raises UsageError where there are none."""
        if not self._cycles:
            raise UsageError("hardware model: no clips to count")
        cycles = np.concatenate(self._cycles)
        frames = len(cycles)
        total = {name: sum(sums[name] for sums in self._sums) for name in self._sums[0]}
        microsecond = 1e6 / self.machine.compute.clock_hz  # of a cycle
        spread = Spread(total["cycles"] / frames, float(np.percentile(cycles, PERCENTILE)), float(cycles.max()))
        ops = 2 * sum(layer.dense_macs for layer in self.layers)
        inputs, hidden = (sum(getattr(layer, name) for layer in self.layers) for name in ("inputs", "hidden"))
        stored = self._stored_bits() / 8
        capacity, power = self.machine.memory.capacity_bytes, self.machine.power_w
        pes = self.machine.compute.arrays * self.machine.compute.pes
        causes = {"products": "even", "imbalance": "imbalance", "memory": "memory", "activation": "activation"}
        return TraceFigures(
            machine=self.machine.name,
            assumed=tuple(self.machine.assumed),
            clips=len(self._cycles),
            frames=frames,
            cycles=spread,
            microseconds=Spread(spread.mean * microsecond, spread.p95 * microsecond, spread.worst * microsecond),
            dense_cycles=self._dense,
            dense_microseconds=self._dense * microsecond,
            dense_ops=ops,
            effective_ops=_ratio(ops * 1e6, spread.mean * microsecond),
            peak_ops=self.machine.peak_ops,
            input_occupancy=total["active_inputs"] / (frames * inputs),
            hidden_occupancy=total["active_hidden"] / (frames * hidden),
            occupancy=(total["active_inputs"] + total["active_hidden"]) / (frames * (inputs + hidden)),
            balance=_balance(total["even"], total["imbalance"]),
            utilisation=_ratio(total["work"], pes * total["cycles"]),
            weight_bytes=total["weight_bits"] / 8 / frames,
            dense_weight_bytes=sum(layer.dense_macs for layer in self.layers) * self.machine.numbers.weight_bits / 8,
            vector_bytes=2 * (inputs + hidden) * self.machine.numbers.activation_bits / 8,
            stored_bytes=stored,
            fits=capacity is None or stored <= capacity,
            energy_uj=None if power is None else power * spread.mean * microsecond,
            breakdown={cause: total[name] / frames for cause, name in causes.items()},
            layers=tuple(self._layer(index, frames) for index in range(len(self.layers))),
        )

    def _stored_bits(self) -> int:
        return sum(layer.columns * placed.column_bits for layer, placed in zip(self.layers, self._placed, strict=True))

    def _layer(self, index: int, frames: int) -> LayerFigures:
        layer, sums = self.layers[index], self._sums[index]
        return LayerFigures(
            inputs=layer.inputs,
            hidden=layer.hidden,
            gates=layer.gates,
            nonzeros=layer.nonzeros,
            cycles=sums["cycles"] / frames,
            input_occupancy=sums["active_inputs"] / (frames * layer.inputs),
            hidden_occupancy=sums["active_hidden"] / (frames * layer.hidden),
            balance=_balance(sums["mean_load"], sums["worst_load"] - sums["mean_load"]),
            mean_load=sums["mean_load"] / frames,
            worst_load=sums["worst_load"] / frames,
        )


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def _balance(mean: float, more: float) -> float:
    return mean / (mean + more) if mean else 1.0


def trace_figures(
    layers: Sequence[DeltaLayer], clips: Iterable[Sequence[np.ndarray]], machine: DeltaSpec
) -> TraceFigures:
    """Figures of `clips` on `machine`; a clip is one array uint8 or bool [T, inputs + hidden] for each layer.

    Raises UsageError where a clip does not fit the layers, a layer not the machine, or there are no clips.
    """
    meter = TraceMeter(layers, machine)
    for clip in clips:
        meter.add(clip)
    return meter.figures()


def assumed_trace(
    layers: Sequence[DeltaLayer], inputs: float, hidden: float, steps: int = 2000, seed: int = 0
) -> list[np.ndarray]:
    """A trace where none was recorded: columns are active independently of each other, as likely as said.

    Real deltas come in bursts: a real trace has the same mean work but a wider spread over frames.

    Args:
        inputs, hidden: share of the columns of W_x and W_h that are active in a step, 0-1.
        steps: drawn steps. seed: the same seed gives the same trace, and one with a higher share holds those of a lower.

    Returns bool [steps, inputs + hidden] for each layer. Raises UsageError for a share out of bounds.
    """
    for name, share in (("inputs", inputs), ("hidden", hidden)):
        if not 0 <= share <= 1:
            raise UsageError(f"hardware model: occupancy of {name} = {share} is out of bounds (0..1)")
    draw = np.random.default_rng(seed)
    traces = []
    for layer in layers:
        limit = np.repeat(np.array([inputs, hidden], dtype=np.float32), [layer.inputs, layer.hidden])
        traces.append(draw.random((steps, layer.columns), dtype=np.float32) < limit)
    return traces
