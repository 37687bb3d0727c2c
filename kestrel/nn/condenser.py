"""Attention condensers (Wong et al., TinySpeech, arXiv 2008.04245) and the hard gate that hardware computes without tables."""

from __future__ import annotations

from torch import Tensor, nn


class HardGate(nn.Module):
    """clip(x / 4 + 1 / 2, 0, 1): a sigmoid of one shift, one addition and a clamp."""

    slope, offset = 0.25, 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return (x * self.slope + self.offset).clamp(0, 1)
