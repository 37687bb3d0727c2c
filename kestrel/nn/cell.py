"""N parallel LSTM blocks whose products run on crossbars and whose every signal is clipped and quantised.

Equations: ISCAS 2021 in-memory-computing LSTM. With q(v, k, b) = Q(P(v, a_k), b, a_k) a time step of a block is

    p1 = q(M(q(x, 1, INP), W_ih, b_ih), 12, MVM)         p2 = q(M(q(h, 11, INP), W_hh, b_hh), 13, MVM)
    g  = q(p1 + p2, 14, NM), split into i, j, f, o
    F = q(sigmoid f, 3, NM)   I = q(sigmoid i, 4, NM)   J = q(tanh j, 5, NM)   O = q(sigmoid o, 6, NM)
    c' = q(q(c F, 7, NM) + q(I J, 8, NM), 9, NM)         h' = q(q(tanh c', 10, NM) O, 11, NM)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kestrel.nn.crossbar import Device, NoiseSource, crossbar
from kestrel.quant.quantiser import check_bits, clip_quantise

# Rows of `ranges` with their initial values. The paper's a2 takes part in no signal and is left out.
RANGES: dict[str, float] = {
    "a1": 128.0,  # x
    "a3": 1.0,  # sigmoid f
    "a4": 1.0,  # sigmoid i
    "a5": 1.0,  # tanh j (candidate)
    "a6": 1.0,  # sigmoid o
    "a7": 4.0,  # c F
    "a8": 1.0,  # I J
    "a9": 4.0,  # new c
    "a10": 1.0,  # tanh c
    "a11": 4.0,  # h
    "a12": 4.0,  # input product
    "a13": 4.0,  # recurrent product
    "a14": 4.0,  # gate pre-activation
}
ROW = {name: row for row, name in enumerate(RANGES)}


@dataclass(frozen=True)
class Bits:
    """Bits of the converters and of the digital values; None = analog.

    `inp`: DAC, crossbar inputs. `mvm`: ADC, crossbar outputs. `nm`: digital element-wise values.
    """

    inp: int | None = 4
    mvm: int | None = 6
    nm: int | None = 8

    def __post_init__(self) -> None:
        for field, name in (("inp", "quant_inp"), ("mvm", "quant_actMVM"), ("nm", "quant_actNM")):
            object.__setattr__(self, field, check_bits(f"model.{name}", getattr(self, field)))


@dataclass
class Cell:
    """What one sequence is computed with. Shapes: w_ih [N, I, 4H], w_hh [N, H, 4H], biases [N, 4H], ranges [13, N].

    `mask` [N, H, 4H] (DropConnect) multiplies w_hh; `noise` draws the weight noise of every product afresh.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    ranges: Tensor
    bits: Bits
    device: Device
    mask: Tensor | None = None
    noise: NoiseSource | None = None

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors that learn: w_ih, w_hh, b_ih, b_hh, ranges."""
        return self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.ranges

    def detached(self) -> Cell:
        """The same cell outside the graph."""
        w_ih, w_hh, b_ih, b_hh, ranges = (tensor.detach() for tensor in self.trained)
        return Cell(w_ih, w_hh, b_ih, b_hh, ranges, self.bits, self.device, self.mask, self.noise)


def plain_lstm(x: Tensor, cell: Cell) -> Tensor:
    """The equations, one time step after the other: x [B, T, I] -> the last hidden state [N, B, H].

    This is the reference for the fast paths and what a trace (ONNX) records.
    """
    blocks, hidden = cell.w_hh.shape[:2]
    inp, mvm, nm = cell.bits.inp, cell.bits.mvm, cell.bits.nm

    def q(value: Tensor, name: str, bits: int | None) -> Tensor:
        return clip_quantise(value, bits, cell.ranges[ROW[name]].view(-1, 1, 1))

    w_hh = cell.w_hh if cell.mask is None else cell.w_hh * cell.mask
    h = c = x.new_zeros(blocks, x.shape[0], hidden)
    for step in range(x.shape[1]):
        noise_ih = cell.noise("ih", step) if cell.noise else None
        noise_hh = cell.noise("hh", step) if cell.noise else None
        now = x[:, step].unsqueeze(0).expand(blocks, -1, -1)  # [N, B, I]
        p1 = q(crossbar(q(now, "a1", inp), cell.w_ih, cell.b_ih, cell.device, noise_ih), "a12", mvm)
        p2 = q(crossbar(q(h, "a11", inp), w_hh, cell.b_hh, cell.device, noise_hh), "a13", mvm)
        i, j, f, o = q(p1 + p2, "a14", nm).chunk(4, dim=-1)  # [N, B, 4H] -> 4 x [N, B, H]
        forget, keep = q(torch.sigmoid(f), "a3", nm), q(torch.sigmoid(i), "a4", nm)
        candidate, out = q(torch.tanh(j), "a5", nm), q(torch.sigmoid(o), "a6", nm)
        c = q(q(c * forget, "a7", nm) + q(keep * candidate, "a8", nm), "a9", nm)
        h = q(q(torch.tanh(c), "a10", nm) * out, "a11", nm)
    return h
