"""Settings of an architecture search (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kestrel.settings import setting


@dataclass
class SearchSpec:
    """How a super-network is searched; names of the original command line where it has them."""

    arch_algo: Literal["grad", "rl"] = setting("grad", "gradients through gates, or REINFORCE")
    warmup_epochs: int = setting(40, "first passes, which train weights alone", min=0)
    arch_start_epoch: int = setting(1, "passes behind the warm-up that still train weights alone", min=0)
    arch_init_type: Literal["normal", "uniform"] = setting("normal", "initial alphas: normal, or uniform around 0")
    arch_init_ratio: float = setting(1e-3, "standard deviation, or largest magnitude, of initial alphas", min=0)
    arch_lr: float = setting(1e-3, "learning rate of alphas", min=0)
    arch_lr_schedule: Literal["rising", "constant"] = setting("rising", "from 0 to arch_lr along a cosine, or constant")
    arch_adam_beta1: float = setting(0.0, "decay of Adam's mean gradient", min=0, max=0.9999)
    arch_adam_beta2: float = setting(0.999, "decay of Adam's mean squared gradient", min=0, max=0.9999)
    arch_adam_eps: float = setting(1e-8, "epsilon of Adam", min=0)
    arch_weight_decay: float = setting(0.0, "weight decay of alphas", min=0)
    target_hardware: Literal["none", "flops", "mem", "both"] = setting(
        "none", "cost in the loss: none, multiply-adds, bytes of weights, or both"
    )
    flops_ref_value: float = setting(100e6, "reference of multiply-adds", min=2)
    mem_ref_value: float = setting(1000e3, "reference of bytes", min=2)
    flops_rule: Literal["exact", "floor"] = setting("exact", "how multiply-adds are counted; floor as in the original")
    grad_update_arch_param_every: int = setting(5, "batches between updates of alphas", min=1)
    grad_update_steps: int = setting(1, "updates of alphas at a time", min=1, max=100)
    grad_binary_mode: Literal["full_v2", "full", "two"] = setting(
        "full_v2", "candidates whose gates get a gradient: all (full keeps all results in memory), or two"
    )
    grad_data_batch: int | None = setting(None, "validation clips of an update; null = train.batch_size", min=2)
    grad_reg_loss_type: Literal["mul#log", "add#linear"] = setting(
        "mul#log", "alpha CE (ln E / ln ref)^beta, or CE + lambda (E - ref) / ref"
    )
    grad_reg_loss_lambda: float = setting(0.1, "lambda of add#linear", min=0)
    grad_reg_loss_alpha: float = setting(0.2, "alpha of mul#log", min=0)
    grad_reg_loss_beta: float = setting(0.3, "beta of mul#log")
    budget_macs: int | None = setting(None, "most multiply-adds of the network that is found; null = no limit", min=1)
    budget_bytes: int | None = setting(None, "most bytes of its weights; null = no limit", min=1)
    budget_rate: float = setting(0.05, "how fast the pressure of a budget grows while it is exceeded", min=0)
    rl_batch_size: int = setting(10, "networks sampled for an update", min=1)
    rl_update_per_epoch: bool = setting(False, "all updates at the end of each pass")
    rl_update_steps_per_epoch: int = setting(300, "updates of alphas in a pass, at most one per batch", min=1)
    rl_baseline_decay_weight: float = setting(0.99, "step of the baseline towards the mean reward", min=0, max=1)
    rl_tradeoff_ratio: float = setting(0.1, "reward: accuracy (ref / cost)^ratio", min=0)
    statistics: Literal["batch", "running"] = setting(
        "batch", "batch normalisation in validation of the super-network: of the batch, as in the original, or running"
    )
