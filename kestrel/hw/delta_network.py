"""Which networks transmit deltas, and what their traces cost on an accelerator.

A further kind of network registers a function here that returns its layers, or raises NoFigures with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kestrel.errors import UsageError
from kestrel.hw.delta_cycles import GRU_GATES, LSTM_GATES, DeltaLayer
from kestrel.hw.delta_spec import load_machine
from kestrel.hw.delta_trace import TraceFigures, TraceMeter
from kestrel.hw.network import NoFigures
from kestrel.hw.spec import FOLDER
from kestrel.models.delta_rnn import DeltaNetwork


@singledispatch
def delta_layers(net: nn.Module) -> Sequence[DeltaLayer]:
    """The layers of `net` in the order in which a step computes them. Raises NoFigures where it transmits no deltas."""
    raise NoFigures(f"{type(net).__name__} transmits no deltas")


@delta_layers.register
def _(net: DeltaNetwork) -> Sequence[DeltaLayer]:
    return pruned_layers(net, net.pruner_pes)


def pruned_layers(net: DeltaNetwork, pes: int) -> Sequence[DeltaLayer]:
    """The delta layers of `net` on arrays of `pes` PEs, row r of a matrix in PE r mod pes.

    Pruned layers take as many beats for a column as the fullest PE has weights in any column: where the pruning was
    balanced for `pes` or a multiple of it, all PEs have as many.
    """
    masks, rnn, layers = net.masks(), net.rnn, []
    for index in range(rnn.num_layers):
        names = [f"rnn.weight_{part}_l{index}" for part in ("ih", "hh")]
        inputs, rows = getattr(rnn, names[0].removeprefix("rnn.")).shape[1], len(masks.get(names[0], ()))
        nonzeros = None
        if rows:
            mask = torch.cat([masks[name] for name in names], dim=1)  # [G H, I + H]
            padded = torch.cat([mask, mask.new_zeros(-rows % pes, mask.shape[1])])
            nonzeros = int((padded != 0).view(-1, pes, mask.shape[1]).sum(0).max())
        gates = LSTM_GATES if rnn.kind == "LSTM" else GRU_GATES
        layers.append(DeltaLayer(inputs, rnn.hidden_size, gates, nonzeros, pes if rows else None))
    return layers


def trace_meter(net: nn.Module, machine: str = "spartus", folder: Path = FOLDER) -> tuple[TraceMeter | None, str]:
    """A meter for the clips of `net` on `machine` (a file of constants in `folder`), or None and why there is none.

    Raises UsageError where the file of constants is missing or wrong.
    """
    spec = load_machine(machine, folder)
    try:
        layers = pruned_layers(net, spec.compute.pes) if isinstance(net, DeltaNetwork) else delta_layers(net)
    except NoFigures as reason:
        return None, str(reason)
    try:
        return TraceMeter(layers, spec), ""
    except UsageError as reason:  # weights pruned for another number of PEs
        return None, str(reason)


def trace_hardware(
    net: nn.Module, clips: Iterable[Sequence[np.ndarray]], machine: str = "spartus", folder: Path = FOLDER
) -> tuple[TraceFigures | None, str]:
    """Figures of `net` for the deltas of `clips`, or None and the reason why there are none.

    Args:
        clips: for each clip one array uint8 or bool [T, inputs + hidden] per layer, without frames that pad it.

    Raises UsageError where the file of constants is missing or wrong, or a clip does not fit the network.
    """
    meter, obstacle = trace_meter(net, machine, folder)
    if meter is None:
        return None, obstacle
    for clip in clips:
        meter.add(clip)
    return meter.figures(), ""
