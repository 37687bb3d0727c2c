"""Layers of few bits: what quantised weights and activations compute, and what their gradients are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.nn.low_bit import LowBit, QuantActivation, QuantConv2d, QuantLinear


def layers() -> list[tuple[LowBit, nn.Module, Tensor]]:
    """(quantised layer, plain layer of the same weights, input)."""
    torch.manual_seed(0)
    conv, linear = QuantConv2d(3, 8, 3, stride=2, padding=1, bias=False), QuantLinear(6, 4)
    plain_conv, plain_linear = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.Linear(6, 4)
    plain_conv.load_state_dict({"weight": conv.weight})
    plain_linear.load_state_dict({"weight": linear.weight, "bias": linear.bias})
    return [(conv, plain_conv, torch.randn(2, 3, 7, 9)), (linear, plain_linear, torch.randn(5, 6))]


def test_off_they_are_the_plain_layers() -> None:
    for layer, plain, x in layers():
        layer.set_grid("ternary")
        assert torch.equal(layer(x), plain(x))  # type: ignore[operator]
        assert layer.weight_codes() is None


@pytest.mark.parametrize("grid", ["8bit", "4bitsym", "ternary", "binary", "fp130", "dorefa2"])
def test_on_they_compute_with_code_times_step(grid: str) -> None:
    for layer, plain, x in layers():
        layer.set_grid(grid, per_output=True)
        layer.quantised = True
        codes = layer.weight_codes()
        assert codes is not None
        with torch.no_grad():
            plain.weight.copy_(torch.from_numpy(codes.decode()))  # type: ignore[operator, union-attr]
        assert torch.equal(layer(x), plain(x))  # type: ignore[operator]
        layer(x).square().sum().backward()  # type: ignore[operator]
        assert bool((layer.weight.grad != 0).all())  # straight through, also for weights of one level


def test_the_step_follows_the_weights_in_training_and_rests_in_evaluation() -> None:
    (layer, _, x), *_ = layers()
    layer.set_grid("4bit")
    layer.quantised = True
    before = layer.weight_step.clone()
    with torch.no_grad():
        layer.weight.mul_(3)
    layer.train(False)  # type: ignore[attr-defined]
    layer(x)  # type: ignore[operator]
    assert torch.equal(layer.weight_step, before)
    layer.train(True)  # type: ignore[attr-defined]
    layer(x)  # type: ignore[operator]
    assert torch.allclose(layer.weight_step, 3 * before)


def test_masks_act_in_both_modes_and_persist() -> None:
    (layer, _, x), *_ = layers()
    layer.set_grid("4bitsym")
    layer.add_mask()
    layer.set_mask(torch.arange(8).view(8, 1, 1, 1) != 2)
    for layer.quantised in (False, True):
        y = layer(x)  # type: ignore[operator]
        assert not y[:, 2].any()
        assert y[:, 3].any()
    other = QuantConv2d(3, 8, 3, stride=2, padding=1, bias=False)
    other.add_mask()
    other.load_state_dict(layer.state_dict())  # type: ignore[attr-defined]
    assert torch.equal(other.mask, layer.mask)  # type: ignore[arg-type]
    codes = layer.weight_codes()
    assert codes is not None
    assert not codes.codes[2].any()


# --------------------------------------------------------------------------------------------------------- activations


def quantiser(largest: float, **settings: object) -> QuantActivation:
    made = QuantActivation(**settings)  # type: ignore[arg-type]
    made.largest.fill_(largest)
    made.quantised = True
    made.begin()
    return made


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({}, -127, 127),
        ({"activation": "relu"}, 0, 127),
        ({"bits": 4}, -7, 7),
        ({"bits": 4, "activation": "relu"}, 0, 15),
        ({"bits": 2, "activation": "relu"}, 0, 3),
        ({"activation": "relu6"}, 0, 127),
    ],
)
def test_codes_fill_their_range(settings: dict, low: int, high: int) -> None:
    act = quantiser(3.0, **settings).eval()
    step = float(act.step())
    assert step == pytest.approx(3.0 / high, rel=1e-4)
    y = act(torch.linspace(-9, 9, 4001))
    codes = y / step
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert (round(float(codes.min())), round(float(codes.max()))) == (low, high)
    assert act.limits(step) == (low, high)


def test_relu6_stops_at_six() -> None:
    act = quantiser(20.0, activation="relu6").eval()
    y = act(torch.linspace(-9, 90, 1001))
    assert float(y.max()) == pytest.approx(6, abs=float(act.step()))
    assert act.limits(float(act.step()))[1] == round(6 / float(act.step()))


def test_rounding_is_half_to_even() -> None:
    act = QuantActivation(fixed=0.5)
    act.quantised = True
    assert act(torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75])).tolist() == [0.0, 1.0, 1.0, 0.0, -1.0]


def test_the_step_is_not_taken_from_the_clip_at_hand() -> None:
    act = quantiser(2.0).eval()
    loud, quiet = torch.randn(1, 50), 0.01 * torch.randn(1, 50)
    together = act(torch.cat([loud, quiet]))
    assert torch.equal(together[1:], act(quiet))


@pytest.mark.parametrize("ranges", ["learned", "ema", "max"])
def test_ranges_are_noted_in_training_alone(ranges: str) -> None:
    act = QuantActivation(ranges=ranges)  # type: ignore[arg-type]
    x = torch.tensor([1.0, -4.0])
    assert torch.equal(act(x), x)
    assert float(act.largest) == 4
    act(2 * x)
    grown = float(act.largest)
    assert grown == 8 if ranges == "max" else 4 < grown < 8
    act.eval()
    act(100 * x)
    assert float(act.largest) == grown


@pytest.mark.parametrize("ranges", ["learned", "ema"])
def test_power_of_two_steps_hold_the_range(ranges: str) -> None:
    act = quantiser(2.5, ranges=ranges, power_of_two=True)
    assert float(act.step().detach()) == 2.0**-5  # 2.5 / 127 = 2^-5.67


def test_gradients_of_a_learned_step_against_differences() -> None:
    """LSQ: the gradient of the step is that of the rounded value with its rounding error held."""
    act = quantiser(1.0, ranges="learned", bits=4)
    x = (torch.randn(400) * 0.5).double().requires_grad_()
    act.double()
    weight = torch.randn(400).double()
    (act(x) * weight).sum().backward()
    step = float(act.step().detach())
    scaled = x.detach() / step
    inside = scaled.abs() <= 7
    assert torch.equal(x.grad, weight * inside)
    codes = scaled.clamp(-7, 7).round()
    to_step = (weight * torch.where(inside, codes - scaled, codes)).sum()
    factor = 1 / (1 * 7) ** 0.5  # per value of a clip
    assert float(act.log2_step.grad) == pytest.approx(float(to_step) * step * 0.6931471805599453 * factor, rel=1e-3)


def test_a_learned_range_grows_where_values_are_clipped() -> None:
    act = quantiser(0.5, ranges="learned", bits=3)
    x = torch.linspace(-2, 2, 101)
    optimizer = torch.optim.Adam([act.log2_step], 0.05)
    before = float(act.step().detach())
    for _ in range(200):
        optimizer.zero_grad()
        (act(x) - x).square().sum().backward()
        optimizer.step()
    assert float(act.step().detach()) > 2 * before


def test_bits_are_bounded() -> None:
    with pytest.raises(UsageError, match=r"choose 2\.\.8"):
        QuantActivation(9)
