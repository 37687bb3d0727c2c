"""Parameters, multiply-adds and bytes of a network, and a second opinion on them from thop.

Counting rules: a multiply-add is 1, at a stated input shape; normalisation, activations and biases are not counted;
front end and feature post-processing are not part of the network. A parameter counts once. Bytes are those of the
packed arrays, not a product of counts and bits.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Container
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.inventory import layers, parameters, weight_codes
from kestrel.models.network import Network
from kestrel.models.quant_net import QuantNet

_ELEMENTWISE = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.PReLU,
    nn.LeakyReLU,
    nn.Softmax,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.Upsample,
)
_GATES: dict[type[nn.Module], int] = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}
# Products and sums of states per unit and step that thop adds: c' and h' of an LSTM, r * h and h' of a GRU.
_STATE_OPS: dict[type[nn.Module], int] = {nn.RNN: 0, nn.GRU: 4, nn.LSTM: 4}


@dataclass(frozen=True)
class Check:
    """What thop says of a network.

    `macs` is its own figure, `extra` the element-wise work and biases in it, which we do not count; `compared` is the
    rest. `parameters` are those of the layers that it saw. `skipped` names layers that it does not support. `note` says
    how the network was shown to it. `macs` is None where thop could not be asked, and `note` says why.
    """

    macs: int | None
    extra: int
    parameters: int
    skipped: list[str]
    note: str

    @property
    def compared(self) -> int | None:
        """thop's figure under our counting rules."""
        return None if self.macs is None else self.macs - self.extra


@dataclass(frozen=True)
class Counts:
    """Size and work of a network for one clip of `input_shape` (frames, width)."""

    input_shape: tuple[int, int]
    parameters: int
    macs: int
    weight_bytes: int
    layers: list[dict[str, Any]]
    thop: Check

    @property
    def thop_agrees(self) -> bool | None:
        """Whether both MAC figures are equal; None where thop could not count every layer."""
        return None if self.thop.macs is None or self.thop.skipped else self.thop.compared == self.macs


def count(net: Network, input_shape: tuple[int, int], analog_bits: int) -> Counts:
    """Count `net` for features of `input_shape` (frames, width) after post-processing.

    `analog_bits` are the bits at which weights that were trained without quantisation are stored.
    """
    frames, width = input_shape
    return Counts(
        input_shape=(frames, width),
        parameters=parameters(net),
        macs=net.macs(frames),
        weight_bytes=sum(group.stored_bytes for group in weight_codes(net, analog_bits).values()),
        layers=layers(net, frames),
        thop=thop_check(net, frames, width),
    )


class _Blocks(nn.Module):
    """The products of a BlockLSTM as modules that thop knows: N times nn.LSTM and nn.Linear."""

    def __init__(self, blocks: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.lstms = nn.ModuleList(nn.LSTM(inputs, hidden, batch_first=True) for _ in range(blocks))
        self.readouts = nn.ModuleList(nn.Linear(hidden, outputs) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, I] -> [B, N * O]."""
        pairs = zip(self.lstms, self.readouts, strict=True)
        return torch.cat([readout(lstm(x)[0][:, -1]) for lstm, readout in pairs], dim=1)


@singledispatch
def equivalent(net: nn.Module) -> tuple[nn.Module, str]:
    """A module of plain torch layers with the same products as `net`, and a remark on it; by default `net` itself."""
    return copy.deepcopy(net), "the network itself"


@equivalent.register
def _(net: BlockLSTM) -> tuple[nn.Module, str]:
    blocks, inputs, gates = net.lstm.w_ih.shape
    outputs = net.readout.weight.shape[-1]
    module = _Blocks(blocks, inputs, gates // 4, outputs)
    return module, f"{blocks} x (nn.LSTM({inputs}, {gates // 4}) + nn.Linear({gates // 4}, {outputs}))"


@equivalent.register
def _(net: QuantNet) -> tuple[nn.Module, str]:
    return net.plain(), "the network itself, of plain layers"


def thop_check(net: nn.Module, frames: int, width: int) -> Check:
    """Let thop count `net`, or its equivalent of plain layers, for one clip [1, frames, width]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop imports distutils and calls functions of its own that it deprecates
        try:
            thop: Any = importlib.import_module("thop")
            rules: Any = importlib.import_module("thop.profile")
        except ImportError as error:
            return Check(None, 0, 0, [], f"not asked: {error}")
        module, note = equivalent(net)
        module = module.cpu().float().eval()
        x = torch.zeros(1, frames, width)
        macs, seen = thop.profile(module, (x,), verbose=False)
        zero = dict.fromkeys(_ELEMENTWISE, rules.zero_ops)
        without_elementwise, _ = thop.profile(module, (x,), custom_ops=zero, verbose=False)
    extra = int(macs - without_elementwise) + _recurrent_extra(module, x)
    return Check(int(macs), extra, int(seen), _without_rule(module, rules.register_hooks), note)


def _recurrent_extra(module: nn.Module, x: Tensor) -> int:
    """Sums, biases and state updates that thop counts beside matrix products in the recurrent layers (batch 1)."""
    extra = [0]

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        assert isinstance(layer, nn.RNNBase)
        steps = inputs[0].shape[1 if layer.batch_first else 0]
        per_unit = _GATES[type(layer)] * (1 + 2 * layer.bias) + _STATE_OPS[type(layer)]
        extra.append(per_unit * layer.hidden_size * layer.num_layers * (2 if layer.bidirectional else 1) * steps)

    hooks = [part.register_forward_hook(note) for part in module.modules() if type(part) in _GATES]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return sum(extra)


def _without_rule(module: nn.Module, rules: Container[type]) -> list[str]:
    """Modules with parameters of their own that thop has no rule for; it counts them as nothing."""
    found = []
    for name, part in module.named_modules():
        own = sum(parameter.numel() for parameter in part.parameters(recurse=False))
        if own and type(part) not in rules:
            found.append(f"{name or 'network'} ({type(part).__name__}, {own:,} parameters)")
    return found
