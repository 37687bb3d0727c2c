"""Gradients of gates and of alphas against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kestrel.nn.channel_major import hold_statistics
from kestrel.nn.mbconv import Making, MBConv
from kestrel.nn.mixed_op import MixedBlock, alpha_gradient

MAKE = Making()
SKIP = 3


def _block(shortcut: bool = True) -> MixedBlock:
    torch.manual_seed(0)
    options: list[MBConv | None] = [MBConv(4, 4, k, e, 1, MAKE) for k, e in ((3, 1), (5, 2), (7, 1))]
    block = MixedBlock([*options, None] if shortcut else options, shortcut, MAKE).double()
    with torch.no_grad():
        block.alpha.normal_()
    block.train()
    hold_statistics(block, True)
    return block


def _loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sin().sum()


def _brute_force(block: MixedBlock, x: Tensor) -> Tensor:
    """dL/dg with all gates in the graph."""
    gates = torch.zeros(len(block), dtype=x.dtype)
    gates[block.taken] = 1
    gates.requires_grad_()
    given = [candidate(x) for candidate in block.candidates]
    if block.skips:
        given.append(torch.zeros_like(x))
    mixed = sum(gate * each for gate, each in zip(gates, given, strict=True))
    return torch.autograd.grad(_loss(x + mixed if block.shortcut else mixed), gates)[0]


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("mode", ["full", "full_v2"])
@pytest.mark.parametrize("taken", [0, 1, SKIP])
def test_gate_gradients_are_those_of_brute_force(mode: str, taken: int, shortcut: bool) -> None:
    if taken == SKIP and not shortcut:
        return
    block = _block(shortcut)
    block.taken = taken
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    wanted = _brute_force(block, x)
    block.watch(mode, range(len(block)))  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(_loss(block(x)), [block.branch])
    torch.testing.assert_close(block.gate_gradients(grad), wanted)
    if taken != SKIP:
        assert wanted.abs().min() == 0 or not shortcut  # to skip gives zero
    assert wanted[:3].abs().min() > 1e-6  # candidates that were not taken learn, also where the block was skipped


def test_the_watch_changes_no_result() -> None:
    block = _block()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for taken in (1, SKIP):
        block.taken = taken
        plain = block(x)
        block.watch("full_v2", range(len(block)))
        assert torch.equal(block(x), plain)
        block.release()


def test_alpha_gradient_is_the_jacobian_of_the_softmax() -> None:
    alpha = torch.randn(6, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(6, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((torch.softmax(alpha, 0) * gates).sum(), alpha)
    torch.testing.assert_close(alpha_gradient(gates, torch.softmax(alpha.detach(), 0)), wanted)


def test_statistics_are_untouched_by_candidates_that_are_not_taken() -> None:
    block = _block()
    hold_statistics(block, False)
    block.taken = 1
    before = {key: value.clone() for key, value in block.state_dict().items() if "running" in key or "tracked" in key}
    block(torch.randn(3, 4, 5, 6, dtype=torch.float64))
    changed = {key for key, value in before.items() if not torch.equal(block.state_dict()[key], value)}
    assert changed
    assert all(key.startswith("candidates.1.") for key in changed)


def test_samples_follow_the_chances() -> None:
    block = _block()
    torch.manual_seed(3)
    counts = torch.zeros(len(block))
    for _ in range(4000):
        block.sample()
        counts[block.taken] += 1
    assert (counts / 4000 - block.chances().float()).abs().max() < 0.03
    pairs = [block.sample_two() for _ in range(50)]
    assert all(len(set(pair)) == 2 for pair in pairs)
