"""Which networks transmit deltas, and what their traces cost on an accelerator.

A further kind of network registers a function here that returns its layers, or raises NoFigures with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from pathlib import Path

import numpy as np
from torch import nn

from kestrel.errors import UsageError
from kestrel.hw.delta_cycles import DeltaLayer
from kestrel.hw.delta_spec import load_machine
from kestrel.hw.delta_trace import TraceFigures, TraceMeter
from kestrel.hw.network import NoFigures
from kestrel.hw.spec import FOLDER


@singledispatch
def delta_layers(net: nn.Module) -> Sequence[DeltaLayer]:
    """The layers of `net` in the order in which a step computes them. Raises NoFigures where it transmits no deltas."""
    raise NoFigures(f"{type(net).__name__} transmits no deltas")


def trace_meter(net: nn.Module, machine: str = "spartus", folder: Path = FOLDER) -> tuple[TraceMeter | None, str]:
    """A meter for the clips of `net` on `machine` (a file of constants in `folder`), or None and why there is none.

    Raises UsageError where the file of constants is missing or wrong.
    """
    spec = load_machine(machine, folder)
    try:
        layers = delta_layers(net)
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
