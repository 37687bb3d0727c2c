"""AdaBound: Adam whose step sizes end up between two bounds that close in on SGD (Luo et al., ICLR 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdaBound(torch.optim.Optimizer):
    """Step t of an element: step size = lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps), clipped to

        final (1 - 1 / (gamma t + 1))  ..  final (1 + 1 / (gamma t)),     final = final_lr * lr / (first lr)

    m and v are Adam's means of gradients and of their squares; the element moves by -(step size) m.

    Args:
        lr: learning rate; where it is changed later, the bounds change with it.
        final_lr: step size of the SGD at the end. gamma: how fast bounds close.
        weight_decay: added to the gradient, times the weight.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "final_lr": final_lr, "gamma": gamma, "eps": eps}
        super().__init__(params, settings | {"weight_decay": weight_decay, "first_lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (b1, b2) = state["step"], group["betas"]
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        mean = state["mean"].mul_(b1).add_(gradient, alpha=1 - b1)
        square = state["square"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        size = group["lr"] * math.sqrt(1 - b2**step) / (1 - b1**step)
        final = group["final_lr"] * (group["lr"] / group["first_lr"] if group["first_lr"] else 0.0)
        low = final * (1 - 1 / (group["gamma"] * step + 1))
        high = final * (1 + 1 / (group["gamma"] * step))
        sizes = (size / square.sqrt().add_(group["eps"])).clamp_(low, high)
        parameter.addcmul_(sizes, mean, value=-1.0)
