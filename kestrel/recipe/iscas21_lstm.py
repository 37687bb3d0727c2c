"""LSTMs for keyword spotting with ReRAM compute-in-memory (Schaefer et al., ISCAS 2021).

N parallel LSTM blocks on simulated crossbars: few-bit inputs (DAC), few-bit outputs (ADC), 8-bit digital element-wise
values, clipped analog weights, trainable clipping ranges (PACT), training with weight noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kestrel.settings import setting

if TYPE_CHECKING:
    from kestrel.models.block_lstm import BlockLSTM

# Settings that act in validation and scoring alone: trained weights may be scored under other values (--checkpoint).
EVALUATION_ONLY = ("noise_eval",)


@dataclass
class ModelSpec:
    """Settings of the network, with the names of the original command line."""

    hidden: int = setting(108, "units of each block", min=1, max=4096)
    n_msb: int = setting(4, "blocks (for method 2: physical blocks)", min=1, max=64)
    method: Literal[0, 1, 2] = setting(1, "0 blocks share the classes, 1 every block sees all, 2 groups of copies")
    gain_blocks: int = setting(2, "copies of each group in method 2", min=1, max=64)
    quant_inp: int | None = setting(4, "bits of crossbar inputs (DAC); null = analog", min=2, max=16)
    quant_actMVM: int | None = setting(6, "bits of crossbar outputs (ADC); null = analog", min=2, max=16)
    quant_actNM: int | None = setting(8, "bits of element-wise digital values; null = analog", min=2, max=16)
    quant_w: int | None = setting(None, "bits of the weights; null = analog", min=2, max=16)
    weight_range: Literal["real", "paper"] = setting(
        "real", "range of the weight quantiser: max_w, or 1 as in the original"
    )
    max_w: float = setting(0.2, "largest weight magnitude", min=1e-3, max=100)
    rows_bias: int = setting(6, "crossbar rows of a bias: its limit is rows_bias * max_w", min=1, max=1024)
    drop_p: float = setting(0.125, "DropConnect probability of recurrent weights in pretraining", min=0, max=0.95)
    noise_train: float = setting(0.1, "weight noise of retraining, standard deviation / max_w", min=0, max=10)
    noise_eval: float = setting(
        0.0, "weight noise of validation and scoring, standard deviation / max_w", min=0, max=10
    )
    noise_program: float = setting(
        0.0, "programming noise: deviation of each stored weight / max_w, fixed for a chip", min=0, max=10
    )
    adc_offset: float = setting(0.0, "offset of the converters (ADC) of crossbar outputs, in LSB", min=-1e3, max=1e3)
    adc_gain: float = setting(0.0, "relative gain error of these converters", min=-0.9, max=10)
    adc_inl: float = setting(0.0, "peak of their non-linearity (a parabola), in LSB", min=-1e3, max=1e3)
    adc_draw: Literal["column", "chip", "fixed"] = setting(
        "column", "adc_*: deviations drawn per column or per chip, or the values themselves"
    )
    input_coding: Literal["parallel", "bit_serial"] = setting(
        "parallel", "crossbar inputs at once, or in slices of quant_inp bits one after the other"
    )
    input_slices: int = setting(3, "slices of bit_serial inputs", min=1, max=15)
    pact_a: bool = setting(True, "clipping ranges are trained")
    l2: float = setting(0.01, "strength of the penalty on the norm of the ranges", min=0)
    cs: float = setting(0.1, "strength of the cosine penalty between blocks", min=0)
    input_range: float = setting(128.0, "initial clipping range of the features", min=1e-3)

    # Done-markers hold these only where they are not the default, so that older trainings stay up to date.
    ADDED_LATER: ClassVar[tuple[str, ...]] = (
        *("noise_program", "adc_offset", "adc_gain", "adc_inl", "adc_draw", "input_coding", "input_slices"),
    )


def build(model: ModelSpec, input_shape: tuple[int, int], classes: int) -> BlockLSTM:
    """The network for features of `input_shape` (frames, width)."""
    from kestrel.models.block_lstm import BlockLSTM

    return BlockLSTM(input_size=input_shape[1], classes=classes, **vars(model))
