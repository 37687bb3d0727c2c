"""Networks of the ProxylessNAS space for keyword spotting, and the super-network that holds all of them.

Features [B, T, F] are an image of height F (coefficients) and width T (frames). The super-network shares weights among
networks: each forward pass of training takes one candidate of each block by its chance, evaluation the best network.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.models import search_cost
from kestrel.models.architecture import Architecture, Choice, Family, Pair, family_of, from_data, to_data
from kestrel.models.network import Phase
from kestrel.models.quant_net import FLOAT, LowBitPlan, QuantNet
from kestrel.models.search_cost import Resource
from kestrel.models.search_spec import SearchSpec
from kestrel.nn.channel_major import BatchNorm2d, global_mean, hold_statistics
from kestrel.nn.low_bit import QuantActivation, QuantLinear
from kestrel.nn.mbconv import ConvUnit, Making, MBConv, Residual
from kestrel.nn.mixed_op import MixedBlock
from kestrel.quant.low_bit import Grid

FLOAT_BITS = 32


@dataclass(frozen=True)
class Frame:
    """What every network of a run has in common."""

    input_shape: Pair  # frames, coefficients
    classes: int
    making: Making
    plan: LowBitPlan
    dropout: float = 0.0

    @property
    def size(self) -> Pair:
        """Height and width of the image: coefficients, frames."""
        return self.input_shape[1], self.input_shape[0]


class _Frame(QuantNet):
    """First convolution, blocks (left to subclasses), 1x1 convolution, global mean, linear."""

    def __init__(self, family: Family, frame: Frame) -> None:
        super().__init__(frame.input_shape[1])
        make = frame.making
        self.family, self.frame = family, frame
        self.input = QuantActivation(8, "none", make.ranges)
        first = family.first_layer(frame.size)
        self.first_conv = ConvUnit(1, first.outputs, first.kernel, first.stride, make=make)
        self.blocks = nn.ModuleList()
        mix, linear = family.last_layers((1, 1), frame.classes)
        self.feature_mix = ConvUnit(mix.inputs, mix.outputs, make=make)
        self.mean = QuantActivation(8, "none", make.ranges, signed=False)
        self.dropout = nn.Dropout(frame.dropout) if frame.dropout else nn.Identity()
        self.classifier = QuantLinear(linear.inputs, linear.outputs)
        bound = 1 / math.sqrt(linear.inputs)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def scores(self, x: Tensor) -> Tensor:
        """[B, T, F] -> logits [B, C]."""
        x = self.input(x).transpose(1, 2).unsqueeze(1)  # [B, 1, F, T]
        x = self.first_conv(x)
        for block in self.blocks:
            x = block(x)
        x = self.mean(global_mean(self.feature_mix(x)))  # [B, mix]
        return self.classifier(self.dropout(x))

    def plain(self) -> nn.Module:
        """A copy of plain torch layers with the same products, for tools that know no others."""
        made = super().plain()
        for name, module in list(made.named_modules()):
            if isinstance(module, BatchNorm2d):
                parent, _, leaf = name.rpartition(".")
                new = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
                new.load_state_dict(module.state_dict())
                setattr(made.get_submodule(parent), leaf, new)
        return made


class ProxylessNet(_Frame):
    """One network of the space."""

    def __init__(self, architecture: Architecture, frame: Frame) -> None:
        super().__init__(architecture, frame)
        self.architecture = architecture
        for place, choice in zip(architecture.places(), architecture.choices(), strict=True):
            if choice.skips:
                self.blocks.append(nn.Identity())
                continue
            branch = _branch(place.inputs, place.outputs, choice, place.stride, frame.making)
            self.blocks.append(Residual(branch, frame.making) if place.shortcut else branch)
        self.plan_low_bits(matching(frame.plan, list(self.low_bit_layers())))

    def structure(self) -> dict[str, Any]:
        """Its architecture as plain data."""
        return to_data(self.architecture)

    def with_structure(self, structure: Mapping[str, Any]) -> ProxylessNet:
        """A network of that architecture, with fresh weights."""
        return ProxylessNet(from_data(dict(structure), "architecture"), self.frame)


def _branch(inputs: int, outputs: int, choice: Choice, stride: int, make: Making) -> MBConv:
    return MBConv(inputs, outputs, choice.kernel, choice.expansion, stride, make)


class SuperNet(_Frame):
    """All networks of a family over `kernels` and `expansions`, with chances for the candidates of each block.

    `frame` is that of the super-network, `found_frame` that of the network that it becomes (their plans may differ);
    `inherit` gives that network the weights of the search when it is trained on.
    """

    def __init__(
        self,
        family: Family,
        kernels: list[int],
        expansions: list[int],
        search: SearchSpec,
        frame: Frame,
        found_frame: Frame | None = None,
        inherit: bool = True,
    ) -> None:
        super().__init__(family, frame)
        self.search, self.inherit = search, inherit
        self.found_frame = frame if found_frame is None else found_frame
        self.choices = search_cost.candidates(family, kernels, expansions)
        for place, choices in zip(family.places(), self.choices, strict=True):
            options = [
                None if choice.skips else _branch(place.inputs, place.outputs, choice, place.stride, frame.making)
                for choice in choices
            ]
            self.blocks.append(MixedBlock(options, place.shortcut, frame.making))
        self.plan_low_bits(matching(frame.plan, list(self.low_bit_layers())))
        self._check_patterns()
        self.resources = self._resources()
        self.path_held = False
        with torch.no_grad():
            for alpha in self.alphas():
                ratio = search.arch_init_ratio
                if search.arch_init_type == "normal":
                    alpha.normal_(0.0, ratio)
                else:
                    alpha.uniform_(-ratio, ratio)

    # --------------------------------------------------------------------------------------------------- chances and cost

    def mixed(self) -> list[MixedBlock]:
        """The searchable blocks in order."""
        return [block for block in self.blocks if isinstance(block, MixedBlock)]

    def alphas(self) -> list[nn.Parameter]:
        """The logits of the candidates of each block."""
        return [block.alpha for block in self.mixed()]

    def _resources(self) -> list[Resource]:
        """Multiply-adds and bytes of weights, with the limits of the settings."""
        search, size, classes = self.search, self.frame.size, self.frame.classes
        bits = functools.partial(_bits_of, self.found_frame.plan)
        macs = search_cost.operations(search.flops_rule)
        stored = search_cost.stored_bytes(bits)
        common = (self.family, self.choices, size, classes)
        return [
            search_cost.resource("macs", "multiply-adds", *common, macs, search.budget_macs),
            search_cost.resource("bytes", "bytes of weights", *common, stored, search.budget_bytes),
        ]

    def _check_patterns(self) -> None:
        """Raise UsageError where an exception of the found network's plan can match no layer of it."""
        names = [layer.name for layer in self.family.last_layers((1, 1), 1)] + ["first_conv.conv"]
        for index, (place, choices) in enumerate(zip(self.family.places(), self.choices, strict=True)):
            for choice in choices:
                names += [layer.name for layer in place.layers(choice, (1, 1), place.name(index))]
        for pattern in self.found_frame.plan.layers:
            if not fnmatch.filter(names, pattern):
                shown = ", ".join(dict.fromkeys(names[:8]))
                raise UsageError(f"model.layer_bits: no layer can be called {pattern!r}; names are such as {shown}")

    @torch.no_grad()
    def best_path(self) -> list[int]:
        """The candidates of the largest joint chance within the budget."""
        scores = [torch.log_softmax(alpha.detach().double(), 0).tolist() for alpha in self.alphas()]
        return search_cost.best_choice(scores, self.resources)

    def take(self, path: list[int]) -> None:
        """Let the next forward passes take these candidates."""
        for block, k in zip(self.mixed(), path, strict=True):
            block.taken = k

    def architecture_of(self, path: list[int]) -> Architecture:
        """The network that takes these candidates."""
        blocks = [str(choices[k]) for choices, k in zip(self.choices, path, strict=True)]
        return Architecture(**family_of(self.family), blocks=blocks)

    # ------------------------------------------------------------------------------------------------------------ network

    def set_phase(self, phase: Phase) -> None:
        """Training draws a path for each forward pass; evaluation takes the best one."""
        super().set_phase(phase)
        hold_statistics(self, phase == "eval" and self.search.statistics == "batch")
        if phase == "eval":
            self.take(self.best_path())

    def scores(self, x: Tensor) -> Tensor:
        """[B, T, F] -> logits [B, C]."""
        if self.training and not self.path_held:
            for block in self.mixed():
                block.sample()
        return super().scores(x)

    def successor(self, *, to_train: bool = False) -> ProxylessNet:
        """The best network, with the weights of the search (fresh ones where it is to be trained anew)."""
        path = self.best_path()
        made = ProxylessNet(self.architecture_of(path), self.found_frame)
        if not to_train or self.inherit:
            self._hand_over(made, path)
        return made

    def with_structure(self, structure: Mapping[str, Any]) -> ProxylessNet:
        """The network of that architecture, with fresh weights."""
        return ProxylessNet(from_data(dict(structure), "architecture"), self.found_frame)

    @torch.no_grad()
    def _hand_over(self, made: ProxylessNet, path: list[int]) -> None:
        for name in ("input", "first_conv", "feature_mix", "mean", "classifier"):
            getattr(made, name).load_state_dict(getattr(self, name).state_dict())
        for block, target, k in zip(self.mixed(), made.blocks, path, strict=True):
            if k == len(block.candidates):
                continue
            if isinstance(target, Residual):
                target.branch.load_state_dict(block.candidates[k].state_dict())
                target.act.load_state_dict(block.act.state_dict())
            else:
                target.load_state_dict(block.candidates[k].state_dict())


def grid_of(plan: LowBitPlan, name: str) -> str:
    """The grid of layer `name` under a plan; the last pattern that matches counts."""
    chosen = plan.weights
    for pattern, grid in plan.layers.items():
        chosen = grid if fnmatch.fnmatch(name, pattern) else chosen
    return chosen


def matching(plan: LowBitPlan, names: Sequence[str]) -> LowBitPlan:
    """The plan without exceptions for layers that are not among `names`: a found network may lack a block."""
    return replace(plan, layers={p: grid for p, grid in plan.layers.items() if fnmatch.filter(names, p)})


def _bits_of(plan: LowBitPlan, name: str) -> int:
    """Bits of a layer's weights."""
    grid = grid_of(plan, name)
    return FLOAT_BITS if grid == FLOAT else Grid.named(grid).bits
