"""The optimiser of a training phase."""

from __future__ import annotations

import torch
from torch import Tensor

from kestrel.train.spec import PhaseSpec


def make_optimizer(phase: PhaseSpec, parameters: list[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of a phase; its learning rate is set before each update."""
    fused = True if device.type in ("cpu", "cuda") else None
    rate, decay = phase.lr[0], phase.weight_decay
    if phase.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=phase.momentum, weight_decay=decay, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[phase.optimizer]
    return kind(parameters, lr=rate, weight_decay=decay, fused=fused)
