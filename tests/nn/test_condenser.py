"""Attention condensers: every part of them does something, in full precision and quantised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kestrel.nn.condenser import Attend, Condenser, HardGate, Making, Multiplied, Shift, Strength
from kestrel.nn.low_bit import LowBit, QuantActivation

LOOKS = (-1, 1)
MAKES = {"hard": Making(), "sigmoid": Making(gate="sigmoid"), "no norm": Making(norm=False)}


def image(seed: int = 0) -> Tensor:
    return torch.rand(4, 6, 8, 4, generator=torch.Generator().manual_seed(seed))


def condenser(make: Making, dense: bool = False) -> Condenser:
    torch.manual_seed(1)
    made = Condenser(6, 12, 4, None if dense else 8, (2, 2), make)
    made.train()
    for seed in range(20):  # running statistics, and ranges
        made(image(seed))
    return made.eval()


def quantised(made: Condenser) -> Condenser:
    for module in made.modules():
        if isinstance(module, LowBit):
            module.set_grid("4bitsym", per_output=True)
            module.quantised = True
        elif isinstance(module, QuantActivation):
            module.quantised = True
    return made


def gradients(made: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    made.zero_grad()
    made(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**found, "input": x.grad}


class _WithoutSkip(nn.Module):
    """The attention alone, S A."""

    def __init__(self, strength: Strength) -> None:
        super().__init__()
        self.scale = strength.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def _set(name: str, make: Callable[[Condenser], nn.Module]) -> Callable[[Condenser], None]:
    return lambda made: setattr(made, name, make(made))


def _no_strength(made: Condenser) -> None:
    with torch.no_grad():
        made.strength.scale.zero_()


REMOVALS: dict[str, Callable[[Condenser], None]] = {
    # without condensation every second place is taken instead of the largest of four
    "condensation": _set("condense", lambda _: nn.AvgPool2d(1, 2)),
    "embedding": _set("embed", lambda made: _First(4)),
    "expansion": _set("expand", lambda made: _Tiled(6)),
    "attention": _no_strength,
    "skip": _set("strength", lambda made: _WithoutSkip(made.strength)),
}


class _First(nn.Module):
    """The first channels as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.channels]


class _Tiled(nn.Module):
    """Channels repeated as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[:, : self.channels]


@pytest.mark.parametrize("low_bit", [False, True], ids=["float", "4bitsym"])
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("part", REMOVALS)
def test_removing_a_part_changes_outputs_and_gradients(part: str, make: str, low_bit: bool) -> None:
    whole, cut = condenser(MAKES[make]), condenser(MAKES[make])
    REMOVALS[part](cut)
    if low_bit:
        whole, cut = quantised(whole), quantised(cut)
    x = image(77)
    with torch.no_grad():
        y, other = whole(x), cut(x)
    assert (y - other).abs().mean() > 0.02 * y.abs().mean()
    before, after = gradients(whole, x), gradients(cut, x)
    assert (before["input"] - after["input"]).abs().mean() > 0.01 * before["input"].abs().mean()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("make", MAKES)
def test_every_parameter_learns(make: str, dense: bool) -> None:
    made = condenser(MAKES[make], dense)
    made.train()
    found = gradients(made, image(5))
    names = {name for name, _ in made.named_parameters()}
    assert names <= set(found)
    assert all(bool(found[name].abs().sum() > 0) for name in names)
    assert "strength.scale" in names


def test_the_hard_gate_is_one_shift_and_one_addition() -> None:
    x = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0])
    assert HardGate()(x).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_attend_is_unpooling_and_a_product() -> None:
    v, a = torch.randn(3, 5, 6, 8), torch.randn(3, 5, 3, 2)
    wanted = v * nn.functional.interpolate(a, scale_factor=(2, 4), mode="nearest")
    assert torch.equal(Attend((2, 4))(v, a), wanted)


def test_the_projection_commutes_with_unpooling() -> None:
    """What allows the expansion to be computed on the condensed map."""
    torch.manual_seed(0)
    k, project = torch.randn(2, 4, 3, 2), nn.Conv2d(4, 6, 1)
    up = nn.Upsample(scale_factor=2)
    assert torch.allclose(project(up(k)), up(project(k)), atol=1e-6)


def test_multiplied_channels_rise_and_fall() -> None:
    made = Multiplied(3, 2, Making(norm=False))
    x = torch.rand(1, 3, 2, 2)
    y = made(x)
    assert torch.allclose(y[:, :3], x)
    assert torch.allclose(y[:, 3:], torch.relu(1 - x))
    assert sum(p.numel() for p in made.unit.conv.parameters() if p.dim() > 1) == 6  # one weight for each output


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("frames", [-9, -4, -1, 0, 2, 5])
def test_a_shifted_image_is_read_frame_by_frame(frames: int, batch_last: bool) -> None:
    x = torch.randn(3, 2, 4, 5)
    laid = (x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) if batch_last else x.clone()).requires_grad_()
    y = Shift(frames)(laid)
    weight = torch.randn(3, 2, 4, 5)
    (y * weight).sum().backward()
    wanted, gradient = torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 5)
    for frame in range(4):
        if 0 <= frame + frames < 4:
            wanted[:, :, frame] = x[:, :, frame + frames]
            gradient[:, :, frame + frames] = weight[:, :, frame]
    assert torch.equal(y, wanted)
    assert laid.grad is not None and torch.equal(laid.grad, gradient)


def test_copies_are_taken_from_neighbouring_frames() -> None:
    torch.manual_seed(0)
    plain, looking = Multiplied(3, 4, Making(norm=False)), Multiplied(3, 4, Making(norm=False), LOOKS)
    looking.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 6, 2)
    before, behind = plain(Shift(-1)(x)), plain(Shift(1)(x))
    assert torch.equal(looking(x), torch.cat([before[:, :3], behind[:, 3:6], before[:, 6:9], behind[:, 9:]], 1))


@pytest.mark.parametrize(("looks", "reach"), [((0,), 1), ((0, 1), 3), ((-1, 1), 5), ((2,), 1)])
def test_a_condenser_sees_as_far_as_its_looks(looks: tuple[int, ...], reach: int) -> None:
    """Condensed frames that the seventh of twelve changes, through two depthwise layers."""
    torch.manual_seed(0)
    made = Condenser(6, 12, 8, 16, (2, 1), Making(), looks).train()
    made(torch.randn(64, 6, 24, 2).relu())
    made.eval()
    x = torch.randn(64, 6, 24, 2).relu()
    moved = x.clone()
    moved[:, :, 12:14] += 1
    made.attend = _Factors()  # type: ignore[assignment]
    changed = (made(moved) != made(x)).any(dim=1).any(dim=0).any(dim=1)
    at = {6 - first - second for first in looks for second in looks}
    assert [frame for frame in range(12) if changed[frame]] == sorted(at) and max(at) - min(at) + 1 == reach


class _Factors(nn.Module):
    """The factors alone, without V."""

    def forward(self, v: Tensor, factors: Tensor) -> Tensor:
        return factors
