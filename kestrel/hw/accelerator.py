"""Energy of the same LSTM on a digital accelerator: the comparison of the ISCAS 2021 paper.

A multiply-add takes its arithmetic, three scratchpads and a global buffer; the buffer also costs a share per unit and
step. Arithmetic grows with the square of the bits, memories keep the width of their words.
"""

from __future__ import annotations

from kestrel.hw.result import Component, Energy
from kestrel.hw.spec import CimSpec
from kestrel.hw.workload import LSTMWork


def energy(work: LSTMWork, spec: CimSpec) -> Energy:
    """Energy of one decision at `work.digital_bits` bits for inputs, weights and values; converters play no part."""
    rules = spec.accelerator
    mac = rules.mac_pj * (work.digital_bits / rules.bits) ** 2
    per_mac = (
        ("MAC", mac),
        ("partial sums", rules.psum_spad_pj),
        ("weights", rules.weight_spad_pj),
        ("inputs", rules.input_spad_pj),
        ("global buffer", rules.buffer_pj),
    )
    extra = {"global buffer": rules.buffer_unit_pj}
    table = [
        (name, pj * work.step_macs + extra.get(name, 0.0) * work.hidden,
         pj * work.readout_macs + extra.get(name, 0.0) * work.outputs)
        for name, pj in per_mac
    ]  # fmt: skip
    table.append(("sigmoid", rules.sigmoid_pj * work.hidden, 0.0))
    return Energy(
        tuple(
            Component(name, work.blocks * (work.steps * step + readout) * 1e-6, step, readout)
            for name, step, readout in table
        )
    )
