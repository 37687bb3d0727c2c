"""Constants of accelerators for delta networks: typed settings, read from a file of conf/hw."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kestrel.errors import UsageError, unknown
from kestrel.hw.spec import FOLDER, constant, load_constants

MACHINES = ("deltarnn", "edgedrnn", "spartus", "edge_spartus")


@dataclass
class ComputeSpec:
    """Arrays of processing elements (PEs), each of which makes one multiply-add in a cycle."""

    arrays: int = constant("arrays; column j of [x, h] belongs to array j mod arrays", min=1, max=65536)
    pes: int = constant("PEs of an array; they share the rows of a column", min=1, max=65536)
    clock_hz: int = constant("clock cycles in a second", min=1, max=10**12)
    skips_zero_weights: bool = constant("false: weights that are zero take a cycle as well")


@dataclass
class NumbersSpec:
    """Widths of numbers."""

    weight_bits: int = constant("bits of a weight", min=1, max=64)
    index_bits: int | None = constant(
        "bits of the row that is stored with a weight of a sparse column; null = ceil(log2 of the rows of a PE)", max=64
    )
    activation_bits: int = constant("bits of an input or a state", min=1, max=64)


@dataclass
class ActivationSpec:
    """The non-linearities and element-wise products, which follow the matrix product of a step; in clock cycles."""

    latency: int = constant("cycles until the first results are there", max=10**6)
    interval: int = constant("cycles from one group of units to the next", max=10**6)
    units: int = constant("hidden units in a group", min=1, max=65536)


@dataclass
class MemorySpec:
    """Where weights come from."""

    weights: Literal["on-chip", "dram"] = constant("on-chip or dram")
    bytes_per_second: int | None = constant(
        "bandwidth that all arrays share; null = one weight per PE and cycle", min=1
    )
    request_cycles: int = constant("cycles lost with each column that is fetched", max=10**6)
    capacity_bytes: int | None = constant("weights and indices that fit; null = no limit", min=1)


@dataclass
class DeltaSpec:
    """An accelerator that skips columns whose delta is zero (the files of conf/hw say where each constant comes from).

    `assumed` names the constants that nobody published: they are printed with every figure.
    """

    compute: ComputeSpec
    numbers: NumbersSpec
    activation: ActivationSpec
    memory: MemorySpec
    power_w: float | None = constant("power at work, watts; null = not known")
    assumed: list[str] = constant("constants of this file that were not published")
    name: str = dataclasses.field(default="", init=False)  # the file's, set on loading

    @property
    def peak_ops(self) -> float:
        """Operations per second with all PEs busy; a multiply-add counts as two."""
        return 2.0 * self.compute.arrays * self.compute.pes * self.compute.clock_hz

    def index_bits(self, rows: int) -> int:
        """Bits of the index that is stored with a weight of a sparse column, where a PE has `rows` rows of it."""
        fixed = self.numbers.index_bits
        return max(rows - 1, 0).bit_length() if fixed is None else fixed


def load_machine(name: str, folder: Path = FOLDER) -> DeltaSpec:
    """The constants of machine `name` (one of MACHINES), or of a file `name`.yaml of one's own in `folder`.

    Raises UsageError with the file, the key and its bounds where a constant is missing or wrong.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file() and name not in MACHINES:
        raise unknown("accelerator", name, MACHINES)
    machine = load_constants(DeltaSpec, path)
    machine.name = name
    keys = _keys(machine)
    for key in machine.assumed:
        if key not in keys:
            error = unknown("key in assumed", key, keys)
            raise UsageError(f"{path.name}: {error}")
    if machine.memory.weights == "dram" and machine.memory.bytes_per_second is None:
        raise UsageError(f"{path.name}: memory.bytes_per_second is null; weights in DRAM need a bandwidth")
    if machine.power_w is not None and not (math.isfinite(machine.power_w) and machine.power_w > 0):
        raise UsageError(
            f"{path.name}: power_w: {machine.power_w} is out of bounds (> 0, or null where it is not known)"
        )
    return machine


def _keys(machine: DeltaSpec) -> list[str]:
    keys = []
    for field in dataclasses.fields(machine):
        value = getattr(machine, field.name)
        if dataclasses.is_dataclass(value):
            keys += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(value)]
        elif field.init:
            keys.append(field.name)
    return keys
