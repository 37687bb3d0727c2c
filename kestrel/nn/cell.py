"""N parallel LSTM blocks whose products run on crossbars and whose every signal is clipped and quantised.

Equations: ISCAS 2021 in-memory-computing LSTM. With q(v, k, b) = Q(P(v, a_k), b, a_k) a time step of a block is

    p1 = q(M(q(x, 1, INP), W_ih, b_ih), 12, MVM)         p2 = q(M(q(h, 11, INP), W_hh, b_hh), 13, MVM)
    g  = q(p1 + p2, 14, NM), split into i, j, f, o
    F = q(sigmoid f, 3, NM)   I = q(sigmoid i, 4, NM)   J = q(tanh j, 5, NM)   O = q(sigmoid o, 6, NM)
    c' = q(q(c F, 7, NM) + q(I J, 8, NM), 9, NM)         h' = q(q(tanh c', 10, NM) O, 11, NM)

Where converters deviate, the outputs of the products pass their curves before q. With bit-serial inputs, p1 and p2 are sums
over slices of x and h, each converted over the range 1 (`kestrel.nn.crossbar.serial_crossbar`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kestrel.errors import UsageError
from kestrel.nn.chip import IDEAL, Chip, Part
from kestrel.nn.crossbar import Device, Noises, NoiseSource, Serial, crossbar, serial_crossbar
from kestrel.quant.quantiser import MAX_BITS, check_bits, clip_quantise, pact

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
    `slices`: conversions of an input, one after the other, each of `inp` bits; 0 = inputs are not split (parallel).
    """

    inp: int | None = 4
    mvm: int | None = 6
    nm: int | None = 8
    slices: int = 0

    def __post_init__(self) -> None:
        for key, name in (("inp", "quant_inp"), ("mvm", "quant_actMVM"), ("nm", "quant_actNM")):
            object.__setattr__(self, key, check_bits(f"model.{name}", getattr(self, key)))
        if self.slices and self.inp is None:
            raise UsageError("model.input_coding: bit_serial splits the codes of a DAC; set model.quant_inp to 2..16")
        if self.slices and self.inp is not None and self.inp + self.slices - 1 > MAX_BITS:
            most = MAX_BITS + 1 - self.inp
            raise UsageError(
                f"model.input_slices: {self.slices} is out of bounds (1..{most} with quant_inp {self.inp})"
            )

    @property
    def register(self) -> int | None:
        """Bits of the register that holds an input before it is split; None where it is not."""
        return self.inp + self.slices - 1 if self.slices and self.inp else None

    @property
    def serial(self) -> Serial | None:
        """How inputs are split; None where they are not."""
        return Serial(self.inp, self.slices, self.mvm) if self.slices and self.inp else None


@dataclass
class Cell:
    """What one sequence is computed with. Shapes: w_ih [N, I, 4H], w_hh [N, H, 4H], biases [N, 4H], ranges [13, N].

    `mask` [N, H, 4H] (DropConnect) multiplies w_hh; `noise` draws the weight noise of every product afresh; `chip` holds
    what deviates for good in the products `ih` and `hh`.
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
    chip: Chip = field(default_factory=dict)

    def part(self, product: str) -> Part:
        """What deviates in product `ih` or `hh`."""
        return self.chip.get(product, IDEAL)

    def noises(self, product: str, step: int) -> Noises:
        """Fresh noise of the product at time step `step`, for each slice of its input."""
        count = max(1, self.bits.slices)
        return [self.noise(product, step * count + place) if self.noise else None for place in range(count)]

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors that learn: w_ih, w_hh, b_ih, b_hh, ranges."""
        return self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.ranges

    def detached(self) -> Cell:
        """The same cell outside the graph."""
        w_ih, w_hh, b_ih, b_hh, ranges = (tensor.detach() for tensor in self.trained)
        return Cell(w_ih, w_hh, b_ih, b_hh, ranges, self.bits, self.device, self.mask, self.noise, self.chip)


def converted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    limits: tuple[Tensor, Tensor],
    bits: Bits,
    device: Device,
    noises: Noises,
    part: Part = IDEAL,
) -> Tensor:
    """q(M(q(x, a, INP), W, b), a', MVM): a crossbar between its converters, x [N, B, I] -> [N, B, O].

    `limits` (a, a'), each [N]; `noises`: the weight noise of each slice of x (one where inputs are not split).
    """
    limit, limit_out = (values.view(-1, 1, 1) for values in limits)
    if bits.serial is not None:
        return serial_crossbar(pact(x, limit), weight, bias, limit, device, bits.serial, noises, part)
    y = crossbar(clip_quantise(x, bits.inp, limit), weight, bias, device, noises[0], part.program)
    if part.converter is not None and bits.mvm is not None:
        y = part.converter.read(y, limits[1], bits.mvm)
    return clip_quantise(y, bits.mvm, limit_out)


def plain_lstm(x: Tensor, cell: Cell) -> Tensor:
    """The equations, one time step after the other: x [B, T, I] -> the last hidden state [N, B, H].

    This is the reference for the fast paths and what a trace (ONNX) records.
    """
    blocks, hidden = cell.w_hh.shape[:2]
    nm = cell.bits.nm

    def q(value: Tensor, name: str, bits: int | None) -> Tensor:
        return clip_quantise(value, bits, cell.ranges[ROW[name]].view(-1, 1, 1))

    def product(value: Tensor, weight: Tensor, bias: Tensor, names: tuple[str, str], key: str, step: int) -> Tensor:
        limits = cell.ranges[ROW[names[0]]], cell.ranges[ROW[names[1]]]
        return converted_product(
            value, weight, bias, limits, cell.bits, cell.device, cell.noises(key, step), cell.part(key)
        )

    w_hh = cell.w_hh if cell.mask is None else cell.w_hh * cell.mask
    h = c = x.new_zeros(blocks, x.shape[0], hidden)
    for step in range(x.shape[1]):
        now = x[:, step].unsqueeze(0).expand(blocks, -1, -1)  # [N, B, I]
        p1 = product(now, cell.w_ih, cell.b_ih, ("a1", "a12"), "ih", step)
        p2 = product(h, w_hh, cell.b_hh, ("a11", "a13"), "hh", step)
        i, j, f, o = q(p1 + p2, "a14", nm).chunk(4, dim=-1)  # [N, B, 4H] -> 4 x [N, B, H]
        forget, keep = q(torch.sigmoid(f), "a3", nm), q(torch.sigmoid(i), "a4", nm)
        candidate, out = q(torch.tanh(j), "a5", nm), q(torch.sigmoid(o), "a6", nm)
        c = q(q(c * forget, "a7", nm) + q(keep * candidate, "a8", nm), "a9", nm)
        h = q(q(torch.tanh(c), "a10", nm) * out, "a11", nm)
    return h
