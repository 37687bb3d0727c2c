"""Deviations of one manufactured chip: programming noise of its devices and the curves of its converters.

They are drawn once and stay, unlike the read noise, which every product draws afresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kestrel.errors import UsageError
from kestrel.store.hashing import sha256_json

Draw = Literal["column", "chip", "fixed"]
DRAWS: tuple[Draw, ...] = ("column", "chip", "fixed")


@dataclass(frozen=True)
class Deviations:
    """How far chips deviate; all zero is the ideal chip.

    `noise_program`: standard deviation of each stored weight, as a fraction of max_w. The converters (ADC) of crossbar
    outputs read v as v (1 + gain) + offset + bow (1 - (v / a)^2) with the range a: `adc_gain` is relative, `adc_offset`
    and `adc_inl` (the bow's peak, in the middle of the range) count steps of the converter (LSB).
    `adc_draw`: these three are standard deviations drawn for every converter column (`column`) or for the one converter
    that all columns of a chip share (`chip`), or they are the values themselves, equal everywhere (`fixed`).
    """

    noise_program: float = 0.0
    adc_offset: float = 0.0
    adc_gain: float = 0.0
    adc_inl: float = 0.0
    adc_draw: Draw = "column"

    def __post_init__(self) -> None:
        if not self.noise_program >= 0:
            raise UsageError(f"model.noise_program: {self.noise_program} is out of bounds (>= 0)")
        if self.adc_draw not in DRAWS:
            raise UsageError(f"model.adc_draw: {self.adc_draw!r}; choose {', '.join(DRAWS)}")

    @property
    def converters(self) -> bool:
        """Whether converters deviate."""
        return bool(self.adc_offset or self.adc_gain or self.adc_inl)

    @property
    def any(self) -> bool:
        """Whether anything deviates."""
        return self.noise_program > 0 or self.converters

    def figures(self) -> dict[str, float | str]:
        """The strengths that are not zero, by name; with `adc_draw` where converters deviate."""
        found = {key: value for key, value in dataclasses.asdict(self).items() if key != "adc_draw" and value}
        return {**found, **({"adc_draw": self.adc_draw} if self.converters else {})}


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, converter, limit, bits):
        return converter(v, limit, bits)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


@dataclass(frozen=True)
class Converter:
    """The curves of N x O converters: `factor`, `offset` and `bow`, each [N, O]; offset and bow in steps (LSB)."""

    factor: Tensor
    offset: Tensor
    bow: Tensor

    def coefficients(self, limit: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """(f, o, c) [N, O] of the curve v f + o - min(|v|, a)^2 c for converters of `bits` over +-a = `limit` [N]."""
        step = (limit / 2 ** (bits - 1)).unsqueeze(1)
        return self.factor, (self.offset + self.bow) * step, self.bow * step / limit.square().unsqueeze(1)

    def __call__(self, v: Tensor, limit: Tensor, bits: int) -> Tensor:
        """v [N, B, O] as the converters read it, without the straight-through gradient of `read`."""
        factor, offset, bow = (part.unsqueeze(1) for part in self.coefficients(limit, bits))
        inside = torch.minimum(v.abs(), limit.view(-1, 1, 1))
        return (v * factor + offset) - inside * inside * bow

    def read(self, v: Tensor, limit: Tensor, bits: int) -> Tensor:
        """v [N, B, O] as the converters read it; the gradient passes unchanged, as it passes a quantiser."""
        return _Read.apply(v, self, limit.detach(), bits)


@dataclass(frozen=True)
class Part:
    """What deviates in one product: weights [N, I, O] and biases [N, O] are off by `program`, outputs by `converter`."""

    program: tuple[Tensor, Tensor] | None = None
    converter: Converter | None = None


Chip = Mapping[str, Part]
IDEAL = Part()


def draw_chip(
    deviations: Deviations, products: Mapping[str, tuple[Tensor, Tensor]], max_w: float, key: int
) -> dict[str, Part]:
    """The chip that `key` stands for; `products` names (weights, biases) of each product.

    Every draw has a generator of its own, so that strengths change a chip in size and never in kind.
    """

    def normal(name: str, what: str, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(sha256_json(["chip", key, name, what])[:15], 16))
        return torch.randn(*shape, generator=generator)

    def curve(name: str, what: str, strength: float, like: Tensor) -> Tensor:
        if deviations.adc_draw == "fixed":
            return torch.full_like(like, strength)
        if deviations.adc_draw == "chip":
            return torch.full_like(like, strength * float(normal("all", what, 1)))
        return strength * normal(name, what, *like.shape).to(like)

    parts = {}
    for name, (weight, bias) in products.items():
        program = converter = None
        if deviations.noise_program > 0:
            deviation = deviations.noise_program * max_w
            program = tuple(
                deviation * normal(name, what, *tensor.shape).to(tensor)
                for what, tensor in (("weights", weight), ("biases", bias))
            )
        if deviations.converters:
            converter = Converter(
                1 + curve(name, "gain", deviations.adc_gain, bias.detach()),
                curve(name, "offset", deviations.adc_offset, bias.detach()),
                curve(name, "bow", deviations.adc_inl, bias.detach()),
            )
        parts[name] = Part(program, converter)  # type: ignore[arg-type]
    return parts
