"""What the training loop, the scorer and the exporter ask of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from kestrel.errors import unknown
from kestrel.quant.packing import WeightCodes

Phase = Literal["pretrain", "retrain", "eval"]
PHASES = ("pretrain", "retrain", "eval")


@dataclass(frozen=True)
class WeightGroup:
    """A weight tensor as the hardware holds it.

    `name` is its key in the network's state_dict. `tensor` is the effective value (clamped; quantised where the
    network quantises weights). `limit` is the range of its quantiser, None where unbounded; `bits` None = analog.
    `codes`: the integers that it was trained with, where its grid is not that of `limit` and `bits`.
    """

    name: str
    tensor: Tensor
    limit: float | None
    bits: int | None
    codes: WeightCodes | None = None


class Network(nn.Module):
    """A keyword-spotting network: features [B, T, F] -> logits [B, C]."""

    phase: Phase = "pretrain"
    updates_per_epoch: int | None = None  # set by the training loop

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, C]."""
        raise NotImplementedError

    def penalty(self) -> dict[str, Tensor]:
        """Terms added to the loss, by name (scalars, already weighted)."""
        return {}

    def set_phase(self, phase: Phase) -> None:
        """Switch noise, dropout and the like for a phase; also calls train() or eval()."""
        if phase not in PHASES:
            raise unknown("phase", phase, PHASES)
        self.phase = phase
        self.train(phase != "eval")

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        """Inside, evaluation quantises what the device does, also where training did not (static activation ranges)."""
        yield

    def project(self) -> None:
        """Bring parameters back into their bounds; called after each optimiser step."""

    def successor(self, *, to_train: bool = False) -> Network:
        """The network that is deployed, and that a later stage trains: itself, or what a search found in it.

        `to_train`: it is about to be trained, and may be wanted with fresh weights.
        """
        return self

    def structure(self) -> dict[str, Any] | None:
        """Plain data from which `with_structure` makes the network again; None where the settings say it all."""
        return None

    def with_structure(self, structure: Mapping[str, Any]) -> Network:
        """The network of that structure under the same settings, with fresh weights."""
        raise NotImplementedError

    def macs(self, frames: int) -> int:
        """Multiply-adds of one clip of `frames` frames (matrix products; activations and biases not counted)."""
        return sum(int(row["macs"]) for row in self.layer_table(frames))

    def layer_table(self, frames: int) -> list[dict[str, Any]]:
        """One row per layer: name, parameters, macs (of one clip of `frames` frames)."""
        raise NotImplementedError

    def weight_groups(self) -> list[WeightGroup]:
        """The effective weight tensors (detached), for export."""
        raise NotImplementedError
