"""Delta LSTM and GRU layers over a whole sequence in one autograd function with a hand-written, sparse backward pass.

Forward, the memories are taken from the references (M = W r + b, see `kestrel.nn.delta_cell`), so that inputs are one
product for all frames. Backward is the sparse form of Chen et al. (AAAI 2024, arXiv 2312.09391): the gradient of the
memories is summed over time, dM_t = dM_(t+1) + dpre_t; a transmitted element gets (dM_t W) plus what its reference
holds, any other passes the gradient of its reference on unchanged; and weights get dM_t x d_t, where only transmitted
elements are not zero. The sparsity of the backward pass is that of the forward pass, and the gradient is the full one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from kestrel.nn.delta_cell import Kind, LayerState, Sequence, Thresholds, Weights, kept_back
from kestrel.nn.delta_fixed import Fixed, Numerics

_MAX_KEPT = 4  # workspaces of one size; more forward passes are rarely alive at a time
_ROWS = 512  # of the matrices whose product is summed into the gradient of weights


class _Workspace:
    """Memory [*shape] that goes back to a pool when its last user is gone: fresh memory costs a page fault per 4 KiB."""

    _free: ClassVar[defaultdict[tuple[Any, ...], list[Tensor]]] = defaultdict(list)

    def __init__(self, like: Tensor, *shape: int) -> None:
        self._key = (shape, like.dtype, like.device)
        free = self._free[self._key]
        self.tensor = free.pop() if free else like.new_empty(shape)

    def __del__(self) -> None:
        free = self._free[self._key]
        if len(free) < _MAX_KEPT:
            free.append(self.tensor)


def _references(x: Tensor, start: Tensor, threshold: float) -> Tensor:
    """The references of x [T, B, I] in every frame."""
    if threshold == 0:
        return x
    refs, reference = torch.empty_like(x), start
    for step in range(x.shape[0]):
        still = kept_back(x[step] - reference, threshold)
        reference = torch.where(still, reference, x[step], out=refs[step])
    return refs


def _mark_sent(refs: Tensor, start: Tensor, step: int, out: Tensor) -> Tensor:
    """1 where an element was transmitted in a frame, 0 elsewhere, for a threshold above 0: what is sent has moved."""
    return torch.ne(refs[step], refs[step - 1] if step else start, out=out)


def _behind_inputs(d_memory: Tensor, weight: Tensor, refs: Tensor, start: Tensor, threshold: float) -> Tensor:
    """Gradient of x [T, B, I] from that of the memories [T, B, rows]."""
    d_delta = (d_memory.flatten(0, 1) @ weight).view(*d_memory.shape[:2], -1)
    held, sent = torch.zeros_like(d_delta[0]), torch.empty_like(d_delta[0])  # held: gradient of the reference
    for step in reversed(range(d_delta.shape[0])):
        now = d_delta[step].add_(held)
        if threshold > 0:
            now.mul_(_mark_sent(refs, start, step, sent))
        held.sub_(now)
    return d_delta


def _outer(d_memory: Tensor, *refs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of weights [rows, features] for each of the references: dM_t times what was transmitted in t, summed.

    In frame 0 that is the whole reference, since the memories begin as W r + b. A few frames at a time: a product over
    all of them takes twice as long, and the deltas stay in the cache.
    """
    steps, batch, rows = d_memory.shape
    widths = [part.shape[2] for part in refs]
    total = d_memory.new_zeros(rows, sum(widths))
    count = max(1, _ROWS // batch)
    space = d_memory.new_empty(count, batch, sum(widths))
    for start in range(0, steps, count):
        deltas = space[: min(count, steps - start)]
        for mine, part in zip(deltas.split(widths, dim=-1), refs, strict=True):
            now = part[start : start + len(deltas)]
            torch.sub(now[1:], now[:-1], out=mine[1:])
            torch.sub(now[0], part[start - 1], out=mine[0]) if start else mine[0].copy_(now[0])
        total.addmm_(d_memory[start : start + count].flatten(0, 1).t(), deltas.flatten(0, 1))
    return total.split(widths, dim=1)


def _levels(form: Fixed | None, x: Tensor) -> Tensor:
    return x if form is None else form.levels(x)


def _pass(form: Fixed | None, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in front of a format that `x` went through."""
    return grad if form is None else grad * form.inside(x)


class _Curve:
    """One of the non-linearities with its formats: y = Qn(curve(Qa(x)))."""

    def __init__(self, numerics: Numerics, tanh: bool) -> None:
        self.numerics, self.is_tanh = numerics, tanh
        self.curve = numerics.tanh if tanh else numerics.sigmoid
        self.hard = numerics.hard_tanh if tanh else numerics.hard_sigmoid

    def __call__(self, x: Tensor) -> Tensor:
        return _levels(self.numerics.gate, self.curve(_levels(self.numerics.activation, x)))

    def slope(self, x: Tensor) -> Tensor:
        """dy/dx, 0 where anything saturates."""
        q_a, q_n = self.numerics.activation, self.numerics.gate
        seen = _levels(q_a, x)
        y = self.curve(seen)
        if self.hard:
            rate = 1.0 if self.is_tanh else 0.25
            line = seen if self.is_tanh else 0.25 * seen + 0.5
            slope = rate * ((line >= (-1.0 if self.is_tanh else 0.0)) & (line <= 1.0)).to(x.dtype)
        else:
            slope = 1 - y * y if self.is_tanh else y * (1 - y)
        return _pass(q_n, _pass(q_a, slope, x), y)


def _frames(sequence: Tensor) -> tuple[Tensor, ...]:
    """Its frames; taking them all at once is much cheaper than one index after the other."""
    return sequence.unbind(0)


def _taken(ctx: Any) -> tuple[Any, ...]:
    """What the forward pass kept. The backward pass writes over it, so it can be had once."""
    kept, ctx.kept = ctx.kept, None
    if kept is None:
        raise RuntimeError("the backward pass of a delta layer runs once; compute the forward pass again")
    return kept


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh, state, thresholds, numerics, keep):
        steps, batch, _ = x.shape
        hidden = w_hh.shape[1]
        soft, q_a, q_n = numerics.soft_float, numerics.activation, numerics.gate
        sigmoid, tanh = _Curve(numerics, False), _Curve(numerics, True)
        x_refs = _references(x, state.x_ref, thresholds.x)
        space = _Workspace(x, steps, batch, 4 * hidden)
        raw = space.tensor
        torch.addmm(b_ih + b_hh, x_refs.reshape(steps * batch, -1), w_ih.t(), out=raw.view(steps * batch, -1))
        gates = raw if soft else torch.empty_like(raw)
        hs, cs, shown = (x.new_empty(steps, batch, hidden) for _ in range(3))
        h_refs = x.new_empty(steps, batch, hidden)
        totals, outs = (cs, hs) if soft else (torch.empty_like(cs), torch.empty_like(hs))  # c and h before Qa
        h, c, reference, w_hh_t = state.h, state.c, state.h_ref, w_hh.t()
        difference = x.new_empty(batch, hidden)
        frames = zip(
            *(_frames(part) for part in (raw, raw[..., : 2 * hidden], *gates.split(hidden, dim=-1))),
            *(_frames(part) for part in (h_refs, totals, cs, shown, outs, hs)),
            strict=True,
        )
        for now, if_gates, i, f, g, o, reference_now, total, c_now, shown_now, out, h_now in frames:
            if thresholds.h == 0:
                reference = reference_now.copy_(h)
            else:
                still = torch.sub(h, reference, out=difference).abs_() < thresholds.h  # not where NaN
                reference = torch.where(still, reference, h, out=reference_now)
            now.addmm_(reference, w_hh_t)
            if soft:
                if_gates.sigmoid_()
                g.tanh_()
                o.sigmoid_()
            else:
                for gate, part in zip((i, f, g, o), now.split(hidden, dim=-1), strict=True):
                    gate.copy_(tanh(part) if gate is g else sigmoid(part))
            torch.mul(f, c, out=total).addcmul_(i, g)
            if soft:
                torch.mul(o, torch.tanh(total, out=shown_now), out=h_now)
            else:
                c_now.copy_(_levels(q_a, total))
                shown_now.copy_(numerics.tanh(c_now))
                torch.mul(o, _levels(q_n, shown_now), out=out)
                h_now.copy_(_levels(q_a, out))
            c, h = c_now, h_now
        shown_refs = x_refs.detach()
        ctx.mark_non_differentiable(shown_refs, cs)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(w_ih, w_hh)
            ctx.kept = space, x_refs.detach(), h_refs.detach(), gates, totals, cs.detach(), shown, outs.detach()
            ctx.setup = state, thresholds, numerics
        return hs, shown_refs, h_refs, cs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_hs, _x_refs, grad_h_refs, _cs):
        w_ih, w_hh = ctx.saved_tensors
        space, x_refs, h_refs, gates, totals, cs, shown, outs = _taken(ctx)
        raw = space.tensor
        state, thresholds, numerics = ctx.setup
        soft, q_a, q_n = numerics.soft_float, numerics.activation, numerics.gate
        sigmoid, tanh = _Curve(numerics, False), _Curve(numerics, True)
        steps, _, hidden = h_refs.shape
        d_memory = raw if soft else torch.empty_like(raw)  # of a frame whose gates were used, the memory is free
        d_gates, slope = torch.empty_like(raw[0]), torch.empty_like(raw[0])
        d_i, d_f, d_g, d_o = d_gates.split(hidden, dim=-1)
        dh, dc, held, d_shown, spare, sent = (torch.zeros_like(h_refs[0]) for _ in range(6))
        slope_g, one = slope[:, 2 * hidden : 3 * hidden], torch.ones_like(dh)
        befores = [state.c, *_frames(cs)[:-1]]
        parts = [_frames(part) for part in (gates, *gates.split(hidden, dim=-1), shown, outs, d_memory)]
        grads = None if grad_hs is None else _frames(grad_hs)
        after = None  # gradient of the memories one frame later
        for step in reversed(range(steps)):
            all_gates, i, f, g, o, seen, out, now = (part[step] for part in parts)
            if grads is not None:
                dh.add_(grads[step])
            if soft:
                torch.mul(dh, seen, out=d_o)
                dc.addcmul_(dh, o).addcmul_(d_o, out, value=-1)  # dh o (1 - tanh^2 c), with h = o tanh c
            else:
                dh = _pass(q_a, dh, out)
                torch.mul(dh, _levels(q_n, seen), out=d_o)
                torch.mul(dh, o, out=d_shown)
                dc = _pass(q_a, dc + d_shown * tanh.slope(cs[step]), totals[step])
            torch.mul(dc, g, out=d_i)
            torch.mul(dc, befores[step], out=d_f)
            torch.mul(dc, i, out=d_g)
            dc.mul_(f)
            if soft:
                torch.addcmul(all_gates, all_gates, all_gates, value=-1, out=slope)
                torch.addcmul(one, g, g, value=-1, out=slope_g)
            else:
                slope = sigmoid.slope(raw[step])
                slope[:, 2 * hidden : 3 * hidden] = tanh.slope(raw[step, :, 2 * hidden : 3 * hidden])
            if after is None:
                torch.mul(d_gates, slope, out=now)
            else:
                torch.addcmul(after, d_gates, slope, out=now)
            after = now
            if grad_h_refs is not None:
                held.add_(grad_h_refs[step])
            if step:
                dh, spare = torch.addmm(held, now, w_hh, out=spare), dh
                if thresholds.h > 0:
                    dh.mul_(_mark_sent(h_refs, state.h_ref, step, sent))
                held.sub_(dh)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _behind_inputs(d_memory, w_ih, x_refs, state.x_ref, thresholds.x)
        d_bias = d_memory[0].sum(0)
        d_ih, d_hh = _outer(d_memory, x_refs, h_refs)
        return dx, d_ih, d_hh, d_bias, d_bias, None, None, None, None


class _GRU(torch.autograd.Function):
    """Gates stand in the order n, r, z; memories in the order n of x, r, z, n of h."""

    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh, state, thresholds, numerics, keep):
        steps, batch, _ = x.shape
        hidden = w_hh.shape[1]
        soft, q_a = numerics.soft_float, numerics.activation
        sigmoid, tanh = _Curve(numerics, False), _Curve(numerics, True)
        w_ih, b_ih = w_ih.roll(hidden, 0), b_ih.roll(hidden, 0)  # r, z, n -> n, r, z
        x_refs = _references(x, state.x_ref, thresholds.x)
        space = _Workspace(x, steps, batch, 4 * hidden)
        raw, inner = space.tensor.split((3 * hidden, hidden), dim=-1)  # inner: memory n of h
        flat = space.tensor.view(steps * batch, -1)[:, : 3 * hidden]
        both = b_ih + torch.cat([torch.zeros_like(b_hh[:hidden]), b_hh[: 2 * hidden]])
        torch.addmm(both, x_refs.reshape(steps * batch, -1), w_ih.t(), out=flat)
        inner.copy_(b_hh[2 * hidden :])
        gates = raw if soft else torch.empty_like(raw)
        hs, h_refs = (x.new_empty(steps, batch, hidden) for _ in range(2))
        h, reference, w_hh_t = state.h, state.h_ref, w_hh.t()
        difference = x.new_empty(batch, hidden)
        frames = zip(
            *(_frames(part) for part in (space.tensor[..., hidden:], raw[..., :hidden], raw[..., hidden:], inner)),
            *(_frames(part) for part in (*gates.split(hidden, dim=-1), h_refs, hs)),
            strict=True,
        )
        for with_h, raw_n, raw_rz, inner_now, n, r, z, reference_now, h_now in frames:
            if thresholds.h == 0:
                reference = reference_now.copy_(h)
            else:
                still = torch.sub(h, reference, out=difference).abs_() < thresholds.h  # not where NaN
                reference = torch.where(still, reference, h, out=reference_now)
            with_h.addmm_(reference, w_hh_t)
            if soft:
                raw_rz.sigmoid_()
                raw_n.addcmul_(r, inner_now).tanh_()
                torch.addcmul(n, z, torch.sub(h, n, out=difference), out=h_now)
            else:
                for gate, part in zip((r, z), raw_rz.split(hidden, dim=-1), strict=True):
                    gate.copy_(sigmoid(part))
                n.copy_(tanh(raw_n.addcmul_(r, _levels(q_a, inner_now))))
                h_now.copy_(_levels(q_a, _levels(q_a, (1 - z) * n) + _levels(q_a, z * h)))
            h = h_now
        shown_refs = x_refs.detach()
        ctx.mark_non_differentiable(shown_refs)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(w_hh)
            ctx.kept = space, w_ih, x_refs.detach(), h_refs.detach(), gates, hs.detach()
            ctx.setup = state, thresholds, numerics
        return hs, shown_refs, h_refs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_hs, _x_refs, grad_h_refs):
        (w_hh,) = ctx.saved_tensors
        space, w_ih, x_refs, h_refs, gates, hs = _taken(ctx)
        state, thresholds, numerics = ctx.setup
        soft, q_a = numerics.soft_float, numerics.activation
        sigmoid, tanh = _Curve(numerics, False), _Curve(numerics, True)
        steps, batch, hidden = h_refs.shape
        raw, inner = space.tensor.split((3 * hidden, hidden), dim=-1)
        # The memory of a frame whose gates were used is free.
        d_memory = space.tensor if soft else raw.new_empty(steps, batch, 4 * hidden)
        d_now, slope = raw.new_empty(batch, 4 * hidden), raw.new_ones(batch, 4 * hidden)
        d_n, d_r, d_z, d_inner = d_now.split(hidden, dim=-1)
        dh, held, through, spare, sent = (torch.zeros_like(h_refs[0]) for _ in range(5))
        one = torch.ones_like(dh)
        befores = [state.h, *_frames(hs)[:-1]]
        d_rz, slope_n, slope_rz = d_now[:, hidden : 3 * hidden], slope[:, :hidden], slope[:, hidden : 3 * hidden]
        sources = (*gates.split(hidden, dim=-1), gates[..., hidden:], inner, d_memory, d_memory[..., hidden:])
        parts = [_frames(part) for part in sources]
        grads = None if grad_hs is None else _frames(grad_hs)
        after = None  # gradient of the memories one frame later
        for step in reversed(range(steps)):
            n, r, z, rz, seen, now, now_h = (part[step] for part in parts)
            before = befores[step]
            if grads is not None:
                dh.add_(grads[step])
            if soft:
                torch.mul(dh, torch.sub(before, n, out=spare), out=d_z)
                torch.mul(dh, z, out=through)  # what flows to the state before, past all products
                torch.addcmul(one, n, n, value=-1, out=slope_n)
                torch.mul(torch.sub(dh, through, out=spare), slope_n, out=d_n)
                torch.addcmul(rz, rz, rz, value=-1, out=slope_rz)
            else:
                new, old = (1 - z) * n, z * before
                dh = _pass(q_a, dh, _levels(q_a, new) + _levels(q_a, old))
                d_new, d_old = _pass(q_a, dh, new), _pass(q_a, dh, old)
                torch.sub(d_old * before, d_new * n, out=d_z)
                through = d_old * z
                torch.mul(d_new * (1 - z), tanh.slope(raw[step, :, :hidden]), out=d_n)
                seen = _levels(q_a, seen)
                slope_rz.copy_(sigmoid.slope(raw[step, :, hidden:]))
            torch.mul(d_n, seen, out=d_r)
            torch.mul(d_n, r, out=d_inner)
            if not soft:
                d_inner.copy_(_pass(q_a, d_inner, inner[step]))
            d_rz.mul_(slope_rz)
            if after is None:
                now.copy_(d_now)
            else:
                torch.add(after, d_now, out=now)
            after = now
            if grad_h_refs is not None:
                held.add_(grad_h_refs[step])
            if step:
                torch.addmm(held, now_h, w_hh, out=spare)
                if thresholds.h > 0:
                    spare.mul_(_mark_sent(h_refs, state.h_ref, step, sent))
                held.sub_(spare)
                dh, spare = spare.add_(through), dh
        of_x, of_h = d_memory[..., : 3 * hidden], d_memory[..., hidden:]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _behind_inputs(of_x, w_ih, x_refs, state.x_ref, thresholds.x)
        d_ih, d_hh = _outer(of_x, x_refs)[0].roll(-hidden, 0), _outer(of_h, h_refs)[0]
        d_bias_ih = of_x[0].sum(0).roll(-hidden, 0)
        return dx, d_ih, d_hh, d_bias_ih, of_h[0].sum(0), None, None, None, None


def fast_layer(
    kind: Kind, x: Tensor, weights: Weights, state: LayerState, thresholds: Thresholds, numerics: Numerics
) -> Sequence:
    """The same values and gradients as `kestrel.nn.delta_cell.plain_layer`, for x [T, B, I]."""
    exact = Thresholds(numerics.threshold(thresholds.x), numerics.threshold(thresholds.h))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    function = _LSTM if kind == "LSTM" else _GRU
    made = function.apply(x.contiguous(), *weights, state.detached(), exact, numerics, keep)
    hs, x_refs, h_refs, *rest = made
    return Sequence(hs, x_refs, h_refs, rest[0] if rest else None)
