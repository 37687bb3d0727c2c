"""N parallel quantised LSTM blocks and their read-outs as modules; picks the fastest way to compute them."""

from __future__ import annotations

import functools
import logging
import math

import torch
from torch import Tensor, nn

from kestrel.errors import KestrelError
from kestrel.nn import native
from kestrel.nn.cell import RANGES, ROW, Bits, Cell, converted_product, plain_lstm
from kestrel.nn.chip import IDEAL, Chip, Part
from kestrel.nn.crossbar import Device, draw_noise, uniform
from kestrel.nn.fused import fused_lstm
from kestrel.quant.quantiser import MIN_RANGE, plain_ops, shared_range

_LOG = logging.getLogger("kestrel")


@functools.cache
def _say_serial() -> None:
    _LOG.info("bit-serial inputs have no native LSTM: using the slower PyTorch path")


class QuantLSTM(nn.Module):
    """N quantised LSTM blocks over the same input: [B, T, I] -> last hidden state of each block [N, B, H]."""

    def __init__(
        self,
        input_size: int,
        hidden: int,
        blocks: int,
        bits: Bits,
        device: Device,
        trainable_ranges: bool = True,
        input_range: float = RANGES["a1"],
    ) -> None:
        super().__init__()
        self.bits, self.device = bits, device
        self.w_ih = uniform((blocks, input_size, 4 * hidden), device.init_limit(1 / math.sqrt(input_size)))
        self.w_hh = uniform((blocks, hidden, 4 * hidden), device.init_limit(1 / math.sqrt(hidden)))
        self.b_ih = nn.Parameter(torch.zeros(blocks, 4 * hidden))
        self.b_hh = nn.Parameter(torch.ones(blocks, 4 * hidden))
        start = torch.tensor(list(RANGES.values())).view(-1, 1).repeat(1, blocks)
        start[ROW["a1"]] = input_range
        self.ranges = nn.Parameter(start, requires_grad=trainable_ranges)
        self.project()

    def forward(self, x: Tensor, drop_p: float = 0.0, noise: float = 0.0, chip: Chip | None = None) -> Tensor:
        """Args: `drop_p` DropConnect probability of w_hh; `noise` standard deviation as a fraction of max_w; `chip`
        deviations of the products `ih` and `hh`.

        Raises KestrelError where x has another number of features.
        """
        if not plain_ops() and x.shape[-1] != self.w_ih.shape[1]:
            raise KestrelError(f"features have {x.shape[-1]} values per frame, the network takes {self.w_ih.shape[1]}")
        cell = Cell(self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.ranges_in_use(), self.bits, self.device)
        cell.chip = chip or {}
        if drop_p > 0:  # one mask per pass and block, shared over time, without rescaling
            cell.mask = (torch.rand_like(self.w_hh) >= drop_p).to(self.w_hh.dtype)
        deviation = noise * self.device.max_w
        plain = plain_ops() or x.numel() == 0
        fits = x.device.type == "cpu" and x.dtype == torch.float32
        if not plain and fits and not self.bits.slices and native.available():
            return native.native_lstm(x, cell, deviation)
        if noise > 0:
            weights = {"ih": (self.w_ih, self.b_ih), "hh": (self.w_hh, self.b_hh)}
            cell.noise = lambda name, step: draw_noise(*weights[name], deviation)
        if self.bits.slices and fits:
            _say_serial()
        return plain_lstm(x, cell) if plain else fused_lstm(x, cell)

    def ranges_in_use(self) -> Tensor:
        """The ranges [13, N] that signals are quantised with: h, which goes to two quantisers, has a shared range."""
        row = ROW["a11"]
        return torch.cat([self.ranges[:row], shared_range(self.ranges[row : row + 1]), self.ranges[row + 1 :]])

    @torch.no_grad()
    def project(self) -> None:
        """Clamp weights and biases to what the device stores and keep ranges positive."""
        self.device.project(self.w_ih, self.b_ih)
        self.device.project(self.w_hh, self.b_hh)
        self.ranges.clamp_(min=MIN_RANGE)


class CrossbarLinear(nn.Module):
    """N linear read-outs on crossbars with converters: h [N, B, I] -> [N, B, O].

    Rows of `ranges` [2, N]: the paper's a1 = 4 (input) and a2 = 16 (output) of the read-out.
    """

    def __init__(
        self, input_size: int, outputs: int, blocks: int, bits: Bits, device: Device, trainable_ranges: bool = True
    ) -> None:
        super().__init__()
        self.bits, self.device = bits, device
        self.weight = uniform((blocks, input_size, outputs), device.init_limit(math.sqrt(6 / input_size)))
        self.bias = nn.Parameter(torch.zeros(blocks, outputs))
        self.ranges = nn.Parameter(torch.tensor([[4.0], [16.0]]).repeat(1, blocks), requires_grad=trainable_ranges)
        self.project()

    def forward(self, h: Tensor, noise: float = 0.0, part: Part = IDEAL) -> Tensor:
        """Args: `noise` standard deviation of the weight noise as a fraction of max_w; `part` deviations of the chip."""
        deviation, count = noise * self.device.max_w, max(1, self.bits.slices)
        noises = [draw_noise(self.weight, self.bias, deviation) if noise > 0 else None for _ in range(count)]
        limits = self.ranges[0], self.ranges[1]
        return converted_product(h, self.weight, self.bias, limits, self.bits, self.device, noises, part)

    @torch.no_grad()
    def project(self) -> None:
        """Clamp weights and biases to what the device stores and keep ranges positive."""
        self.device.project(self.weight, self.bias)
        self.ranges.clamp_(min=MIN_RANGE)
