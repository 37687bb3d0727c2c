"""Energy, area and latency of LSTM blocks on ReRAM crossbars (Schaefer et al., ISCAS 2021).

A block with I inputs and H units keeps the weights of each gate in arrays of its own. In every time step all arrays work
once, and the results meet digitally; the read-out works once, after the last step. With b bits where a term has bits,
and A arrays of R rows and C columns (equations and calibration: docs/hardware.md), a step of one block costs

    cells     cell_pj * 4 H (I + H)
    DAC       A R dac_pj b floor(b / 2)
    ADC       A C (adc_offset_pj + adc_level_pj 2^b)
    multiply  4 (4 H + I) multiply_pj (b / 8)^2
    add       H add_pj b / 8
    sigmoid   H sigmoid_pj
"""

from __future__ import annotations

import math

from kestrel.hw.result import Area, Component, Energy, Latency
from kestrel.hw.spec import CimSpec
from kestrel.hw.workload import LSTMWork

GATES = 4


def _bias_rows(work: LSTMWork, spec: CimSpec) -> int:
    return work.bias_rows if spec.crossbar.count_bias_rows else 0


def step_cells(work: LSTMWork, spec: CimSpec) -> int:
    """Cells of one block that hold weights of its LSTM."""
    return GATES * work.hidden * (work.inputs + work.hidden + 2 * _bias_rows(work, spec))


def readout_cells(work: LSTMWork, spec: CimSpec) -> int:
    """Cells of one block that hold weights of its read-out."""
    return (work.hidden + _bias_rows(work, spec)) * work.outputs


def step_arrays(work: LSTMWork, spec: CimSpec) -> int:
    """Arrays of one block for its LSTM: inputs and h of each gate are kept apart."""
    size = spec.crossbar.rows * spec.crossbar.columns
    rows = (work.inputs + _bias_rows(work, spec), work.hidden + _bias_rows(work, spec))
    return GATES * sum(math.ceil(count * work.hidden / size) for count in rows)


def readout_arrays(work: LSTMWork, spec: CimSpec) -> int:
    """Arrays of one block for its read-out."""
    return math.ceil(readout_cells(work, spec) / (spec.crossbar.rows * spec.crossbar.columns))


def dac_pj(bits: int, spec: CimSpec) -> float:
    """Energy of driving all rows of an array once with `bits`-bit inputs."""
    return spec.crossbar.rows * spec.crossbar.dac_pj * bits * (bits // 2)


def adc_pj(bits: int, spec: CimSpec) -> float:
    """Energy of converting all columns of an array once to `bits` bits."""
    return spec.crossbar.columns * (spec.crossbar.adc_offset_pj + spec.crossbar.adc_level_pj * 2**bits)


def energy(work: LSTMWork, spec: CimSpec) -> Energy:
    """Energy of one decision: blocks * (steps * step + read-out) + summation of scores."""
    cells, dac, adc = (
        spec.crossbar.cell_pj * work.passes,
        dac_pj(work.dac_bits, spec) * work.passes,
        adc_pj(work.adc_bits, spec) * work.passes,
    )
    width = work.digital_bits / spec.digital.bits
    multiply = spec.digital.multiply_pj * width**2
    step, readout = step_arrays(work, spec), readout_arrays(work, spec)
    table = (
        ("cells", cells * step_cells(work, spec), cells * readout_cells(work, spec)),
        ("DAC", dac * step, dac * readout),
        ("ADC", adc * step, adc * readout),
        ("multiply", multiply * GATES * (GATES * work.hidden + work.inputs), multiply * work.hidden),
        ("add", spec.digital.add_pj * width * work.hidden, 0.0),
        ("sigmoid", spec.digital.sigmoid_pj * work.hidden, 0.0),
    )
    parts = [
        Component(name, work.blocks * (work.steps * step_pj + readout_pj) * 1e-6, step_pj, readout_pj)
        for name, step_pj, readout_pj in table
    ]
    parts.append(Component("summation", work.sums * spec.digital.sum_pj * width**2 * 1e-6))
    return Energy(tuple(parts))


def area(work: LSTMWork, spec: CimSpec) -> Area:
    """Estimate: the published area grows with the number of arrays, whatever the bits of their converters."""
    arrays = work.blocks * (step_arrays(work, spec) + readout_arrays(work, spec))
    return Area(spec.estimate.area_mm2 * arrays / spec.estimate.area_arrays, arrays)


def latency(work: LSTMWork, spec: CimSpec) -> Latency:
    """Estimate: arrays and blocks work at the same time, the columns of an array in turn; a score takes a cycle."""
    columns = min(work.hidden, spec.crossbar.columns)
    step = math.ceil(columns / spec.estimate.columns_per_cycle)
    cycles = work.passes * (work.steps * step + min(work.outputs, spec.crossbar.columns))
    clock = spec.estimate.clock_hz
    return Latency(cycles, None if clock is None else cycles / clock)
