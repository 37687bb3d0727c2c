"""Magnitude pruning with masks that are kept: of single weights or of whole output channels, on a schedule.

Masks are buffers of the layers themselves (kestrel.nn.low_bit), so checkpoints, quantisation and export see them. While
a schedule runs, masks are found anew from the magnitudes (weights may return); once it has ended they hold for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kestrel.nn.low_bit import LowBit

Unit = Literal["weight", "channel"]


def magnitude_mask(weight: Tensor, share: float, unit: Unit = "weight") -> Tensor:
    """True where `weight` [out, ...] is kept: all but the floor(share n) smallest magnitudes, equal ones in their order.

    Unit channel: outputs by the sum of their magnitudes, a mask [out, 1, ...]; at least one is kept.
    """
    magnitude = weight.detach().abs()
    if unit == "channel":
        magnitude = magnitude.flatten(1).sum(1)
    flat = magnitude.flatten()
    dropped = min(int(share * flat.numel() + 1e-9), flat.numel() - 1)
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.sort(stable=True).indices[:dropped]] = False
    return keep.view(-1, *(1 for _ in weight.shape[1:])) if unit == "channel" else keep.view(weight.shape)


def share_at(target: float, progress: float) -> float:
    """The pruned share at `progress` 0..1 of a schedule: fast at first, then ever slower (Zhu and Gupta 2017)."""
    return target * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


class Pruner(nn.Module):
    """Prunes layers of a network to a share of their weights or channels.

    `held` (a buffer): the schedule has ended, masks stay as they are.
    """

    held: Tensor

    def __init__(self, layers: Mapping[str, LowBit], share: float, unit: Unit = "weight") -> None:
        super().__init__()
        self.share, self.unit = share, unit
        self._layers = dict(layers)  # a plain dictionary: they are modules of the network already
        self.register_buffer("held", torch.zeros((), dtype=torch.bool))
        for layer in self._layers.values():
            layer.add_mask()

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Find the masks for `progress` 0..1 of the schedule, unless they hold; at 1 they do from now on."""
        if bool(self.held):
            return
        share = share_at(self.share, progress)
        for layer in self._layers.values():
            layer.set_mask(magnitude_mask(layer.weight, share, self.unit))
        if progress >= 1:
            self.held.fill_(True)

    @torch.no_grad()
    def preview(self, on: bool) -> None:
        """Evaluate as if the schedule had ended, without touching the masks of training; `on` False ends that."""
        for layer in self._layers.values():
            wanted = on and not bool(self.held)
            layer.previewed = magnitude_mask(layer.weight, self.share, self.unit) if wanted else None

    def sparsity(self) -> dict[str, float]:
        """Share of weights that the masks in force drop, by layer."""
        return {name: 1 - float(layer.mask_in_force().double().mean()) for name, layer in self._layers.items()}  # type: ignore[union-attr]
