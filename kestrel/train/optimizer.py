"""The optimiser of a training phase."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kestrel.train.adabound import AdaBound
from kestrel.train.spec import PhaseSpec

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def undecayed(module: nn.Module, phase: PhaseSpec) -> list[Tensor]:
    """Parameters that `no_decay_keys` spares weight decay."""
    found: list[Tensor] = []
    if phase.no_decay_keys == "none":
        return found
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, _NORMS) or (phase.no_decay_keys == "bn#bias" and name.startswith("bias")):
                found.append(parameter)
    return found


def make_optimizer(
    phase: PhaseSpec, parameters: list[Tensor], device: torch.device, spared: list[Tensor] | None = None
) -> torch.optim.Optimizer:
    """The optimiser of a phase; its learning rate is set before each update. `spared` parameters do not decay."""
    fused = True if device.type in ("cpu", "cuda") else None
    rate, decay = phase.lr[0], phase.weight_decay
    kept = {id(parameter) for parameter in spared or ()}
    groups: list[dict] = [{"params": [parameter for parameter in parameters if id(parameter) not in kept]}]
    if kept:
        groups.append({"params": [each for each in parameters if id(each) in kept], "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if phase.optimizer == "sgd":
        made = torch.optim.SGD(groups, rate, phase.momentum, 0, decay, phase.nesterov, fused=fused)
        if phase.momentum:  # the fused step wants all or none of them, and a super-network trains a part at a time
            for group in made.param_groups:
                for parameter in group["params"]:
                    made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return made
    if phase.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, rate, momentum=0.0, weight_decay=decay)
    if phase.optimizer == "adabound":
        return AdaBound(groups, rate, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[phase.optimizer]
    return kind(groups, lr=rate, weight_decay=decay, fused=fused)
