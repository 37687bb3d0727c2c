"""The plain network that found ones are compared with."""

from __future__ import annotations

import torch

from kestrel.frontend.post import Post
from kestrel.lower.spotter import LOGITS, lower
from kestrel.models.spotter import KeywordSpotter
from kestrel.models.tc_resnet import TcResNet8
from kestrel.recipe import proxylessnas_kws as recipe
from kestrel.settings import build


def test_size_and_integer_form() -> None:
    torch.manual_seed(0)
    net = recipe.build(build(recipe.ModelSpec, {"net": "tc-resnet8"}), (98, 40), 12)
    assert isinstance(net, TcResNet8)
    assert net.macs(98) == 1_522_560
    assert 64_000 < sum(parameter.numel() for parameter in net.parameters()) < 66_000
    net.set_phase("pretrain")
    x = torch.randn(16, 98, 40)
    net(x).square().mean().backward()
    net.set_phase("eval")
    graph = lower(KeywordSpotter(Post([], (98, 40)), net), 2.0**-12)
    codes = graph.run((x / 2.0**-12).round().numpy().astype("int16"))[LOGITS]
    with torch.no_grad():
        real = net(x)
    step = graph.tensors[LOGITS].scale
    assert step is not None
    assert (torch.from_numpy(codes * step) - real).abs().max() < 0.1 * real.abs().max()
