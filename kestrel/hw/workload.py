"""The work of one decision of a block LSTM, as a hardware model counts it."""

from __future__ import annotations

from dataclasses import dataclass

from kestrel.errors import UsageError

MIN_BITS, MAX_BITS = 2, 16


@dataclass(frozen=True)
class LSTMWork:
    """Sizes of `blocks` equal LSTM blocks with a read-out each.

    Attributes:
        inputs, hidden, steps: values of a frame, units of a block, frames of a clip.
        outputs: scores of the read-out of one block.
        sums: additions that join the scores of blocks, per decision.
        dac_bits, adc_bits, digital_bits: bits of crossbar inputs, of crossbar outputs, of element-wise digital values.
        bias_rows: rows that hold the bias of one product.
        passes: products of a crossbar per input; more than 1 where inputs come in slices of bits.

    Raises UsageError for values out of bounds.
    """

    inputs: int
    hidden: int
    steps: int
    blocks: int
    outputs: int
    dac_bits: int
    adc_bits: int
    digital_bits: int
    sums: int = 0
    bias_rows: int = 0
    passes: int = 1

    def __post_init__(self) -> None:
        for name in ("inputs", "hidden", "steps", "blocks", "outputs", "passes"):
            self._check(name, 1)
        for name in ("sums", "bias_rows"):
            self._check(name, 0)
        for name in ("dac_bits", "adc_bits", "digital_bits"):
            self._check(name, MIN_BITS, MAX_BITS)

    def _check(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            bounds = f"{low}..{high}" if high is not None else f">= {low}"
            raise UsageError(f"hardware model: {name} = {value} is out of bounds (whole number, {bounds})")

    @property
    def step_macs(self) -> int:
        """Multiply-adds of one block in one time step."""
        return 4 * self.hidden * (self.inputs + self.hidden)

    @property
    def readout_macs(self) -> int:
        """Multiply-adds of the read-out of one block."""
        return self.hidden * self.outputs
