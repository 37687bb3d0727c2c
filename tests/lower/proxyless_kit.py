"""Small networks of the ProxylessNAS space, trained for a few steps."""

from __future__ import annotations

from typing import Any

import torch
from lower_kit import CLASSES, FRAMES, WIDTH
from quant_kit import trained

from kestrel.models.proxyless import SuperNet
from kestrel.models.quant_net import QuantNet
from kestrel.recipe import proxylessnas_kws as recipe
from kestrel.settings import build

SMALL = {
    "width_mult": 0.2,
    "width_mix": 72,
    "n_cell_stages": [3],
    "kernels": [3, 7],
    "expansions": [1, 2],
    "act_bits": 8,
}


def given(steps: int = 12, **settings: Any) -> QuantNet:
    """A network with a block that is skipped, or the one that the settings name."""
    torch.manual_seed(1)
    chosen = {} if "net" in settings else {"blocks": "7e2 Z 3e1"}
    net = recipe.build(build(recipe.ModelSpec, {**SMALL, **chosen, **settings}), (FRAMES, WIDTH), CLASSES)
    return trained(net, "pretrain", steps)


def found(steps: int = 12, **settings: Any) -> QuantNet:
    """What a super-network hands on, trained further with quantised activations."""
    torch.manual_seed(1)
    net = recipe.build(build(recipe.ModelSpec, {**SMALL, **settings}), (FRAMES, WIDTH), CLASSES)
    assert isinstance(net, SuperNet)
    searched = trained(net, "pretrain", steps)
    assert isinstance(searched, SuperNet)
    return trained(searched.successor(to_train=True), "retrain", steps)
