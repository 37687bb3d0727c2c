"""Which hardware model belongs to which network.

A further kind of network registers a function here that returns its Figures, or raises NoFigures with the reason.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path

from torch import nn

from kestrel.hw import accelerator, cim
from kestrel.hw.result import Figures
from kestrel.hw.spec import FOLDER, ISCAS21_CIM, load_cim
from kestrel.hw.workload import MAX_BITS, MIN_BITS, LSTMWork
from kestrel.models.block_lstm import BLOCKS, BlockLSTM


class NoFigures(Exception):
    """A setting that the hardware model does not know; its text is the reason."""


def hardware(net: nn.Module, frames: int, folder: Path = FOLDER) -> tuple[Figures | None, str]:
    """Figures of `net` for clips of `frames` frames, or None and the reason why there are none.

    Raises UsageError where a file of constants in `folder` is missing or wrong.
    """
    try:
        return _figures(net, frames, folder), ""
    except NoFigures as reason:
        return None, str(reason)


@singledispatch
def _figures(net: nn.Module, frames: int, folder: Path) -> Figures:
    raise NoFigures(f"there is no hardware model of {type(net).__name__}")


def lstm_work(net: BlockLSTM, frames: int) -> LSTMWork:
    """The work of one decision of `net`. Raises NoFigures where a converter or the digital part has no bits."""
    if net.bits.slices:
        raise NoFigures("model.input_coding is bit_serial, whose repeated conversions this model does not count")
    bits = {
        "quant_inp": (net.bits.inp, "a DAC"),
        "quant_actMVM": (net.bits.mvm, "an ADC"),
        "quant_actNM": (net.bits.nm, "digital arithmetic"),
    }
    for name, (value, part) in bits.items():
        if not value:
            raise NoFigures(
                f"model.{name} is null (analog), and {part} without bits has no energy; give it {MIN_BITS}..{MAX_BITS}"
            )
        if not MIN_BITS <= value <= MAX_BITS:
            raise NoFigures(f"model.{name} = {value} is out of the energy model's bounds ({MIN_BITS}..{MAX_BITS})")
    joined = 0 if net.method == BLOCKS else (net.blocks - net.groups) * net.outputs
    return LSTMWork(
        inputs=net.input_size,
        hidden=net.hidden,
        steps=frames,
        blocks=net.blocks,
        outputs=net.outputs,
        sums=joined,
        dac_bits=bits["quant_inp"][0] or 0,
        adc_bits=bits["quant_actMVM"][0] or 0,
        digital_bits=bits["quant_actNM"][0] or 0,
        bias_rows=round(net.device.rows_bias),
    )


@_figures.register
def _(net: BlockLSTM, frames: int, folder: Path) -> Figures:
    spec = load_cim(folder / ISCAS21_CIM.name)
    work = lstm_work(net, frames)
    blocks = "1 block" if work.blocks == 1 else f"{work.blocks} blocks"
    return Figures(
        model=ISCAS21_CIM.stem,
        setup=f"ReRAM crossbars: {blocks} of {work.hidden} units, {work.inputs} inputs, {work.steps} steps, DAC "
        f"{work.dac_bits}, ADC {work.adc_bits}, digital values {work.digital_bits} bits",
        energy=cim.energy(work, spec),
        digital=accelerator.energy(work, spec),
        area=cim.area(work, spec),
        latency=cim.latency(work, spec),
        notes=(
            "Front end, feature post-processing and memory outside the chip are not counted.",
            f"The digital accelerator computes the same network at {work.digital_bits} bits throughout.",
        ),
    )
