"""Crossbar product: forward against naive loops, gradients against their equations, noise."""

from __future__ import annotations

import pytest
import torch

from kestrel.errors import UsageError
from kestrel.nn.crossbar import Device, crossbar, draw_noise


def problem(dtype=torch.float32, scale: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((2, 4, 5), (2, 5, 3), (2, 3))
    )
    return x, weight * scale, bias * 2


def naive(x, weight, bias, max_w: float, max_b: float, level) -> torch.Tensor:
    y = torch.empty(x.shape[0], x.shape[1], weight.shape[2], dtype=x.dtype)
    for n in range(y.shape[0]):
        for b in range(y.shape[1]):
            for o in range(y.shape[2]):
                total = level(min(max(bias[n, o].item(), -max_b), max_b), max_b)
                for i in range(x.shape[2]):
                    total += x[n, b, i].item() * level(min(max(weight[n, i, o].item(), -max_w), max_w), max_w)
                y[n, b, o] = total
    return y


def test_forward_analog() -> None:
    x, weight, bias = problem(torch.float64)
    expected = naive(x, weight, bias, 0.2, 1.2, lambda value, _: value)
    torch.testing.assert_close(crossbar(x, weight, bias, Device(0.2, 6)), expected)


@pytest.mark.parametrize("weight_range", ["real", "paper"])
def test_forward_quantised(weight_range) -> None:
    def level(value: float, limit: float) -> float:
        limit = limit if weight_range == "real" else 1.0
        return limit * max(-7, min(7, round(value / limit * 8))) / 8

    x, weight, bias = problem(torch.float64)
    expected = naive(x, weight, bias, 0.2, 1.2, level)
    torch.testing.assert_close(crossbar(x, weight, bias, Device(0.2, 6, 4, weight_range)), expected)


def test_the_real_range_uses_all_levels() -> None:
    weight, bias = torch.linspace(-0.2, 0.2, 1001).view(1, -1, 1), torch.zeros(1, 1)
    assert len(Device(bits=4).stored(weight, bias)[0].unique()) == 15
    assert len(Device(bits=4, weight_range="paper").stored(weight, bias)[0].unique()) == 5


def test_gradients() -> None:
    """dx uses clamped, unquantised, noise-free weights; dW and db are not masked by the clamp."""
    x, weight, bias = (tensor.requires_grad_() for tensor in problem(torch.float64, scale=1.0))
    device = Device(0.2, 6, 4)
    grad = torch.randn(2, 4, 3, dtype=torch.float64)
    crossbar(x, weight, bias, device, draw_noise(weight, bias, 0.1)).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.detach().clamp(-0.2, 0.2).transpose(1, 2))
    torch.testing.assert_close(weight.grad, x.detach().transpose(1, 2) @ grad)
    torch.testing.assert_close(bias.grad, grad.sum(1))


def test_gradcheck_inside_the_clamp() -> None:
    x, weight, bias = problem(torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, weight.clamp(-0.19, 0.19), bias.clamp(-1.1, 1.1)))
    assert torch.autograd.gradcheck(lambda *args: crossbar(*args, Device(0.2, 6)), inputs)


def test_noise_is_fresh_and_has_the_deviation() -> None:
    weight, bias = torch.zeros(4, 100, 100), torch.zeros(4, 100)
    torch.manual_seed(0)
    first, second = draw_noise(weight, bias, 0.02), draw_noise(weight, bias, 0.02)
    assert not torch.equal(first[0], second[0])
    assert first[0].std().item() == pytest.approx(0.02, rel=0.02)
    assert first[1].std().item() == pytest.approx(0.02, rel=0.15)
    x = torch.ones(4, 1, 100)
    y = crossbar(x, weight, bias, Device(), first)
    torch.testing.assert_close(y, first[0].sum(1, keepdim=True) + first[1].unsqueeze(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_operators_agree() -> None:
    x, weight, bias = problem()
    traced = torch.jit.trace(lambda v: crossbar(v, weight, bias, Device(bits=4)), (x,))
    torch.testing.assert_close(traced(x), crossbar(x, weight, bias, Device(bits=4)))


def test_projection() -> None:
    _, weight, bias = problem(scale=5.0)
    device = Device(0.2, 6)
    device.project(weight, bias)
    assert weight.abs().max() <= 0.2
    assert bias.abs().max() <= 1.2
    assert weight.abs().max() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_w": 0}, "max_w"),
        ({"max_w": float("nan")}, "max_w"),
        ({"rows_bias": -1}, "rows_bias"),
        ({"bits": 20}, "quant_w"),
        ({"weight_range": "full"}, "weight_range"),
    ],
)
def test_wrong_devices(settings, field: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.{field}: "):
        Device(**settings)
