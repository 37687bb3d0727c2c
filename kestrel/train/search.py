"""The search of an architecture beside the training of its super-network: updates of alphas on validation batches.

The training loop calls it after every update of the weights. Its state is part of the checkpoint, everything random in
update number n is drawn from generators started from (seed, n), so that a search goes on exactly where it stopped.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kestrel.errors import KestrelError
from kestrel.models.architecture import to_file
from kestrel.models.proxyless import SuperNet
from kestrel.models.search_cost import expected_entropy
from kestrel.nn.channel_major import hold_statistics
from kestrel.nn.mixed_op import alpha_gradient
from kestrel.store.atomic import write_text
from kestrel.train.data import Batch, Split
from kestrel.train.device import seed_generator
from kestrel.train.keeper import Keeper
from kestrel.train.ranks import Ranks
from kestrel.train.search_curves import draw_search

if TYPE_CHECKING:
    from kestrel.models.spotter import KeywordSpotter
    from kestrel.train.loop import Job
    from kestrel.train.validation import Evaluation

ARCHITECTURE, TRACE, PICTURE = "architecture.yaml", "search.csv", "search.png"
_WARMING, _SEARCHING = "warm-up", "search"


def search_of(
    spotter: KeywordSpotter, validation: Split, job: Job, total: int, ranks: Ranks, log: logging.Logger
) -> Search | None:
    """The search that a stage runs beside its training; None where its network is no super-network."""
    return Search(spotter, validation, job, total, ranks, log) if isinstance(spotter.net, SuperNet) else None


class Search:
    """Updates of alphas. `parameters` are the alphas, which the optimiser of the weights must leave alone."""

    def __init__(
        self, spotter: KeywordSpotter, validation: Split, job: Job, total: int, ranks: Ranks, log: logging.Logger
    ) -> None:
        assert isinstance(spotter.net, SuperNet)
        self.spotter, self.net, self.job, self.ranks, self.log = spotter, spotter.net, job, ranks, log
        self.settings = settings = self.net.search
        self.parameters = self.net.alphas()
        self.per_epoch = self.net.updates_per_epoch or 1
        self.warm = settings.warmup_epochs * self.per_epoch  # updates of weights before the search
        self.total = total
        if self.warm + settings.arch_start_epoch * self.per_epoch >= total:
            log.warning(
                "nothing will be searched: model.search.warmup_epochs %d and arch_start_epoch %d take all %.4g passes",
                settings.warmup_epochs, settings.arch_start_epoch, total / self.per_epoch,
            )  # fmt: skip
        size = settings.grad_data_batch or job.train.batch_size
        if settings.arch_algo == "rl":
            size = job.train.eval_batch_size
        self.split = Split(validation.source, batch_size=min(size, len(validation)), training=True, seed=job.seed)
        self.split.to(ranks.device)
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=settings.arch_lr,
            betas=(settings.arch_adam_beta1, settings.arch_adam_beta2),
            eps=settings.arch_adam_eps,
            weight_decay=settings.arch_weight_decay,
        )
        self.done = 0  # updates of alphas
        self.pressure = [0.0 for _ in self.net.resources]  # of the budgets
        self.baseline: float | None = None  # of REINFORCE
        self.history: list[dict[str, Any]] = []

    def mixed(self, validation: Split) -> Split:
        """The validation clips in an order that mixes the classes, the same at every validation."""
        split = Split(validation.source, batch_size=validation.batch_size, training=True, seed=self.job.seed)
        return split.to(self.ranks.device)

    # ------------------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the alphas themselves."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "pressure": list(self.pressure),
            "baseline": self.baseline,
            "history": [dict(row) for row in self.history],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.pressure, self.baseline = state["done"], list(state["pressure"]), state["baseline"]
        self.history = [dict(row) for row in state["history"]]

    # ----------------------------------------------------------------------------------------------------------- updates

    def after_update(self, step: int) -> None:
        """Update the alphas where that is due behind update number `step` (from 1) of the weights."""
        for _ in range(self._due(step)):
            rate = self.rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            seed_generator(self.ranks.device, "architecture", self.job.seed, self.job.stage, self.done)
            batch = self._batch()
            with self._untouched():
                if self.settings.arch_algo == "grad":
                    self._by_gates(batch)
                else:
                    self._by_reward(batch)
            self.done += 1
            self.ranks.equalise(self.parameters)
            if not all(bool(torch.isfinite(alpha).all()) for alpha in self.parameters):
                raise KestrelError(
                    f"the search is not finite after {self.done} updates of alphas: lower model.search.arch_lr or train.lr"
                )

    def _due(self, step: int) -> int:
        settings = self.settings
        epoch, batch = divmod(step - 1 - self.warm, self.per_epoch)
        if step <= self.warm or epoch < settings.arch_start_epoch:
            return 0
        last = batch == self.per_epoch - 1
        if settings.arch_algo == "grad":
            every = min(settings.grad_update_arch_param_every, self.per_epoch)  # at least once in a short pass
            return settings.grad_update_steps if (batch + 1) % every == 0 else 0
        updates = min(settings.rl_update_steps_per_epoch, self.per_epoch)
        if settings.rl_update_per_epoch:
            return updates if last else 0
        return (batch + 1) * updates // self.per_epoch - batch * updates // self.per_epoch

    def rate(self, step: int) -> float:
        """Learning rate of alphas behind update number `step` of the weights."""
        if self.settings.arch_lr_schedule == "constant":
            return self.settings.arch_lr
        share = (step - self.warm) / max(self.total - self.warm, 1)
        return self.settings.arch_lr * (1 + math.cos(math.pi * (1 + share / 2)))

    def _batch(self) -> Batch:
        epoch, number = divmod(self.done, self.split.batches_per_epoch)
        with contextlib.closing(self.split.batches(epoch, number)) as batches:
            return next(batches)

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """Inside, paths are chosen here, and normalisation takes the statistics of the batch and notes nothing."""
        self.net.path_held = True
        hold_statistics(self.net, True)
        try:
            yield
        finally:
            hold_statistics(self.net, False)
            self.net.path_held = False
            for block in self.net.mixed():
                block.release()

    def _by_gates(self, batch: Batch) -> None:
        """One update by gradients through gates (Cai et al. 2019, section 3.2.1)."""
        mode, blocks = self.settings.grad_binary_mode, self.net.mixed()
        among: list[list[int]] = []
        for block in blocks:
            if mode == "two":
                among.append(block.sample_two())
            else:
                block.sample()
                among.append(list(range(len(block))))
            block.watch(mode, among[-1])
        with torch.no_grad():
            features = self.spotter.post(batch.features)
        logits = self.net(features)
        chances = [self._chances(block.alpha, chosen) for block, chosen in zip(blocks, among, strict=True)]
        loss = self.loss(functional.cross_entropy(logits, batch.labels), chances)
        wanted = [*(block.branch for block in blocks), *self.parameters]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        with torch.no_grad():
            for block, chosen, p, to_branch, to_alpha in zip(
                blocks, among, chances, found[: len(blocks)], found[len(blocks) :], strict=True
            ):
                gates = block.gate_gradients(torch.zeros_like(block.branch) if to_branch is None else to_branch)
                through = torch.zeros_like(gates)
                through[chosen] = alpha_gradient(gates[chosen], p.detach()[chosen])
                block.alpha.grad = through if to_alpha is None else through + to_alpha
            before = [alpha.clone() for alpha in self.parameters]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if mode == "two":
                for alpha, old, pair in zip(self.parameters, before, among, strict=True):
                    keep_others(alpha, old, pair)
            self._press()

    @staticmethod
    def _chances(alpha: Tensor, chosen: list[int]) -> Tensor:
        """Chances among the candidates `chosen`, [N]; 0 for the others."""
        if len(chosen) == len(alpha):
            return torch.softmax(alpha, 0)
        return torch.zeros_like(alpha).index_put((torch.tensor(chosen),), torch.softmax(alpha[chosen], 0))

    def loss(self, cross_entropy: Tensor, chances: list[Tensor]) -> Tensor:
        """Cross-entropy together with expected costs: by target_hardware, and by the pressure of exceeded budgets."""
        settings, loss = self.settings, cross_entropy
        macs, stored = self.net.resources
        targets = []
        if settings.target_hardware in ("flops", "both"):
            targets.append((macs.expected(chances), settings.flops_ref_value))
        if settings.target_hardware in ("mem", "both"):
            targets.append((stored.expected(chances), settings.mem_ref_value))
        if targets and settings.grad_reg_loss_type == "mul#log":
            loss = settings.grad_reg_loss_alpha * loss
        for expected, reference in targets:
            if settings.grad_reg_loss_type == "mul#log":
                loss = loss * (expected.log() / math.log(reference)) ** settings.grad_reg_loss_beta
            else:
                loss = loss + settings.grad_reg_loss_lambda * (expected - reference) / reference
        for each, pressure in zip(self.net.resources, self.pressure, strict=True):
            if each.limit is not None and pressure > 0:
                loss = loss + pressure * (each.expected(chances) / each.limit).log()
        return loss

    @torch.no_grad()
    def _press(self) -> None:
        """Raise the pressure of budgets that the expected cost exceeds, lower that of others (dual ascent)."""
        chances = [block.chances() for block in self.net.mixed()]
        for place, each in enumerate(self.net.resources):
            if each.limit is not None:
                over = math.log(float(each.expected(chances)) / each.limit)
                self.pressure[place] = max(0.0, self.pressure[place] + self.settings.budget_rate * over)

    def _by_reward(self, batch: Batch) -> None:
        """One update by REINFORCE: rewards of sampled networks against a running baseline."""
        settings, blocks = self.settings, self.net.mixed()
        paths, rewards = [], []
        with torch.no_grad():
            features = self.spotter.post(batch.features)
            for _ in range(settings.rl_batch_size):
                for block in blocks:
                    block.sample()
                path = [block.taken for block in blocks]
                right = float((self.net(features).argmax(1) == batch.labels).float().mean())
                paths.append(path)
                rewards.append(self._reward(right, path))
        mean = sum(rewards) / len(rewards)
        if self.baseline is None:
            self.baseline = mean
        else:
            self.baseline += settings.rl_baseline_decay_weight * (mean - self.baseline)
        surrogate = torch.zeros((), device=self.ranks.device)
        for path, reward in zip(paths, rewards, strict=True):
            for alpha, k in zip(self.parameters, path, strict=True):
                surrogate = surrogate - (reward - self.baseline) * torch.log_softmax(alpha, 0)[k]
        surrogate = surrogate / len(paths)
        for each, pressure in zip(self.net.resources, self.pressure, strict=True):
            if each.limit is not None and pressure > 0:
                expected = each.expected([torch.softmax(alpha, 0) for alpha in self.parameters])
                surrogate = surrogate + pressure * (expected / each.limit).log()
        for alpha, grad in zip(self.parameters, torch.autograd.grad(surrogate, self.parameters), strict=True):
            alpha.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._press()

    def _reward(self, right: float, path: list[int]) -> float:
        settings = self.settings
        macs, stored = self.net.resources
        reward = right
        if settings.target_hardware in ("flops", "both"):
            reward *= (settings.flops_ref_value / macs.of(path)) ** settings.rl_tradeoff_ratio
        if settings.target_hardware in ("mem", "both"):
            reward *= (settings.mem_ref_value / stored.of(path)) ** settings.rl_tradeoff_ratio
        return reward

    # ------------------------------------------------------------------------------------------------------------ report

    def record(self, step: int, found: Evaluation, keeper: Keeper | None) -> None:
        """Note entropy, expected cost and the best network at a validation; log them, write their files."""
        chances = [block.chances().detach().double() for block in self.net.mixed()]
        path = self.net.best_path()
        macs, stored = self.net.resources
        architecture = self.net.architecture_of(path)
        row: dict[str, Any] = {
            "step": step,
            "epoch": round(step / self.per_epoch, 4),
            "phase": _WARMING if step <= self.warm else _SEARCHING,
            "updates": self.done,
            "entropy": expected_entropy(chances),
            "expected_macs": float(macs.expected(chances)),
            "expected_bytes": float(stored.expected(chances)),
            "macs": macs.of(path),
            "bytes": stored.of(path),
            "pressure_macs": self.pressure[0],
            "pressure_bytes": self.pressure[1],
            "validation_accuracy": found.accuracy,
            "blocks": architecture.text,
        }
        self.history.append(row)
        if keeper is None:
            return
        folder = self.job.out_dir
        keeper.attempt(TRACE, lambda: write_text(folder / TRACE, trace_text(self.history)))
        remarks = [
            f"Found by a search: step {step:,}, {row['macs']:,} multiply-adds, {row['bytes']:,} bytes of weights.",
            f"For features of {self.net.frame.input_shape[0]} frames x {self.net.frame.input_shape[1]} coefficients.",
        ]
        keeper.attempt(ARCHITECTURE, lambda: write_text(folder / ARCHITECTURE, to_file(architecture, remarks)))
        self.log.info(
            "%s: entropy %.3f nats per block, expected %.3f M multiply-adds, %.1f kB; best %s (%.3f M, %.1f kB)",
            row["phase"], row["entropy"], row["expected_macs"] / 1e6, row["expected_bytes"] / 1e3,
            row["blocks"], row["macs"] / 1e6, row["bytes"] / 1e3,
        )  # fmt: skip

    def draw(self, keeper: Keeper) -> None:
        """Draw the choice of each block over time and the traces of cost and entropy."""
        limits = [each.limit for each in self.net.resources]
        keeper.attempt(PICTURE, lambda: draw_search(self.job.out_dir / PICTURE, self.history, limits))


def keep_others(alpha: Tensor, before: Tensor, pair: list[int]) -> None:
    """Behind an update of two candidates: restore the other alphas, and shift the two so that their joint chance stays.

    `alpha` [N] is changed in place, `before` holds it as it was.
    """
    shift = torch.logsumexp(alpha[pair], 0) - torch.logsumexp(before[pair], 0)
    updated = alpha[pair] - shift
    alpha.copy_(before)
    alpha[pair] = updated


def trace_text(history: list[dict[str, Any]]) -> str:
    """The rows of a search as CSV; costs per clip, entropies in nats per block."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]) if history else ["step"], lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()
