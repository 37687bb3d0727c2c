"""Training in several processes (torchrun): gradients summed over processes, files written by the first one alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kestrel.errors import KestrelError

T = TypeVar("T")


class Ranks:
    """The processes of this run; a context that joins the group torchrun describes. Alone, everything is a no-op."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.world > 1 else 0
        self._joined = False

    @property
    def first(self) -> bool:
        """Whether this is the process that validates and writes."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # Default arguments of this module hold the group of the moment it is first imported, as optimisers do later: the
            # group would outlive its destruction, and its threads, at the end of Python, now and then abort the process.
            importlib.import_module("torch.distributed.nn.functional")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self._joined = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    def on_first(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process; its result, or its KestrelError, reaches all of them."""
        if self.world == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except KestrelError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.world == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)

    def sum_gradients(self, parameters: list[Tensor], values: Tensor) -> Tensor:
        """Sum the gradients over the processes, in place, and return the sum of `values` [K].

        One message carries everything. A parameter without a gradient in all processes keeps none.
        """
        if self.world == 1:
            return values
        present = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        packed = torch.cat([values.float(), present.float(), *(gradient.float().flatten() for gradient in gradients)])
        dist.all_reduce(packed)
        sizes = [len(values), len(parameters), *(gradient.numel() for gradient in gradients)]
        summed, held, *parts = packed.split(sizes)
        for parameter, part, count in zip(parameters, parts, held.tolist(), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype) if count else None
        return summed
