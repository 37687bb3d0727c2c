"""Magnitude pruning: which weights go, on which schedule, and that masks stay."""

from __future__ import annotations

import pytest
import torch

from kestrel.nn.low_bit import QuantConv2d
from kestrel.nn.pruning import Pruner, magnitude_mask, share_at


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 0.999])
def test_the_smallest_magnitudes_go(share: float) -> None:
    w = torch.randn(6, 5, 3, 3)
    keep = magnitude_mask(w, share)
    assert int((~keep).sum()) == min(int(share * w.numel() + 1e-9), w.numel() - 1)
    if not keep.all():
        assert w[keep].abs().min() >= w[~keep].abs().max()


def test_channels_go_whole_by_their_sum() -> None:
    w = torch.ones(4, 3, 1, 1) * torch.tensor([3.0, -1.0, 2.0, 0.5]).view(4, 1, 1, 1)
    keep = magnitude_mask(w, 0.5, "channel")
    assert keep.shape == (4, 1, 1, 1)
    assert keep.flatten().tolist() == [True, False, True, False]
    assert magnitude_mask(w, 0.999, "channel").sum() == 1


def test_equal_magnitudes_go_in_their_order() -> None:
    assert magnitude_mask(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]


def test_the_schedule_is_cubic() -> None:
    assert [share_at(0.8, p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])


def test_masks_grow_then_hold() -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(4, 8, 3)
    pruner = Pruner({"layer": layer}, 0.75)
    found = []
    for progress in (0.0, 0.3, 0.7):
        pruner.update(progress)
        found.append(pruner.sparsity()["layer"])
        with torch.no_grad():
            layer.weight.add_(0.01 * torch.randn_like(layer.weight))
    assert found == sorted(found)
    assert 0 == found[0] < found[2] < 0.75
    pruner.update(1.0)
    assert layer.mask is not None
    held = layer.mask.clone()
    with torch.no_grad():
        layer.weight.normal_()
    pruner.update(1.0)
    assert torch.equal(layer.mask, held)
    assert pruner.sparsity()["layer"] == pytest.approx(0.75)
    assert bool((layer.effective_weight()[~held] == 0).all())


def test_evaluation_sees_the_final_share_without_changing_training() -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(4, 8, 3)
    pruner = Pruner({"layer": layer}, 0.5)
    pruner.update(0.1)
    assert layer.mask is not None
    before = layer.mask.clone()
    pruner.preview(True)
    assert float((layer.effective_weight() == 0).float().mean()) == pytest.approx(0.5)
    assert torch.equal(layer.mask, before)
    pruner.preview(False)
    assert float((layer.effective_weight() == 0).float().mean()) == pytest.approx(1 - float(before.float().mean()))
