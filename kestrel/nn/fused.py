"""The quantised LSTM over a whole sequence in one autograd function of PyTorch operators.

It computes what `plain_lstm` computes, with few passes over memory: operators work in place and on all gates at once, and
the backward pass is written out. Used where the native library is missing, and on other devices than the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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

    def clipped(self, x: Tensor, out: Tensor) -> Tensor:
        """The sign of `x` where it is clipped, else 0 (as numbers), into `out`."""
        torch.clamp(x, -self.limit, self.limit, out=out)
        return torch.sub(x, out, out=out).sign_()

    def behind(self, grad: Tensor, x: Tensor, total: Tensor, spare: Tensor, out: Tensor) -> Tensor:
        """Gradient behind the clip of `x` into `out` (0 where clipped); `total` [..., N] takes up what the range gets."""
        clipped = self.clipped(x, spare)
        torch.mul(grad, clipped, out=out)
        total += out.sum((-2, -1))
        return torch.addcmul(grad, out, clipped, value=-1, out=out)


def _curves(cell: Cell, ranges: Tensor) -> list[Callable[[Tensor], Tensor] | None]:
    """What the converters of the input and the recurrent product make of raw sums [N, B, 4H]; None = nothing."""
    found: list[Callable[[Tensor], Tensor] | None] = []
    for product, name in (("ih", "a12"), ("hh", "a13")):
        converter = cell.part(product).converter
        if converter is None or cell.bits.mvm is None:
            found.append(None)
        else:
            found.append(functools.partial(converter, limit=ranges[ROW[name]], bits=cell.bits.mvm))
    return found


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_ih, w_hh, b_ih, b_hh, ranges, cell, keep):
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
        for name, full in (("ih", full_ih), ("hh", full_hh)):
            program = cell.part(name).program
            if program is not None:
                full += torch.cat([program[0], program[1].unsqueeze(1)], dim=1)
        inputs = x.new_ones(steps, blocks, batch, width + 1)
        x_now = x.transpose(0, 1).unsqueeze(1).expand(steps, blocks, batch, width)
        clipped = torch.empty_like(x_now, memory_format=torch.contiguous_format)
        serial = bits.serial
        if serial is None:
            inputs[..., :-1] = q_x(x_now, out=clipped)
        else:  # split below, step by step
            torch.clamp(x_now, -q_x.limit, q_x.limit, out=clipped)
        curves = _curves(cell, ranges)

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
        h = torch.zeros_like(totals[0])
        now_ih, now_hh = full_ih, full_hh
        if cell.noise is not None:
            now_ih, now_hh = torch.empty_like(full_ih), torch.empty_like(full_hh)
        for step in range(steps):
            at = step if keep else 0
            if serial is not None:
                for place, (name, value, limit, full, seen) in enumerate(
                    (
                        ("ih", clipped[step], q_x.limit, full_ih, inputs[step]),
                        ("hh", h, q_h_inp.limit, full_hh, recurrent[at]),
                    )
                ):
                    converter, noises = cell.part(name).converter, cell.noises(name, step)
                    raw[at, place], seen[..., :-1] = serial.product(
                        value, full[:, :-1], full[:, -1], limit, converter, noises
                    )
                torch.add(raw[at, 0], raw[at, 1], out=sums[at])
            else:
                if cell.noise is not None:
                    for name, full, now in (("ih", full_ih, now_ih), ("hh", full_hh, now_hh)):
                        weight_noise, bias_noise = cell.noise(name, step)
                        torch.add(full[:, :-1], weight_noise, out=now[:, :-1])
                        torch.add(full[:, -1], bias_noise, out=now[:, -1])
                torch.bmm(inputs[step], now_ih, out=raw[at, 0])
                torch.bmm(recurrent[at], now_hh, out=raw[at, 1])
                for place, curve in enumerate(curves):
                    if curve is not None:
                        raw[at, place] = curve(raw[at, place])
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
            ctx.serial = serial
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
        gate, slope, d_gate, wide = (torch.empty_like(active[0]) for _ in range(4))
        bent, seen, d_shown, d_bent, d_total, narrow = (torch.empty_like(totals[0]) for _ in range(6))
        d_part, d_raw = torch.empty_like(parts[0]), torch.empty_like(raw[0])
        spare_part, spare_raw = torch.empty_like(parts[0]), torch.empty_like(raw[0])
        d_i, d_j, d_f, d_o = d_gate.split(hidden, dim=-1)
        for step in reversed(range(steps)):
            i, j, f, o = q_active(active[step], out=gate).split(hidden, dim=-1)
            torch.tanh(states[step + 1], out=bent)
            q_shown(bent, out=seen)
            q_h.behind(dh, shown[step], by_name["a11"], narrow, d_shown)
            torch.mul(d_shown, o, out=d_bent)
            if shown_clips:
                q_shown.behind(d_bent.clone(), bent, by_name["a10"], narrow, d_bent)
            dc.addcmul_(d_bent, bent.square_().neg_().add_(1))
            q_c.behind(dc, totals[step], by_name["a9"], narrow, d_total)
            q_cell.behind(d_total, parts[step], cells, spare_part, d_part)
            torch.mul(d_part[1], j, out=d_i)
            torch.mul(d_part[1], i, out=d_j)
            torch.mul(d_part[0], states[step], out=d_f)
            torch.mul(d_shown, seen, out=d_o)
            torch.mul(d_part[0], f, out=dc)
            if gates_clip:
                signed = d_gate * q_active.clipped(active[step], wide)
                for name, part in zip(("a4", "a5", "a3", "a6"), signed.split(hidden, dim=-1), strict=True):
                    by_name[name] += part.sum((-2, -1))
                d_gate.masked_fill_(signed != 0, 0)
            value = active[step]
            torch.addcmul(value, value, value, value=-1, out=slope)  # s (1 - s)
            tanh = value[..., hidden : 2 * hidden]
            slope[..., hidden : 2 * hidden] = 1 - tanh * tanh
            q_gates.behind(slope.mul_(d_gate), sums[step], by_name["a14"], wide, gate)
            if ctx.serial is None:
                d1, d2 = q_products.behind(gate, raw[step], products, spare_raw, d_raw)
            else:  # converters of slices clip without a gradient of their own
                d1 = d2 = gate
            torch.baddbmm(d_full_ih, inputs[step].transpose(1, 2), d1, out=d_full_ih)
            torch.baddbmm(d_full_hh, recurrent[step].transpose(1, 2), d2, out=d_full_hh)
            if x_clipped or dx is not None:
                d_x = torch.bmm(d1, back_ih.transpose(1, 2))
                x_now = x[:, step].expand_as(d_x)
                q_x.behind(d_x.clone(), x_now, by_name["a1"], torch.empty_like(d_x), d_x)
                if dx is not None:
                    dx[step] = d_x
            if step:
                dh = torch.bmm(d2, back_hh_t)
        by_name["a7"], by_name["a8"] = cells
        by_name["a12"], by_name["a13"] = products
        d_hh = d_full_hh[:, :-1] if mask is None else d_full_hh[:, :-1] * mask
        to_x = dx.sum(1).transpose(0, 1) if dx is not None else None
        ranges = torch.stack(list(by_name.values()))
        return to_x, d_full_ih[:, :-1], d_hh, d_full_ih[:, -1], d_full_hh[:, -1], ranges, None, None


def fused_lstm(x: Tensor, cell: Cell) -> Tensor:
    """x [B, T, I] -> the last hidden state [N, B, H]; the same values as `plain_lstm`."""
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *cell.trained))
    return _Sequence.apply(x, *cell.trained, cell.detached(), keep)
