"""The quantised LSTM in C++ (kestrel/nn/csrc/quant_lstm.cpp), loaded through a plain C interface.

It computes what `plain_lstm` computes, forward and backward, several times faster on a CPU. KESTREL_NATIVE=0 turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kestrel.errors import KestrelError
from kestrel.nn import build
from kestrel.nn.cell import RANGES, ROW, Cell
from kestrel.quant.quantiser import round_to_level

_LOG = logging.getLogger("kestrel")
_MAX_KEPT_BUFFERS = 4  # of one size; more forward passes are rarely alive at a time
_ALIGNMENT = 64  # bytes of a cache line
_CHUNK = 2  # time steps whose weight gradients are summed by one matrix product


class Problem(ctypes.Structure):
    """Mirrors `struct Problem` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("blocks", "batch", "steps", "input", "hidden", "chunk")),
        *((name, ctypes.c_int64) for name in ("slices", "last_slices")),
        *((name, ctypes.c_int64) for name in ("inp_bits", "mvm_bits", "nm_bits", "keep")),
        ("noise", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "back_ih", "back_hh", "ranges")),
        *((name, ctypes.c_void_p) for name in ("tables", "adc", "saved", "scratch", "h", "grad_h")),
        *((name, ctypes.c_void_p) for name in ("d_ih", "d_hh", "db_ih", "db_hh", "d_ranges", "d_x")),
    ]


def open_library(path: Path) -> ctypes.CDLL:
    """Load a built library and declare its functions. Raises OSError."""
    library = ctypes.CDLL(str(path))
    problem = ctypes.POINTER(Problem)
    for name in ("saved_bytes", "scratch_bytes"):
        function = getattr(library, f"kestrel_{name}")
        function.argtypes, function.restype = [problem], ctypes.c_int64
    for name in ("forward", "backward"):
        function = getattr(library, f"kestrel_{name}")
        function.argtypes, function.restype = [problem], None
    library.kestrel_noise.argtypes = [problem, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.kestrel_noise.restype = None
    for name in ("depthwise", "depthwise_to_image", "depthwise_to_kernel"):
        function = getattr(library, f"kestrel_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p] * 4, None
    return library


@functools.cache
def _load() -> ctypes.CDLL | None:
    path = build.find()
    if path is None:
        _LOG.info(
            "the native kernels are not built: using the slower PyTorch path (python -m kestrel.nn.build builds it)"
        )
        return None
    try:
        return open_library(path)
    except OSError as error:
        _LOG.warning("cannot load the native kernels (%s): using the slower PyTorch path", error)
        return None


def kernels() -> ctypes.CDLL:
    """The loaded library. Raises KestrelError where it is not built."""
    loaded = _load()
    if loaded is None:
        raise KestrelError("the native kernels are not built: run python -m kestrel.nn.build")
    return loaded


def available() -> bool:
    """Whether the native path is built and not turned off."""
    return os.environ.get("KESTREL_NATIVE", "1") != "0" and _load() is not None


class _Buffer:
    """Memory that goes back to a pool when its last user is gone: fresh memory would cost a page fault per 4 KiB."""

    _free: ClassVar[defaultdict[int, list[Tensor]]] = defaultdict(list)

    def __init__(self, size: int) -> None:
        self.size = size
        free = self._free[size]
        self.memory = free.pop() if free else torch.empty(size + _ALIGNMENT, dtype=torch.uint8)

    @property
    def pointer(self) -> int:
        address = self.memory.data_ptr()
        return address + -address % _ALIGNMENT

    def __del__(self) -> None:
        free = self._free[self.size]
        if len(free) < _MAX_KEPT_BUFFERS:
            free.append(self.memory)


def slices_of(blocks: int, batch: int) -> tuple[int, int]:
    """Slices of the batch per block, and of the last block: at least four tasks, of 8 to 128 clips each.

    An odd block is halved, so that two threads finish together, while the others stay whole: every slice streams the
    weights of its block again. It must not depend on the number of threads, or else the order of sums would.
    """
    each, last = {1: (4, 4), 2: (2, 2)}.get(blocks, (1, 1 + blocks % 2))
    whole = max(1, min(each, batch // 8), math.ceil(batch / 128))
    return whole, whole if last == each or batch < 16 else 2 * whole


def _tables(cell: Cell) -> Tensor:
    """Quantised value and derivative of the activations for every code, [5, N, 2^nm, 2].

    Order as `enum Table` in the source: sigmoid f, sigmoid i, tanh j, sigmoid o, tanh c. Where the range clips the value,
    the derivative is -1, which no activation has.
    """
    bits = cell.bits.nm
    if bits is None:
        return torch.empty(0)
    half = 2 ** (bits - 1)
    codes = torch.arange(-half, half, dtype=torch.float32) * (1 / half)
    gates, state = (codes * cell.ranges[ROW[name]].view(-1, 1) for name in ("a14", "a9"))  # [N, 2^nm]
    sigmoid, tanh, shown = torch.sigmoid(gates), torch.tanh(gates), torch.tanh(state)
    plain = torch.stack([sigmoid, sigmoid, tanh, sigmoid, shown])  # [5, N, 2^nm]
    limit = torch.stack([cell.ranges[ROW[name]].view(-1, 1) for name in ("a3", "a4", "a5", "a6", "a10")])
    bend = sigmoid * (1 - sigmoid)
    slope = torch.stack([bend, bend, 1 - tanh**2, bend, 1 - shown**2])
    slope[plain.abs() > limit] = -1.0
    return torch.stack([round_to_level(plain, bits, limit), slope], dim=-1)


def _curves(cell: Cell) -> Tensor | None:
    """Coefficients of the converters' curves, [2, N, 3, 4H] (kestrel.nn.chip.Converter); None where they are ideal."""
    found = []
    for product, name in (("ih", "a12"), ("hh", "a13")):
        converter = cell.part(product).converter
        if converter is None or cell.bits.mvm is None:
            return None
        found.append(torch.stack(converter.coefficients(cell.ranges[ROW[name]], cell.bits.mvm), dim=1))
    return torch.stack(found).contiguous()


def _problem(x: Tensor, cell: Cell, deviation: float, seed: int, keep: bool) -> Problem:
    blocks, hidden = cell.w_hh.shape[:2]
    batch, steps, width = x.shape
    slices, last_slices = slices_of(blocks, batch)
    return Problem(
        blocks=blocks,
        batch=batch,
        steps=steps,
        input=width,
        hidden=hidden,
        chunk=_CHUNK,
        slices=slices,
        last_slices=last_slices,
        inp_bits=cell.bits.inp or 0,
        mvm_bits=cell.bits.mvm or 0,
        nm_bits=cell.bits.nm or 0,
        keep=int(keep),
        noise=deviation,
        seed=seed,
    )


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh, ranges, cell, deviation, seed, keep):
        library = kernels()
        device = cell.device
        back_ih, back_hh = device.clamped(w_ih, b_ih)[0], device.clamped(w_hh, b_hh)[0]
        front_ih, bias_ih = device.stored(w_ih, b_ih)
        front_hh, bias_hh = device.stored(w_hh, b_hh)
        if cell.mask is not None:
            back_hh, front_hh = back_hh * cell.mask, front_hh * cell.mask
        if (program := cell.part("ih").program) is not None:
            front_ih, bias_ih = front_ih + program[0], bias_ih + program[1]
        if (program := cell.part("hh").program) is not None:
            front_hh, bias_hh = front_hh + program[0], bias_hh + program[1]
        x = x.contiguous()
        held: dict[str, Any] = {
            **{"x": x, "w_ih": front_ih, "w_hh": front_hh, "b_ih": bias_ih, "b_hh": bias_hh},
            **{"back_ih": back_ih, "back_hh": back_hh, "ranges": ranges.detach().contiguous()},
        }
        held["tables"] = _tables(cell)
        if (curves := _curves(cell)) is not None:
            held["adc"] = curves
        problem = _problem(x, cell, deviation, seed, keep)
        for name, tensor in held.items():
            setattr(problem, name, tensor.data_ptr())
        saved = _Buffer(library.kestrel_saved_bytes(problem))
        scratch = _Buffer(library.kestrel_scratch_bytes(problem))
        h = x.new_empty(problem.blocks, problem.batch, problem.hidden)
        problem.saved, problem.scratch, problem.h = saved.pointer, scratch.pointer, h.data_ptr()
        library.kestrel_forward(problem)
        if keep:
            # Everything here is detached, so keeping it on ctx makes no reference cycle.
            ctx.problem, ctx.held, ctx.saved, ctx.mask = problem, held, saved, cell.mask
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        library = kernels()
        problem, held = ctx.problem, ctx.held
        grad = grad.contiguous()
        scratch = _Buffer(library.kestrel_scratch_bytes(problem))
        results = {
            **{"d_ih": torch.empty_like(held["w_ih"]), "d_hh": torch.empty_like(held["w_hh"])},
            **{"db_ih": torch.empty_like(held["b_ih"]), "db_hh": torch.empty_like(held["b_hh"])},
            "d_ranges": torch.empty(len(RANGES), problem.blocks, dtype=torch.float64),
        }
        if ctx.needs_input_grad[0]:
            results["d_x"] = grad.new_empty(problem.blocks, problem.batch, problem.steps, problem.input)
        problem.d_x = None
        for name, tensor in {"grad_h": grad, **results}.items():
            setattr(problem, name, tensor.data_ptr())
        problem.scratch = scratch.pointer
        library.kestrel_backward(problem)
        if ctx.mask is not None:
            results["d_hh"] *= ctx.mask
        to_x = results["d_x"].sum(0) if ctx.needs_input_grad[0] else None
        to_ranges = results["d_ranges"].to(grad.dtype)
        grads = (to_x, results["d_ih"], results["d_hh"], results["db_ih"], results["db_hh"], to_ranges)
        return *grads, None, None, None, None


def native_lstm(x: Tensor, cell: Cell, deviation: float = 0.0, seed: int | None = None) -> Tensor:
    """x [B, T, I] -> the last hidden state [N, B, H], float32 on the CPU.

    `deviation`: standard deviation of the weight noise; its values depend on `seed` alone (drawn from torch's default
    generator where None). `cell.noise` is not used. Inputs are not split into slices here.
    """
    if cell.bits.slices:
        raise ValueError("bit-serial inputs are computed by fused_lstm")
    if x.dim() != 3 or x.shape[2] != cell.w_ih.shape[1] or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted a filled [B, T, {cell.w_ih.shape[1]}]")
    if deviation > 0 and seed is None:
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *cell.trained))
    return _Sequence.apply(x, *cell.trained, cell.detached(), float(deviation), seed or 0, keep)


def native_noise(x: Tensor, cell: Cell, deviation: float, seed: int, product: str, step: int) -> tuple[Tensor, Tensor]:
    """The noise of a forward pass over `x`, on the weights and biases of product `ih` or `hh` at time step `step`."""
    library = kernels()
    problem = _problem(x, cell, deviation, seed, False)
    weight = {"ih": cell.w_ih, "hh": cell.w_hh}[product]
    noise = torch.empty(weight.shape[0], weight.shape[1] + 1, weight.shape[2])
    for block in range(weight.shape[0]):
        library.kestrel_noise(problem, block, step, int(product == "hh"), noise[block].data_ptr())
    return noise[:, :-1].contiguous(), noise[:, -1].contiguous()
