"""A keyword spotter: feature post-processing and a network, saved and exported together."""

from __future__ import annotations

from torch import Tensor, nn

from kestrel.frontend.post import Post
from kestrel.models.network import Network


class KeywordSpotter(nn.Module):
    """Features of the front end [B, T, F] -> logits [B, C].

    `post` holds the fitted post-processing of features, `net` the network.
    """

    def __init__(self, post: Post, net: Network) -> None:
        super().__init__()
        self.post = post
        self.net = net

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, F] -> [B, C]."""
        return self.net(self.post(features))
