"""Constants of a hardware model: typed settings, read from a file of conf/hw."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kestrel.errors import UsageError
from kestrel.settings import build, load_yaml, setting

T = TypeVar("T")

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "hw"
ISCAS21_CIM = FOLDER / "iscas21_cim.yaml"


def constant(help: str, *, min: float = 0, max: float | None = None) -> Any:
    """A setting that the file has to give."""
    return setting(MISSING, help, min=min, max=max)


@dataclass
class CrossbarSpec:
    """Arrays of ReRAM cells with their converters; energies in pJ."""

    rows: int = constant("rows of an array", min=1, max=65536)
    columns: int = constant("columns of an array", min=1, max=65536)
    count_bias_rows: bool = constant("rows that hold biases take cells and arrays as well")
    cell_pj: float = constant("a cell in one product")
    dac_pj: float = constant("conversion of a row: this times b * floor(b / 2) at b bits")
    adc_offset_pj: float = constant("conversion of a column: offset + level * 2^b at b bits")
    adc_level_pj: float = constant("see adc_offset_pj")


@dataclass
class DigitalSpec:
    """Element-wise digital operations beside the crossbars; energies in pJ at `bits`."""

    bits: int = constant("bits at which the energies hold", min=1, max=64)
    multiply_pj: float = constant("a product; grows with the square of the bits")
    add_pj: float = constant("a sum; grows with the bits")
    sigmoid_pj: float = constant("the non-linearities of a unit; the same at any bits")
    sum_pj: float = constant("adding one score of a further block; grows with the square of the bits")


@dataclass
class AcceleratorSpec:
    """A digital accelerator for the same network; energies in pJ, of a multiply-add where nothing else is said."""

    bits: int = constant("bits at which mac_pj holds", min=1, max=64)
    mac_pj: float = constant("the arithmetic; grows with the square of the bits")
    sigmoid_pj: float = constant("the non-linearities of a unit")
    psum_spad_pj: float = constant("scratchpad of partial sums")
    weight_spad_pj: float = constant("scratchpad of weights")
    input_spad_pj: float = constant("scratchpad of inputs")
    buffer_pj: float = constant("global buffer")
    buffer_unit_pj: float = constant("global buffer, in addition for every unit and step")


@dataclass
class EstimateSpec:
    """The single published point of area and cycles, from which estimates are scaled."""

    area_mm2: float = constant("area at the published point, square millimetres")
    area_arrays: int = constant("arrays at the published point", min=1)
    columns_per_cycle: int = constant("columns of an array that are converted in one clock cycle", min=1, max=65536)
    clock_hz: float | None = constant("clock frequency; null = not known", min=1)


@dataclass
class CimSpec:
    """An LSTM on ReRAM crossbars (`conf/hw/iscas21_cim.yaml` says where each constant comes from)."""

    crossbar: CrossbarSpec
    digital: DigitalSpec
    accelerator: AcceleratorSpec
    estimate: EstimateSpec


def load_cim(path: Path = ISCAS21_CIM) -> CimSpec:
    """The constants of `path`. Raises as `load_constants`."""
    return load_constants(CimSpec, path)


def load_constants(kind: type[T], path: Path) -> T:
    """Read constants of a `kind`. Raises UsageError with the file, the key and its bounds where one is missing or wrong."""
    content = load_yaml(path)
    try:
        _check_complete(kind, content, "")
        return build(kind, content)
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from None


def _check_complete(kind: type, content: Any, where: str) -> None:
    """Every setting has to be given: a hardware model has no constants of its own."""
    if not isinstance(content, dict):
        return  # `build` says what is wrong
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.name not in content:
            raise UsageError(f"{where}{field.name} is missing ({field.metadata.get('help', 'a group of constants')})")
        if dataclasses.is_dataclass(hints[field.name]):
            _check_complete(typing.cast(type, hints[field.name]), content[field.name], f"{where}{field.name}.")
