"""Column-balanced targeted dropout (CBTD): pruning that leaves every processing element the same work (Spartus 2022).

A weight matrix of R rows is spread over `pes` processing elements: element p holds rows p, p + pes, p + 2 pes, ... In
each column of each of these sub-matrices (L = R / pes weights) the floor(gamma L) smallest magnitudes are targets, and
each target is zeroed with probability alpha. With alpha = 1 every element keeps L - floor(gamma L) weights in every column.

As an option whole groups of contiguous rows are kept or dropped together, by the sum of their magnitudes, which suits
vector units; rows then count in groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.store.hashing import sha256_json

_NAME = "_packed_"  # a mask's buffer is called so, before the name of its weight with dots replaced


@dataclass(frozen=True)
class Balance:
    """What is pruned of a matrix: share `gamma`, over `pes` processing elements, in groups of `group` contiguous rows."""

    gamma: float
    pes: int = 16
    group: int = 1

    def check(self, rows: int, name: str) -> None:
        """Raises UsageError unless `rows` rows can be spread evenly."""
        if not 0 <= self.gamma < 1:
            raise UsageError(f"gamma of {name}: {self.gamma} is out of bounds (0..1, without 1)")
        if rows % (self.pes * self.group):
            raise UsageError(
                f"{name} has {rows} rows, which cannot be spread over model.num_array_pe = {self.pes} processing "
                f"elements in groups of model.cbtd_group = {self.group}: choose divisors of {rows}"
            )

    def local(self, rows: int) -> int:
        """L: (groups of) rows of a processing element."""
        return rows // (self.pes * self.group)

    def dropped(self, rows: int) -> int:
        """floor(gamma L); a product that is whole but for rounding counts as whole."""
        return math.floor(self.gamma * self.local(rows) + 1e-9)

    def kept(self, rows: int) -> int:
        """Weights (groups) that each processing element keeps in each column."""
        return self.local(rows) - self.dropped(rows)


def target_mask(weight: Tensor, balance: Balance, name: str = "weight") -> Tensor:
    """True where a weight [R, C] is kept, False at the targets. Equal magnitudes: the first rows are targets."""
    rows, columns = weight.shape
    balance.check(rows, name)
    magnitude = weight.detach().abs().view(-1, balance.group, columns).sum(1)  # [R / group, C]
    local = magnitude.view(-1, balance.pes, columns)  # [L, pes, C]: row l * pes + p belongs to element p
    order = local.sort(dim=0, stable=True).indices
    keep = torch.ones_like(local, dtype=torch.bool)
    keep.scatter_(0, order[: balance.dropped(rows)], False)
    return keep.view(-1, 1, columns).expand(-1, balance.group, -1).reshape(rows, columns)


def work_per_element(weight: Tensor, balance: Balance) -> Tensor:
    """Weights that are not zero, for each processing element and column, [pes, C] (groups count as their rows)."""
    return (weight != 0).view(-1, balance.pes, balance.group, weight.shape[1]).sum((0, 2))


def pack_mask(mask: Tensor) -> Tensor:
    """A bool tensor as bits, uint8, least significant bit first."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)
    return (padded << torch.arange(8, device=mask.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack_mask`."""
    bits = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


def _buffer(name: str) -> str:
    return _NAME + name.replace(".", "__")


class Pruner(nn.Module):
    """CBTD of some weights of a network over a training stage.

    Every `interval` updates the targets are found anew and each is zeroed with probability alpha, which grows linearly
    from 0 to 1 over `anneal` intervals (the original's min(epoch / (epochs - 1), 1)); until then weights may regrow. Once
    alpha is 1 the masks hold: what is pruned stays zero in this stage and the next. Evaluation always uses fully pruned
    weights, so that a checkpoint is chosen by what will be exported.

    Masks, the number of updates and whether masks hold are buffers. What is drawn depends on a key made at the start and
    on the number of updates alone, so that a resumed training and parallel processes draw the same.
    """

    updates: Tensor
    held: Tensor
    key: Tensor

    def __init__(self, network: nn.Module, plan: dict[str, Balance]) -> None:
        """`plan`: parameter name -> what is pruned of it. Raises UsageError where rows cannot be spread evenly."""
        super().__init__()
        weights = dict(network.named_parameters())
        for name, balance in plan.items():
            balance.check(weights[name].shape[0], name)
            self.register_buffer(_buffer(name), pack_mask(torch.ones_like(weights[name], dtype=torch.bool)))
        self.plan = plan
        self._unpacked: dict[str, tuple[tuple[int, int], Tensor]] = {}
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("held", torch.zeros((), dtype=torch.bool))
        self.register_buffer("key", torch.randint(2**62, ()))

    def mask(self, name: str, shape: torch.Size) -> Tensor:
        """The mask in force of a weight, bool."""
        packed = getattr(self, _buffer(name))
        version = packed.data_ptr(), packed._version
        known = self._unpacked.get(name)
        if known is None or known[0] != version:
            known = self._unpacked[name] = version, unpack_mask(packed, shape)
        return known[1]

    def masks(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """All masks as numbers 0 and 1, by parameter name."""
        return {name: self.mask(name, weights[name].shape).to(weights[name].dtype) for name in self.plan}

    @torch.no_grad()
    def find(self, weights: dict[str, Tensor]) -> None:
        """Find the targets in the weights as they are, unless the masks hold."""
        if bool(self.held):
            return
        for name, balance in self.plan.items():
            getattr(self, _buffer(name)).copy_(pack_mask(target_mask(weights[name], balance, name)))

    @torch.no_grad()
    def hold(self, weights: dict[str, Tensor]) -> None:
        """Prune fully and keep it so. Asserts the same number of weights in every element and column."""
        self.find(weights)
        self.held.fill_(True)
        self.apply_masks(weights)

    @torch.no_grad()
    def apply_masks(self, weights: dict[str, Tensor]) -> None:
        """Zero what the masks drop."""
        for name, balance in self.plan.items():
            weight = weights[name]
            mask = self.mask(name, weight.shape)
            assert_balanced(mask, balance, name)
            weight.mul_(mask)

    def alpha(self, interval: int, anneal: int) -> float:
        """Probability with which targets are zeroed after the updates made so far."""
        rounds = int(self.updates) // interval - 1  # the first round has number 0
        return 1.0 if anneal <= 1 else min(max(rounds, 0) / (anneal - 1), 1.0)

    @torch.no_grad()
    def after_update(self, weights: dict[str, Tensor], interval: int, anneal: int) -> None:
        """To be called after each optimiser step: prune where a round is due."""
        self.updates += 1
        if bool(self.held):
            for name in self.plan:
                weights[name].mul_(self.mask(name, weights[name].shape))
            return
        if int(self.updates) % interval:
            return
        alpha = self.alpha(interval, anneal)
        if alpha >= 1:
            self.hold(weights)
            return
        self.find(weights)
        for name in self.plan:
            weight = weights[name]
            seed = int(sha256_json(["cbtd", int(self.key), int(self.updates), name])[:15], 16)
            draws = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
            weight.masked_fill_(~self.mask(name, weight.shape) & (draws < alpha), 0.0)

    def restart(self) -> None:
        """Begin a stage: updates count from 0; masks that hold go on."""
        self.updates.zero_()


def assert_balanced(mask: Tensor, balance: Balance, name: str) -> None:
    """Raises AssertionError unless each processing element keeps the same number of weights in each column."""
    work = work_per_element(mask, balance)
    wanted = balance.kept(mask.shape[0]) * balance.group
    assert bool((work == wanted).all()), f"{name}: processing elements keep {work.min()}..{work.max()}, not {wanted}"


def weight_sparsity(weights: dict[str, Tensor]) -> dict[str, float]:
    """Share of zeros of each weight matrix, and of all together under `all`; vectors (biases) are left out."""
    matrices = {name: weight for name, weight in weights.items() if weight.dim() > 1}
    found = {name: float((weight == 0).double().mean()) for name, weight in matrices.items()}
    zeros = sum(int((weight == 0).sum()) for weight in matrices.values())
    elements = sum(weight.numel() for weight in matrices.values())
    return found | {"all": zeros / elements if elements else 0.0}
