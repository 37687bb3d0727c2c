"""The 8-bit keyword-spotting LSTM with trained clipping ranges (PACT) from which the ISCAS 2021 network grew.

Topology of Hello Edge (Zhang et al. 2017): one LSTM layer of 118 or 344 units and a linear read-out, here with 8-bit
weights and activations. It is the block of `iscas21_lstm` on its own, so that settings, cell and integer model are shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kestrel.recipe import iscas21_lstm
from kestrel.settings import setting

build = iscas21_lstm.build
EVALUATION_ONLY = iscas21_lstm.EVALUATION_ONLY


@dataclass
class ModelSpec(iscas21_lstm.ModelSpec):
    """Settings of the network: those of the blocks, with the values of a single digital one."""

    hidden: int = setting(118, "units of the LSTM", min=1, max=4096)
    n_msb: int = setting(1, "blocks; 1 is the plain LSTM", min=1, max=64)
    method: Literal[0, 1, 2] = setting(0, "0: the read-out's scores are the logits, with no sum over blocks")
    gain_blocks: int = setting(1, "copies of each group in method 2", min=1, max=64)
    quant_inp: int | None = setting(8, "bits of the inputs of products; null = analog", min=2, max=16)
    quant_actMVM: int | None = setting(8, "bits of the outputs of products; null = analog", min=2, max=16)
    quant_w: int | None = setting(8, "bits of the weights; null = analog", min=2, max=16)
    max_w: float = setting(1.0, "largest weight magnitude, and the range of the weight quantiser", min=1e-3, max=100)
    rows_bias: int = setting(1, "largest bias / max_w", min=1, max=1024)
    drop_p: float = setting(0.0, "DropConnect probability of recurrent weights", min=0, max=0.95)
    noise_train: float = setting(0.0, "weight noise of retraining, standard deviation / max_w", min=0, max=10)
    cs: float = setting(0.0, "strength of the cosine penalty between blocks", min=0)
