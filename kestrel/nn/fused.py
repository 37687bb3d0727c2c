"""The quantised LSTM over a whole sequence in one autograd function of PyTorch operators.

It computes what `plain_lstm` computes, with few passes over memory: operators work in place and on all gates at once, and
the backward pass is written out. Used where the native library is missing, and on other devices than the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kestrel.nn.cell import RANGES, ROW, Cell


class _Levels:
    """A clipping quantiser with one range per block; `limit` broadcasts to the signals [..., N, B, features]."""

    def __init__(self, limit: Tensor, bits: int | None) -> None:
        self.limit, self.bits = limit, bits
        self.half = 2 ** (bits - 1) if bits else 0
        self.step = limit / self.half if bits else limit

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Quantise `x` into `out` (which may be `x`)."""
        if self.bits is None:
            return torch.clamp(x, -self.limit, self.limit, out=out)
        torch.div(x, self.step, out=out)
        return out.clamp_(1 - self.half, self.half - 1).round_().mul_(self.step)

    def clipped(self, x: Tensor) -> Tensor:
        """The sign of `x` where it is clipped, else 0 (as numbers)."""
        return torch.clamp(x, -self.limit, self.limit).sub_(x).sign_().neg_()


def _behind(grad: Tensor, clipped: Tensor, total: Tensor) -> Tensor:
    """Gradient behind a clip (0 where clipped); `total` [..., N] takes up what the range gets."""
    signed = grad * clipped
    total += signed.sum((-2, -1))
    return torch.addcmul(grad, signed, clipped, value=-1)


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh, ranges, cell: Cell):
        blocks, hidden = w_hh.shape[:2]
        batch, steps, width = x.shape
        bits, device = cell.bits, cell.device

        def levels(names: tuple[str, ...], count: int | None) -> _Levels:
            limit = torch.stack([ranges[ROW[name]] for name in names])  # [signals, N]
            return _Levels(limit.view(len(names), blocks, 1, 1).squeeze(0), count)

        q_x, q_h_inp = levels(("a1",), bits.inp), levels(("a11",), bits.inp)
        q_products, q_gates = levels(("a12", "a13"), bits.mvm), levels(("a14",), bits.nm)
        q_cell, q_c = levels(("a7", "a8"), bits.nm), levels(("a9",), bits.nm)
        q_shown, q_h = levels(("a10",), bits.nm), levels(("a11",), bits.nm)
        # One range per column of the gates i, j, f, o: [N, 1, 4H].
        by_gate = torch.stack([ranges[ROW[name]] for name in ("a4", "a5", "a3", "a6")], dim=1)  # [N, 4]
        q_active = _Levels(by_gate.repeat_interleave(hidden, dim=1).unsqueeze(1), bits.nm)

        back_ih, back_hh = device.clamped(w_ih, b_ih)[0], device.clamped(w_hh, b_hh)[0]
        front_ih, bias_ih = device.stored(w_ih, b_ih)
        front_hh, bias_hh = device.stored(w_hh, b_hh)
        if cell.mask is not None:
            back_hh, front_hh = back_hh * cell.mask, front_hh * cell.mask
        # The bias is the last row of the weights, driven by an input of 1.
        full_ih = torch.cat([front_ih, bias_ih.unsqueeze(1)], dim=1)
        full_hh = torch.cat([front_hh, bias_hh.unsqueeze(1)], dim=1)
        inputs = x.new_ones(steps, blocks, batch, width + 1)
        x_now = x.transpose(0, 1).unsqueeze(1).expand(steps, blocks, batch, width)
        inputs[..., :-1] = q_x(x_now, out=torch.empty_like(x_now, memory_format=torch.contiguous_format))

        keep = any(ctx.needs_input_grad)
        slots = steps if keep else 1
        raw = x.new_empty(slots, 2, blocks, batch, 4 * hidden)  # crossbar outputs
        sums = x.new_empty(slots, blocks, batch, 4 * hidden)  # their quantised sum
        active = x.new_empty(slots, blocks, batch, 4 * hidden)  # sigmoid i, tanh j, sigmoid f, sigmoid o
        parts = x.new_empty(slots, 2, blocks, batch, hidden)  # c F and I J
        states = x.new_zeros(slots + 1, blocks, batch, hidden)  # c
        totals = x.new_empty(slots, blocks, batch, hidden)  # sum of the parts
        shown = x.new_empty(slots, blocks, batch, hidden)  # T O
        recurrent = x.new_zeros(slots + 1, blocks, batch, hidden + 1)  # h as crossbar input
        recurrent[..., -1] = 1
        buffer, part, bent = torch.empty_like(raw[0]), torch.empty_like(parts[0]), torch.empty_like(totals[0])
        gate = torch.empty_like(active[0])
        h = torch.empty_like(totals[0])
        for step in range(steps):
            at = step if keep else 0
            now_ih, now_hh = full_ih, full_hh
            if cell.noise is not None:
                noise_ih, noise_hh = cell.noise("ih", step), cell.noise("hh", step)
                now_ih = full_ih + torch.cat([noise_ih[0], noise_ih[1].unsqueeze(1)], dim=1)
                now_hh = full_hh + torch.cat([noise_hh[0], noise_hh[1].unsqueeze(1)], dim=1)
            torch.bmm(inputs[step], now_ih, out=raw[at, 0])
            torch.bmm(recurrent[at], now_hh, out=raw[at, 1])
            q_products(raw[at], out=buffer)
            torch.add(buffer[0], buffer[1], out=sums[at])
            q_gates(sums[at], out=gate)
            torch.sigmoid(gate, out=active[at])
            active[at, ..., hidden : 2 * hidden] = torch.tanh(gate[..., hidden : 2 * hidden])
            i, j, f, o = q_active(active[at], out=gate).split(hidden, dim=-1)
            torch.mul(states[at], f, out=parts[at, 0])
            torch.mul(i, j, out=parts[at, 1])
            q_cell(parts[at], out=part)
            torch.add(part[0], part[1], out=totals[at])
            following = at + 1 if keep else 0
            q_c(totals[at], out=states[following])
            torch.tanh(states[following], out=bent)
            torch.mul(q_shown(bent, out=bent), o, out=shown[at])
            q_h(shown[at], out=h)
            recurrent[following, ..., :-1] = q_h_inp(h, out=bent)
        if keep:
            ctx.save_for_backward(x)
            ctx.kept = (inputs, raw, sums, active, parts, states, totals, shown, recurrent)
            ctx.weights = (back_ih, back_hh, cell.mask)
            ctx.levels = (q_x, q_products, q_gates, q_active, q_cell, q_c, q_shown, q_h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        inputs, raw, sums, active, parts, states, totals, shown, recurrent = ctx.kept
        back_ih, back_hh, mask = ctx.weights
        q_x, q_products, q_gates, q_active, q_cell, q_c, q_shown, q_h = ctx.levels
        steps, blocks, batch, gates = sums.shape
        hidden = gates // 4
        back_hh_t = back_hh.transpose(1, 2)
        d_full_ih = grad.new_zeros(blocks, inputs.shape[-1], gates)
        d_full_hh = grad.new_zeros(blocks, hidden + 1, gates)
        by_name = {name: grad.new_zeros(blocks) for name in RANGES}
        products, cells = grad.new_zeros(2, blocks), grad.new_zeros(2, blocks)
        # Values below 1 cannot be clipped by ranges of 1 and more: a common case that saves work.
        gates_clip, shown_clips = bool((q_active.limit < 1).any()), bool((q_shown.limit < 1).any())
        dx = x.new_empty(steps, blocks, batch, x.shape[-1]) if ctx.needs_input_grad[0] else None
        x_clipped = bool((x.abs().amax() > q_x.limit).any())
        dh, dc = grad, torch.zeros_like(grad)
        gate, slope, bent = torch.empty_like(active[0]), torch.empty_like(active[0]), torch.empty_like(totals[0])
        d_gate, d_part = torch.empty_like(active[0]), torch.empty_like(parts[0])
        q_shown_out = torch.empty_like(bent)
        for step in reversed(range(steps)):
            i, j, f, o = q_active(active[step], out=gate).split(hidden, dim=-1)
            torch.tanh(states[step + 1], out=bent)
            q_shown(bent, out=q_shown_out)
            d_shown = _behind(dh, q_h.clipped(shown[step]), by_name["a11"])
            d_bent = d_shown * o
            if shown_clips:
                d_bent = _behind(d_bent, q_shown.clipped(bent), by_name["a10"])
            d_state = dc.addcmul_(d_bent, bent.square_().neg_().add_(1))
            d_total = _behind(d_state, q_c.clipped(totals[step]), by_name["a9"])
            d_part = _behind(d_total.expand_as(d_part), q_cell.clipped(parts[step]), cells)
            d_i, d_j, d_f, d_o = d_gate.split(hidden, dim=-1)
            torch.mul(d_part[1], j, out=d_i)
            torch.mul(d_part[1], i, out=d_j)
            torch.mul(d_part[0], states[step], out=d_f)
            torch.mul(d_shown, q_shown_out, out=d_o)
            dc = d_part[0] * f
            d_active = d_gate
            if gates_clip:
                signed = d_gate * q_active.clipped(active[step])
                for name, part in zip(("a4", "a5", "a3", "a6"), signed.split(hidden, dim=-1), strict=True):
                    by_name[name] += part.sum((-2, -1))
                d_active = torch.where(signed != 0, 0, d_gate)
            value = active[step]
            torch.addcmul(value, value, value, value=-1, out=slope)  # s (1 - s)
            tanh = value[..., hidden : 2 * hidden]
            slope[..., hidden : 2 * hidden] = 1 - tanh * tanh
            d_sum = slope.mul_(d_active)
            d_sum = _behind(d_sum, q_gates.clipped(sums[step]), by_name["a14"])
            d1, d2 = _behind(d_sum.expand(2, -1, -1, -1), q_products.clipped(raw[step]), products)
            torch.baddbmm(d_full_ih, inputs[step].transpose(1, 2), d1, out=d_full_ih)
            torch.baddbmm(d_full_hh, recurrent[step].transpose(1, 2), d2, out=d_full_hh)
            if x_clipped or dx is not None:
                d_x = torch.bmm(d1, back_ih.transpose(1, 2))
                d_x = _behind(d_x, q_x.clipped(x[:, step].unsqueeze(0)), by_name["a1"])
                if dx is not None:
                    dx[step] = d_x
            if step:
                dh = torch.bmm(d2, back_hh_t)
        by_name["a7"], by_name["a8"] = cells
        by_name["a12"], by_name["a13"] = products
        d_hh = d_full_hh[:, :-1] if mask is None else d_full_hh[:, :-1] * mask
        to_x = dx.sum(1).transpose(0, 1) if dx is not None else None
        ranges = torch.stack(list(by_name.values()))
        return to_x, d_full_ih[:, :-1], d_hh, d_full_ih[:, -1], d_full_hh[:, -1], ranges, None


def fused_lstm(x: Tensor, cell: Cell) -> Tensor:
    """x [B, T, I] -> the last hidden state [N, B, H]; the same values as `plain_lstm`."""
    weights = (cell.w_ih, cell.w_hh, cell.b_ih, cell.b_hh, cell.ranges)
    inner = Cell(*(tensor.detach() for tensor in weights), cell.bits, cell.device, cell.mask, cell.noise)
    return _Sequence.apply(x, *weights, inner)
