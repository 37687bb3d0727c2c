"""Networks of the ProxylessNAS space in integers: the fake-quant network, code for code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lower_kit import CLASSES, FEATURE_SCALE, FRAMES, WIDTH, codes_of, features
from quant_kit import trained

from kestrel.frontend.post import Post
from kestrel.lower.spotter import LOGITS, lower
from kestrel.models.proxyless import SuperNet
from kestrel.models.spotter import KeywordSpotter
from kestrel.recipe import proxylessnas_kws as recipe
from kestrel.settings import build

SMALL = {"width_mult": 0.2, "width_mix": 72, "n_cell_stages": [3], "kernels": [3, 7], "expansions": [1, 2]}


@pytest.mark.parametrize(
    "settings", [{}, {"weight_bits": 2, "weight_quantiser": "symmetric"}, {"weight_quantiser": "dorefa"}]
)
def test_a_given_network(settings: dict) -> None:
    torch.manual_seed(1)
    model = build(recipe.ModelSpec, {**SMALL, "act_bits": 8, "blocks": "7e2 Z 3e1", **settings})
    _agrees(trained(recipe.build(model, (FRAMES, WIDTH), CLASSES), "pretrain"))  # type: ignore[arg-type]


def test_a_found_network() -> None:
    torch.manual_seed(1)
    net = recipe.build(build(recipe.ModelSpec, {**SMALL, "act_bits": 8}), (FRAMES, WIDTH), CLASSES)
    assert isinstance(net, SuperNet)
    found = trained(net, "pretrain").successor(to_train=True)  # type: ignore[attr-defined]
    _agrees(trained(found, "retrain"))


def _agrees(net: torch.nn.Module) -> None:
    graph = lower(KeywordSpotter(Post([], (FRAMES, WIDTH)), net), FEATURE_SCALE)  # type: ignore[arg-type]
    x = features(6, 300)
    codes = graph.run(codes_of(graph, x))[LOGITS]
    step = graph.tensors[LOGITS].scale
    assert step is not None
    with torch.no_grad():
        real = net.double()((x / FEATURE_SCALE).round().double() * FEATURE_SCALE).numpy()
    assert (np.abs(codes * step - real).max(1) > 4 * step).mean() <= 0.05
    assert (codes.argmax(1) == real.argmax(1)).mean() >= 0.99
