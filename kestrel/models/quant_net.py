"""Base of feed-forward convolutional networks whose weights and activations train with few bits.

A subclass builds its layers from kestrel.nn.low_bit, writes `scores`, and calls `plan_low_bits` at the end of its
constructor. What training, scoring, counting and export ask of a network then follows from its modules.

Activations that a device keeps pass through a QuantActivation, the input first of all; batch normalisation stands right
behind a convolution or linear layer and becomes part of its rescaling.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.models.network import Network, Phase, WeightGroup
from kestrel.nn.low_bit import LowBit, QuantActivation, QuantConv2d, QuantLinear
from kestrel.nn.pruning import Pruner, Unit
from kestrel.quant.low_bit import Scale, check_grid

Start = Literal["pretrain", "retrain", "never"]
FLOAT = "float"
_COUNTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)


@dataclass(frozen=True)
class LowBitPlan:
    """How a network trains with few bits.

    `weights`: grid of every layer (kestrel.quant.low_bit.NAMES, or `float`); `layers`: exceptions, name pattern -> grid,
    the last match counts. `scale`, `per_output`: how steps are found. `activations`: False leaves them in full precision.
    `start`: the stage that quantises, `delay`: its first epochs that still train in full precision.
    `prune`: share of pruned weights (or channels, `prune_unit`) of layers that match no pattern of `prune_not`, reached
    over `prune_epochs` of stage `prune_from`.
    """

    weights: str = "8bit"
    layers: Mapping[str, str] = field(default_factory=dict)
    scale: Scale = "max"
    per_output: bool = True
    activations: bool = True
    start: Start = "retrain"
    delay: int = 0
    prune: float = 0.0
    prune_unit: Unit = "weight"
    prune_not: tuple[str, ...] = ()
    prune_from: Literal["pretrain", "retrain"] = "retrain"
    prune_epochs: int = 1


class QuantNet(Network):
    """A feed-forward network for features [B, frames, width] -> logits [B, classes].

    Validation and export always see the stage's final form, quantised and pruned, also while its first epochs train in full
    precision or the pruning schedule runs: a checkpoint is chosen by what will be deployed.
    """

    stage: Tensor
    updates: Tensor

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.low_bit = LowBitPlan()
        self.pruner: Pruner | None = None
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))  # of the weights: 0, 1 = retrain
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # of this stage
        self._deployed = False

    def scores(self, x: Tensor) -> Tensor:
        """[B, T, F] -> logits [B, C]; what a subclass defines."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, C]."""
        return self.scores(x)

    # --------------------------------------------------------------------------------------------------------- stages

    def plan_low_bits(self, plan: LowBitPlan, where: str = "model") -> None:
        """Give the layers their grids and masks. Raises UsageError, naming the setting, where a name is unknown."""
        self.low_bit = plan
        layers = self.low_bit_layers()
        for pattern in plan.layers:
            if not fnmatch.filter(layers, pattern):
                raise UsageError(f"{where}.layer_weights: no layer is called {pattern!r}; layers: {', '.join(layers)}")
        for name, layer in layers.items():
            chosen = plan.weights
            for pattern, grid in plan.layers.items():
                chosen = grid if fnmatch.fnmatch(name, pattern) else chosen
            layer.set_grid(
                None if chosen == FLOAT else check_grid(chosen, f"{where}.weights"), plan.scale, plan.per_output
            )
        if plan.prune > 0:
            pruned = {n: x for n, x in layers.items() if not any(fnmatch.fnmatch(n, p) for p in plan.prune_not)}
            self.pruner = Pruner(pruned, plan.prune, plan.prune_unit)
        self._switch()

    def low_bit_layers(self) -> dict[str, LowBit]:
        """Layers with weights, by name, in the order of construction."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LowBit)}

    def set_phase(self, phase: Phase) -> None:
        """Switch quantisers and masks; they follow the stage that the weights were trained in."""
        super().set_phase(phase)
        if phase != "eval":
            stage = int(phase == "retrain")
            if stage != int(self.stage):
                self.stage.fill_(stage)
                self.updates.zero_()
            if int(self.updates) == 0:
                self._begin()
        self._switch()

    @torch.no_grad()
    def _begin(self) -> None:
        """First moment of a stage: steps from the weights and the ranges that were seen."""
        if self._prunes:
            assert self.pruner is not None
            self.pruner.update(0.0 if self.low_bit.prune_epochs else 1.0)
        for layer in self.low_bit_layers().values():
            layer.find_step()
        if self._quantises:
            for module in self.modules():
                if isinstance(module, QuantActivation):
                    module.begin()

    @property
    def _quantises(self) -> bool:
        """Whether the stage of the weights quantises in the end."""
        return self.low_bit.start == "pretrain" or (self.low_bit.start == "retrain" and bool(self.stage))

    @property
    def _prunes(self) -> bool:
        return self.pruner is not None and (self.low_bit.prune_from == "pretrain" or bool(self.stage))

    def _switch(self) -> None:
        waiting = self.training and int(self.updates) < self.low_bit.delay * (self.updates_per_epoch or 1)
        on = self._quantises and not waiting
        for module in self.modules():
            if isinstance(module, LowBit):
                module.quantised = on
            elif isinstance(module, QuantActivation):
                module.quantised = self._deployed or (on and self.low_bit.activations)
        if self._prunes:
            assert self.pruner is not None
            self.pruner.preview(not self.training)

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        """Inside, activations are quantised with the ranges that training noted, whatever the stage."""
        self._deployed = True
        self._switch()
        try:
            yield
        finally:
            self._deployed = False
            self._switch()

    @torch.no_grad()
    def project(self) -> None:
        """After an optimiser step: count it, prune where it is due, and end the delay of quantisation."""
        self.updates += 1
        done, epoch = int(self.updates), self.updates_per_epoch or 1
        length = self.low_bit.prune_epochs * epoch
        if self._prunes and (done % max(epoch // 10, 1) == 0 or done == length):  # ten times an epoch
            assert self.pruner is not None
            self.pruner.update(done / length if length else 1.0)
        if done == self.low_bit.delay * epoch:
            self._switch()

    # ------------------------------------------------------------------------------------------------- counts and codes

    @torch.no_grad()
    def shapes(self, frames: int) -> dict[str, tuple[int, ...]]:
        """Shape of the result of every module for one clip of `frames` frames, by name (without the batch)."""
        found: dict[str, tuple[int, ...]] = {}
        hooks = []
        for name, module in self.named_modules():

            def note(_: nn.Module, __: Any, result: Tensor, name: str = name) -> None:
                found[name] = tuple(result.shape[1:])

            hooks.append(module.register_forward_hook(note))
        phase, training = self.phase, self.training
        self.train(False)
        try:
            place = next(self.parameters())
            self(torch.zeros(1, frames, self.input_size, dtype=place.dtype, device=place.device))
        finally:
            self.phase = phase
            self.train(training)
            for hook in hooks:
                hook.remove()
        return found

    def layer_table(self, frames: int) -> list[dict[str, Any]]:
        """One row per layer with parameters; multiply-adds of convolutions and linear layers alone, each place once."""
        shapes, rows = self.shapes(frames), []
        for name, module in self.named_modules():
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if not isinstance(module, _COUNTED) or not own:
                continue
            macs, shape = 0, shapes.get(name, ())
            if isinstance(module, nn.Conv2d):
                macs = module.weight.numel() * shape[1] * shape[2] if shape else 0
            elif isinstance(module, nn.Linear):
                rows_of = 1
                for size in shape[:-1]:
                    rows_of *= size
                macs = module.weight.numel() * rows_of
            rows.append({"name": name, "parameters": own, "macs": macs, "output": list(shape)})
        return rows

    @torch.no_grad()
    def weight_groups(self) -> list[WeightGroup]:
        """Weights as they are stored: trained codes where they are quantised, analog with masks applied where not."""
        groups = []
        for name, layer in self.low_bit_layers().items():
            codes = layer.weight_codes()
            weight = layer.effective_weight().detach()
            groups.append(WeightGroup(f"{name}.weight", weight, None, None if codes is None else codes.bits, codes))
        return groups

    def weight_sparsity(self) -> float:
        """Share of stored weights that are zero."""
        weights = [layer.effective_weight().detach() for layer in self.low_bit_layers().values()]
        return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)

    def plain(self) -> nn.Module:
        """A copy of plain torch layers with the same products, for tools that know no others."""
        made = copy.deepcopy(self)
        for name, module in list(made.named_modules()):
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, QuantConv2d):
                new: nn.Module = nn.Conv2d(
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size,  # type: ignore[arg-type]
                    module.stride,  # type: ignore[arg-type]
                    module.padding,  # type: ignore[arg-type]
                    module.dilation,  # type: ignore[arg-type]
                    module.groups,
                    module.bias is not None,
                )
                if module.before:
                    new = nn.Sequential(nn.ZeroPad2d((0, 0, module.before, 0)), new)
            elif isinstance(module, QuantLinear):
                new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            elif isinstance(module, QuantActivation):
                new = nn.Identity()
            elif isinstance(module, nn.BatchNorm2d):
                new = nn.BatchNorm2d(module.num_features)
            else:
                if not isinstance(module, _COUNTED):  # factors are no products of a layer
                    for own in list(module._parameters):
                        value = module._parameters.pop(own)
                        setattr(module, own, None if value is None else value.detach())
                continue
            setattr(made.get_submodule(parent), leaf, new)
        return made
