"""Clock cycles of a delta network on an accelerator that skips zero deltas and, where it can, zero weights.

Column j of [W_x, W_h] lies in array j mod N. A step of a layer multiplies the columns whose delta is not zero: each takes
K beats, in which all PEs of its array work. The arrays start together and the one with the most columns ends last; where
weights come from a shared memory, the product lasts at least as long as their transfer. The non-linearities follow.
Layers work one after the other.

    product    = max(K max_n w_n, ceil(sum_n w_n column_bits / bits per cycle) + sum_n w_n request_cycles)
    activation = latency + interval ceil(H / units)

w_n: active columns of array n (Gao et al., Spartus, IEEE TNNLS 2022, and the array statistics of the authors' code,
github.com/gaochangw/DeltaRNN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from kestrel.errors import UsageError
from kestrel.hw.delta_spec import DeltaSpec

GRU_GATES, LSTM_GATES = 3, 4


@dataclass(frozen=True)
class DeltaLayer:
    """A layer of a delta network.

    Attributes:
        inputs, hidden: values of its input and of its state.
        gates: 3 (GRU) or 4 (LSTM).
        nonzeros: K, the non-zero weights of a column that each PE has (column-balanced pruning), or None: all weights.
        pes: PEs among which the pruning shared the rows of a column; None: those of the machine.

    Raises UsageError for values out of bounds.
    """

    inputs: int
    hidden: int
    gates: int
    nonzeros: int | None = None
    pes: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("inputs", 1), ("hidden", 1), ("nonzeros", 0), ("pes", 1)):
            value = getattr(self, name)
            if value is None and name in ("nonzeros", "pes"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UsageError(f"hardware model: {name} = {value} is out of bounds (whole number, >= {low})")
        if self.gates not in (GRU_GATES, LSTM_GATES):
            raise UsageError(f"hardware model: gates = {self.gates} is out of bounds (3 for a GRU, 4 for an LSTM)")
        if self.nonzeros is not None and self.pes is not None and self.nonzeros > -(-self.rows // self.pes):
            raise UsageError(
                f"hardware model: nonzeros = {self.nonzeros} is out of bounds (0..{-(-self.rows // self.pes)}: "
                f"{self.rows} rows on {self.pes} PEs)"
            )

    @property
    def columns(self) -> int:
        """Columns of [W_x, W_h]: one for each input and each unit."""
        return self.inputs + self.hidden

    @property
    def rows(self) -> int:
        """Rows of [W_x, W_h]."""
        return self.gates * self.hidden

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of a step without any sparsity."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Placement:
    """How a layer lies on a machine.

    Attributes:
        beats: cycles of an active column.
        column_macs: multiply-adds of an active column, rows that only fill up the PEs left out.
        column_bits: bits that are read for an active column.
        activation: cycles of the non-linearities of a step.
    """

    beats: int
    column_macs: int
    column_bits: int
    activation: int


def place(layer: DeltaLayer, machine: DeltaSpec) -> Placement:
    """Place `layer` on `machine`.

    A PE of the machine has ceil(rows / PEs) rows of a column. Weights pruned for P PEs run as they are on P PEs or on a
    divisor of P; then a PE does the work of several. Elsewhere the balance is lost: UsageError.
    """
    pes = machine.compute.pes
    local = -(-layer.rows // pes)
    cycles = machine.activation
    activation = cycles.latency + cycles.interval * -(-layer.hidden // cycles.units)
    bits = machine.numbers.weight_bits
    if layer.nonzeros is None or not machine.compute.skips_zero_weights:
        return Placement(local, layer.rows, local * pes * bits, activation)
    pruned = layer.pes or pes
    if pruned % pes:
        raise UsageError(
            f"hardware model: weights were balanced for {pruned} PEs, and {machine.name or 'the machine'} has {pes}; "
            f"prune for a multiple of {pes}"
        )
    beats = layer.nonzeros * (pruned // pes)
    if beats > local:
        raise UsageError(
            f"hardware model: nonzeros = {layer.nonzeros} is out of bounds ({layer.rows} rows on {pruned} PEs)"
        )
    stored = beats * pes
    return Placement(beats, min(stored, layer.rows), stored * (bits + machine.index_bits(local)), activation)


def dense(layer: DeltaLayer) -> DeltaLayer:
    """The same layer without zero weights."""
    return DeltaLayer(layer.inputs, layer.hidden, layer.gates)


@dataclass(frozen=True)
class StepCycles:
    """Steps of a layer, or of a network: one value per step in each array [T].

    Attributes:
        cycles: int64, all cycles.
        even: float64, cycles of the product if all arrays had the same load.
        imbalance: float64, further cycles until the array with the most columns is done.
        memory: int64, further cycles until all weights are there.
        activation: int64, cycles of the non-linearities.
        work: int64, multiply-adds that PEs make.
        weight_bits: int64, bits of weights and indices that are read.
        active_inputs, active_hidden: int64, active columns of W_x and W_h.
        mean_load, worst_load: float64 and int64, active columns of an array on average, and of the one that has most.
    """

    cycles: np.ndarray
    even: np.ndarray
    imbalance: np.ndarray
    memory: np.ndarray
    activation: np.ndarray
    work: np.ndarray
    weight_bits: np.ndarray
    active_inputs: np.ndarray
    active_hidden: np.ndarray
    mean_load: np.ndarray
    worst_load: np.ndarray

    def __add__(self, other: StepCycles) -> StepCycles:
        """Both layers in each step, one after the other."""
        return StepCycles(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def check_trace(layer: DeltaLayer, active: np.ndarray) -> np.ndarray:
    """`active` as bool [T, inputs + hidden]. Raises UsageError where it does not fit the layer."""
    active = np.asarray(active)
    if active.ndim != 2 or active.shape[1] != layer.columns or not len(active):
        raise UsageError(
            f"hardware model: a trace of shape {list(active.shape)} does not fit a layer of {layer.inputs} inputs and "
            f"{layer.hidden} units; expected [steps, {layer.columns}] with at least 1 step"
        )
    if active.dtype.kind not in "bui":
        raise UsageError(f"hardware model: a trace of type {active.dtype}; expected uint8 or bool")
    return active if active.dtype == np.bool_ else active != 0


def loads(active: np.ndarray, arrays: int) -> np.ndarray:
    """Active columns of each array: bool [T, C] -> int64 [T, arrays]; column j belongs to array j mod arrays."""
    steps, columns = active.shape
    turns = -(-columns // arrays)
    padded = np.zeros((steps, turns * arrays), dtype=bool)
    padded[:, :columns] = active
    return padded.reshape(steps, turns, arrays).sum(axis=1, dtype=np.int64)


def layer_cycles(layer: DeltaLayer, active: np.ndarray, machine: DeltaSpec) -> StepCycles:
    """Cycles of each step of a layer.

    Args:
        active: uint8 or bool [T, inputs + hidden]; not 0 where the delta of an input or a state is transmitted.

    Raises UsageError where the trace does not fit the layer, or the layer not the machine.
    """
    placed = place(layer, machine)
    active = check_trace(layer, active)
    load = loads(active, machine.compute.arrays)  # [T, N]
    inputs = np.count_nonzero(active[:, : layer.inputs], axis=1).astype(np.int64)
    columns = load.sum(axis=1)
    worst = load.max(axis=1)
    mean = columns / machine.compute.arrays
    product = worst * placed.beats
    transfer = _transfer_cycles(columns, placed.column_bits, machine)
    memory = np.maximum(transfer - product, 0)
    activation = np.full(len(active), placed.activation, dtype=np.int64)
    even = mean * placed.beats
    return StepCycles(
        cycles=product + memory + activation,
        even=even,
        imbalance=product - even,
        memory=memory,
        activation=activation,
        work=columns * placed.column_macs,
        weight_bits=columns * placed.column_bits,
        active_inputs=inputs,
        active_hidden=columns - inputs,
        mean_load=mean,
        worst_load=worst,
    )


def _transfer_cycles(columns: np.ndarray, column_bits: int, machine: DeltaSpec) -> np.ndarray:
    """Cycles in which the shared memory delivers `columns` columns, in whole numbers throughout."""
    requests = columns * machine.memory.request_cycles
    if machine.memory.bytes_per_second is None:
        return requests
    above, below = column_bits * machine.compute.clock_hz, 8 * machine.memory.bytes_per_second
    common = math.gcd(above, below)
    exact = -(-columns.astype(object) * (above // common) // (below // common))  # bits times clock may exceed 64 bits
    return exact.astype(np.int64) + requests


def network_cycles(layers: tuple[DeltaLayer, ...], clip: list[np.ndarray], machine: DeltaSpec) -> list[StepCycles]:
    """Cycles of each layer for the traces of a clip, one array [T, inputs + hidden] for each layer.

    Raises UsageError where the traces do not fit the layers.
    """
    if len(clip) != len(layers):
        raise UsageError(f"hardware model: traces of {len(clip)} layers for a network of {len(layers)}")
    steps = {len(trace) for trace in clip}
    if len(steps) > 1:
        raise UsageError(f"hardware model: the layers of a clip have {sorted(steps)} steps; expected the same number")
    return [layer_cycles(layer, trace, machine) for layer, trace in zip(layers, clip, strict=True)]


def dense_cycles(layers: tuple[DeltaLayer, ...], machine: DeltaSpec) -> int:
    """Cycles of a step of the same machine when all columns are active and no weight is left out."""
    return sum(
        int(layer_cycles(dense(layer), np.ones((1, layer.columns), dtype=bool), machine).cycles[0]) for layer in layers
    )
