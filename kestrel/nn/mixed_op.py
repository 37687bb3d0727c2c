"""A block of a super-network: several candidates, of which each forward pass takes one (ProxylessNAS, Cai et al. 2019).

Candidates have logits alpha; p = softmax(alpha) is the chance of each to be taken. The gradient of alpha comes from
gates g, 1 for the candidate that is taken and 0 for the others: with the block's branch sum_k g_k o_k(x),

    dL/dg_k = sum(o_k(x) * dL/dbranch)          dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i)

which needs what the other candidates would have given, o_k(x), but no gradient through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kestrel.nn.low_bit import QuantActivation
from kestrel.nn.mbconv import Making, MBConv

Mode = Literal["full_v2", "full", "two"]


class MixedBlock(nn.Module):
    """Candidates for one block, with a shortcut around them where it has one; one may be None, which gives zero.

    `alpha` [N] are the logits, `taken` the candidate that the next forward pass takes. Between `watch` and `gate_gradients`
    the block notes what it needs for the gradients of its gates.
    """

    def __init__(self, candidates: Sequence[MBConv | None], shortcut: bool, make: Making) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(candidate for candidate in candidates if candidate is not None)
        self.skips = len(self.candidates) < len(candidates)  # the last candidate is to leave the block out
        if self.skips and (candidates[-1] is not None or not shortcut):
            raise ValueError("only the last candidate may be none, and it needs a shortcut")
        self.shortcut = shortcut
        self.alpha = nn.Parameter(torch.zeros(len(candidates)))
        self.act = QuantActivation(make.act_bits, "none", make.ranges) if shortcut else nn.Identity()
        self.taken = 0
        self._watched: Mode | None = None
        self._among: list[int] = []
        self._input: Tensor | None = None
        self._branch: Tensor | None = None
        self._others: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.alpha)

    def chances(self) -> Tensor:
        """p = softmax(alpha), [N]."""
        return torch.softmax(self.alpha, 0)

    @torch.no_grad()
    def sample(self) -> None:
        """Draw the candidate to take from torch's generator."""
        self.taken = int(torch.multinomial(self.chances().cpu(), 1))

    @torch.no_grad()
    def sample_two(self) -> list[int]:
        """Draw two different candidates, and take one of them by their chances among the two; returns them."""
        pair = torch.multinomial(self.chances().cpu(), 2).tolist()
        self.taken = pair[int(torch.multinomial(torch.softmax(self.alpha[pair], 0).cpu(), 1))]
        return pair

    @property
    def best(self) -> int:
        """The candidate of the largest alpha."""
        return int(self.alpha.argmax())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, h, w]."""
        if self._watched is not None:
            branch = self._watch(x)
        elif self.taken == len(self.candidates):
            return x
        else:
            branch = self.candidates[self.taken](x)
        return self.act(x + branch) if self.shortcut else branch

    # ------------------------------------------------------------------------------------------------ gradients of alpha

    def watch(self, mode: Mode, among: Sequence[int]) -> None:
        """Note, in the next forward pass, what the gates of the candidates `among` need.

        Mode `full` computes all of them at once and keeps what they give; `full_v2` and `two` compute the others later, from
        the input, and keep nothing of them.
        """
        self._watched, self._among = mode, list(among)

    def _watch(self, x: Tensor) -> Tensor:
        self._input = x.detach()
        if self.taken == len(self.candidates):
            self._branch = torch.zeros_like(x, requires_grad=True)  # a leaf: its gradient is that of the block's result
        else:
            self._branch = self.candidates[self.taken](x)
        if self._watched == "full":
            with torch.no_grad():
                self._others = {k: self.candidates[k](self._input) for k in self._among if self._needed(k)}
        return self._branch

    def _needed(self, k: int) -> bool:
        return k != self.taken and k < len(self.candidates)

    @property
    def branch(self) -> Tensor:
        """The watched branch, whose gradient `gate_gradients` takes."""
        assert self._branch is not None, "watch the block, then run the network"
        return self._branch

    @torch.no_grad()
    def gate_gradients(self, grad: Tensor) -> Tensor:
        """dL/dg [N] from dL/dbranch; 0 for candidates that were not watched. Ends the watch."""
        assert self._input is not None
        found = torch.zeros_like(self.alpha)
        for k in self._among:
            if k == self.taken and k < len(self.candidates):
                given = self.branch.detach()
            elif self._needed(k):
                given = self._others[k] if self._watched == "full" else self.candidates[k](self._input)
            else:
                continue  # leaving the block out gives zero
            found[k] = (given * grad).sum()
        self.release()
        return found

    def release(self) -> None:
        """Forget what was watched."""
        self._watched, self._among, self._input, self._branch, self._others = None, [], None, None, {}


def alpha_gradient(gates: Tensor, chances: Tensor) -> Tensor:
    """dL/dalpha [N] from dL/dg [N] and p [N]: the Jacobian of the softmax, p_i (dL/dg_i - sum_j p_j dL/dg_j)."""
    return chances * (gates - (chances * gates).sum())
