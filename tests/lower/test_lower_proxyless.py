"""Networks of the ProxylessNAS space in integers: the fake-quant network, code for code."""

from __future__ import annotations

import numpy as np
import proxyless_kit
import pytest
import torch
from lower_kit import FEATURE_SCALE, FRAMES, WIDTH, codes_of, features

from kestrel.frontend.post import Post
from kestrel.lower.spotter import LOGITS, lower
from kestrel.models.spotter import KeywordSpotter


@pytest.mark.parametrize(
    "settings", [{}, {"weight_bits": 2, "weight_quantiser": "symmetric"}, {"weight_quantiser": "dorefa"}]
)
def test_a_given_network(settings: dict) -> None:
    _agrees(proxyless_kit.given(**settings))


def test_a_found_network() -> None:
    _agrees(proxyless_kit.found())


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
