"""AdaBound against its equations, and what its bounds do."""

from __future__ import annotations

import math

import torch

from kestrel.train.adabound import AdaBound


def naive(start: float, gradients: list[float], lr: float, final_lr: float, gamma: float, decay: float) -> list[float]:
    x, m, v, found = start, 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        g = g + decay * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        size = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) / (math.sqrt(v) + 1e-8)
        size = min(max(size, final_lr * (1 - 1 / (gamma * t + 1))), final_lr * (1 + 1 / (gamma * t)))
        x -= size * m
        found.append(x)
    return found


def made(start: float, gradients: list[float], lr: float, final_lr: float, gamma: float, decay: float) -> list[float]:
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = AdaBound([parameter], lr=lr, final_lr=final_lr, gamma=gamma, weight_decay=decay)
    found = []
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        found.append(float(parameter.detach()))
    return found


def test_equations() -> None:
    gradients = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for settings in ((1e-3, 0.1, 1e-3, 0.0), (0.02, 0.1, 0.05, 0.1), (1.0, 0.01, 0.5, 0.0)):
        torch.testing.assert_close(made(0.3, gradients, *settings), naive(0.3, gradients, *settings))


def test_bounds_end_at_sgd() -> None:
    """With bounds that are closed the step is final_lr times the mean gradient, however large gradients are."""
    moves = [made(0.0, [g] * 3000, 1e-3, 0.1, 100.0, 0.0) for g in (1.0, 100.0)]
    for move, gradient in zip(moves, (1.0, 100.0), strict=True):
        assert math.isclose(move[-2] - move[-1], 0.1 * gradient, rel_tol=1e-3)
