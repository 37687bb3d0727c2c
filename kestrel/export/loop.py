"""Recurrent networks for ONNX: the steps of a sequence as one Loop, not as a copy of the cell for every frame.

A traced sequence of 50 frames has thousands of nodes, and onnxruntime takes a quarter of a minute to load it.
"""

from __future__ import annotations

import functools
import warnings
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.network import Network
from kestrel.nn.cell import ROW
from kestrel.nn.chip import Chip
from kestrel.nn.quant_lstm import QuantLSTM

# Order in which the compiled cell takes the clipping ranges.
_ORDER = ("a1", "a11", "a12", "a13", "a14", "a3", "a4", "a5", "a6", "a7", "a8", "a9", "a10")


def _levels(x: Tensor, limit: Tensor, bits: int) -> Tensor:
    """Q(P(x, a), b, a) of kestrel.quant.quantiser in the part of Python that TorchScript compiles; 0 bits = analog."""
    clipped = torch.minimum(torch.maximum(x, -limit), limit)
    if bits == 0:
        return clipped
    half = float(2 ** (bits - 1))
    step = limit * (1.0 / half)
    return (clipped / step).clamp(1.0 - half, half - 1.0).round() * step


def _sequence(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, ranges: Tensor, inp: int, mvm: int, nm: int
) -> Tensor:
    """kestrel.nn.quant_lstm.plain_lstm without noise and dropout: x [B, T, I] -> [N, B, H]; biases [N, 1, 4H]."""
    a1, a11, a12, a13, a14, a3, a4, a5, a6, a7, a8, a9, a10 = ranges.unbind(0)  # each [N, 1, 1]
    h = torch.zeros([w_hh.shape[0], x.shape[0], w_hh.shape[1]])
    c = torch.zeros([w_hh.shape[0], x.shape[0], w_hh.shape[1]])
    for step in range(x.shape[1]):
        now = x[:, step].unsqueeze(0)  # [1, B, I], the same for every block
        p1 = _levels(torch.matmul(_levels(now, a1, inp), w_ih) + b_ih, a12, mvm)
        p2 = _levels(torch.matmul(_levels(h, a11, inp), w_hh) + b_hh, a13, mvm)
        i, j, f, o = _levels(p1 + p2, a14, nm).chunk(4, -1)  # [N, B, 4H] -> 4 x [N, B, H]
        forget, keep = _levels(torch.sigmoid(f), a3, nm), _levels(torch.sigmoid(i), a4, nm)
        candidate, out = _levels(torch.tanh(j), a5, nm), _levels(torch.sigmoid(o), a6, nm)
        c = _levels(_levels(c * forget, a7, nm) + _levels(keep * candidate, a8, nm), a9, nm)
        h = _levels(_levels(torch.tanh(c), a10, nm) * out, a11, nm)
    return h


@functools.cache
def _compiled() -> Any:
    """`_sequence` compiled, so that a trace records its loop as a loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript announces its successor
        return torch.jit.script(_sequence)


class _LoopLSTM(nn.Module):
    """A QuantLSTM in evaluation without noise, with the weights as its crossbars store them."""

    def __init__(self, lstm: QuantLSTM) -> None:
        super().__init__()
        w_ih, b_ih = lstm.device.stored(lstm.w_ih.detach(), lstm.b_ih.detach())
        w_hh, b_hh = lstm.device.stored(lstm.w_hh.detach(), lstm.b_hh.detach())
        ranges = (
            lstm.ranges_in_use().detach()[[ROW[name] for name in _ORDER]].unsqueeze(-1).unsqueeze(-1)
        )  # [13, N, 1, 1]
        self.tensors = [w_ih, w_hh, b_ih.unsqueeze(1), b_hh.unsqueeze(1), ranges]
        self.bits = (lstm.bits.inp or 0, lstm.bits.mvm or 0, lstm.bits.nm or 0)

    def forward(self, x: Tensor, drop_p: float = 0.0, noise: float = 0.0, chip: Chip | None = None) -> Tensor:
        """[B, T, I] -> [N, B, H]."""
        if drop_p > 0 or noise > 0 or chip:
            raise ValueError("the loop is for evaluation without noise")
        return _compiled()(x, *self.tensors, *self.bits)


@singledispatch
def with_loops(net: Network) -> Network:
    """`net` with its time loops in a form that ONNX keeps as loops; by default `net` itself."""
    return net


@with_loops.register
def _(net: BlockLSTM) -> BlockLSTM:
    if net.bits.slices:
        return net  # bit-serial products are traced step by step
    net.lstm = _LoopLSTM(net.lstm)  # type: ignore[assignment]
    return net
