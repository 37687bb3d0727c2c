"""Optimisers: which parameters decay, and networks of which a step trains a part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kestrel.train.optimizer import make_optimizer, undecayed
from kestrel.train.spec import PhaseSpec

CPU = torch.device("cpu")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("keys", "spared"),
    [("none", []), ("bn", ["1.weight", "1.bias"]), ("bn#bias", ["0.bias", "1.weight", "1.bias", "2.bias"])],
)
def test_no_decay_keys(keys: str, spared: list[str]) -> None:
    net = _net()
    phase = PhaseSpec(steps=1, optimizer="sgd", lr=[0.1], weight_decay=0.5, no_decay_keys=keys)  # type: ignore[arg-type]
    optimizer = make_optimizer(phase, list(net.parameters()), CPU, undecayed(net, phase))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        factor = 1.0 if name in spared else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_nesterov_is_that_of_torch_where_a_step_trains_a_part() -> None:
    ours, theirs = _net(), _net()
    phase = PhaseSpec(steps=1, optimizer="sgd", lr=[0.1], nesterov=True, weight_decay=0.01)
    mine = make_optimizer(phase, list(ours.parameters()), CPU)
    other = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=True)
    for step in range(4):
        for net, optimizer in ((ours, mine), (theirs, other)):
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=True)
            x = torch.randn(8, 3)
            (net(x) if step % 2 else net[0](x)).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
