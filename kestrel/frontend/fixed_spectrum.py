"""Spectra of the fixed-point front end (docs/fixed-frontend.md, steps 2 to 4), exact in float64.

Both classes take frames int16 [B, T, taps] and return ((real, imaginary) float64 [n, bins of low_bin .. high_bin], r int64
[n]) with n = B T. The parts are integers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from kestrel.frontend.fixed_tables import Tables

Parts = tuple[Tensor, Tensor]
_LARGEST_POWER = 62
_FRACTION = 2.0**-15  # of sines and cosines in the tables


class Scratch:
    """Memory that blocks of frames use one after another: fresh memory would cost a page fault per 4 KiB, each time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Memory of this shape, with any content; the same for the same name, so there is one user at a time."""
        size = math.prod(shape)
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self._kept[name][:size].view(shape)


def round_half_up(x: Tensor) -> Tensor:
    """The nearest integers of float64 values, halves up, in place. Exact where x + 0.5 is."""
    return x.add_(0.5).floor_()


class Powers(nn.Module):
    """Powers of two by a table: devices differ in how exact their `exp2` is."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.arange(-_LARGEST_POWER, _LARGEST_POWER + 1)
        self.register_buffer("table", torch.ldexp(torch.ones(len(exponents)).double(), exponents), persistent=False)

    def forward(self, exponent: Tensor) -> Tensor:
        """2^exponent float64 for int64 -62..62."""
        return self.table[exponent + _LARGEST_POWER]


def largest(x: Tensor, spare: Tensor) -> Tensor:
    """Largest magnitude in each row of x [n, ...]; `spare` [n, ...] is memory of its size."""
    return torch.abs(x, out=spare).amax(1)


def _frame_shift(magnitude: Tensor, tables: Tables) -> Tensor:
    """r [n]: the right shift that brings a frame's largest magnitude to data_bits bits, limited for near-silence."""
    digits = torch.frexp(magnitude).exponent.long()  # exact: magnitudes are integers below 2^32
    return (digits - tables.transform.data_bits).clamp_(min=tables.minimum_shift)


def _whole_window(tables: Tables) -> Tensor:
    half = torch.from_numpy(tables.window).double()
    return torch.cat([half, half[: tables.taps // 2].flip(0)])


class Folded(nn.Module):
    """Sums over folded samples, for odd n_fft."""

    window: Tensor
    before: Tensor
    cosines: Tensor
    sines: Tensor

    def __init__(self, tables: Tables, powers: Powers) -> None:
        super().__init__()
        self.tables, self.powers = tables, powers
        transform, n_fft = tables.transform, tables.spec.n_fft
        pairs = np.arange((tables.taps + 1) // 2)
        bins = np.arange(tables.filters.low_bin, tables.filters.high_bin + 1)
        index = np.outer(pairs + transform.start, bins) % n_fft  # [pairs, bins], from the middle of the window outwards
        factor = 2.0**-transform.output_shift
        middle = tables.taps // 2
        self.register_buffer("window", _whole_window(tables)[middle:].contiguous(), persistent=False)
        self.register_buffer("before", torch.arange(tables.taps - middle - 1, -1, -1), persistent=False)
        for name, wave in (("cosines", transform.wave[:n_fft]), ("sines", transform.wave[n_fft:])):
            self.register_buffer(name, torch.from_numpy(wave[index].astype(np.float64) * factor), persistent=False)

    def forward(self, frames: Tensor, scratch: Scratch) -> tuple[Parts, Tensor]:
        """See the module."""
        taps, middle = self.tables.taps, self.tables.taps // 2
        rows, pairs = frames.shape[0] * frames.shape[1], taps - middle
        samples = scratch("samples", rows, taps)
        samples.view(*frames.shape).copy_(frames)
        after = samples[:, middle:]  # [n, pairs]: the middle sample, where there is one, and those after it
        before = scratch("before", rows, pairs)
        torch.index_select(samples, 1, self.before, out=before)
        even = torch.add(after, before, out=scratch("even", rows, pairs))
        odd = torch.sub(after, before, out=scratch("odd", rows, pairs))
        if taps % 2:
            even[:, 0] = samples[:, middle]  # paired with itself
        even.mul_(self.window)
        odd.mul_(self.window)
        shift = _frame_shift(torch.maximum(largest(even, before), largest(odd, before)), self.tables)
        factor = self.powers(-shift)[:, None]
        parts = []
        for name, folded, wave in (("real", even, self.cosines), ("imaginary", odd, self.sines)):
            # Integers of 21 bits times int16 cosines: sums of up to 2048 have less than 48 bits, OUTPUT_SHIFT of them fractional.
            round_half_up(folded.mul_(factor))
            parts.append(round_half_up(torch.mm(folded, wave, out=scratch(name, rows, wave.shape[1]))))
        return (parts[0], parts[1]), shift


class Fourier(nn.Module):
    """Mixed-radix FFT of n_fft / 2 complex values, frames along the last axis."""

    window: Tensor
    order: Tensor
    mirror: Tensor
    backwards: Tensor

    def __init__(self, tables: Tables, powers: Powers) -> None:
        super().__init__()
        self.tables, self.powers = tables, powers
        n_fft = tables.spec.n_fft
        self._points = n_fft // 2
        self._columns = tables.taps + tables.taps % 2
        window = nn.functional.pad(_whole_window(tables), (0, self._columns - tables.taps))
        sine = torch.from_numpy(tables.transform.wave.astype(np.float64)) * _FRACTION
        wave = torch.complex(sine[n_fft // 4 :], -sine[:n_fft])  # exp(-2 pi i index / n_fft)
        order = torch.empty(self._points, dtype=torch.int64)
        order[torch.from_numpy(tables.transform.order)] = torch.arange(
            self._points
        )  # where value n of the transform comes from
        half = self._points // 2
        self.register_buffer("mirror", torch.arange(self._points - 1, half - 1, -1), persistent=False)
        self.register_buffer("backwards", torch.arange(half - 1, -1, -1), persistent=False)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("split_wave", wave[1 : self._points // 2 + 1, None].contiguous(), persistent=False)
        length = 1
        for number, radix in enumerate(tables.transform.radices):
            step = n_fft // (length * radix)
            turns = torch.outer(torch.arange(1, radix), torch.arange(1, length)) * step
            self.register_buffer(
                f"turn_{number}", wave[turns][..., None], persistent=False
            )  # [radix - 1, length - 1, 1]
            if radix not in (2, 4):
                index = torch.outer(torch.arange(1, radix), torch.arange(1, radix)) % radix * (n_fft // radix)
                self.register_buffer(f"matrix_{number}", wave[index], persistent=False)
            length *= radix

    def forward(self, frames: Tensor, scratch: Scratch) -> tuple[Parts, Tensor]:
        """See the module."""
        clips, count, taps = frames.shape
        rows, columns = clips * count, self._columns
        windowed = scratch("windowed", rows, columns)
        windowed.view(clips, count, columns)[..., :taps].copy_(frames)
        windowed[:, taps:] = 0.0
        windowed.mul_(self.window)
        shift = _frame_shift(largest(windowed, scratch("spare", rows, columns)), self.tables)
        round_half_up(windowed.mul_(self.powers(-shift)[:, None]))
        pairs = torch.view_as_complex(windowed.view(rows, -1, 2))  # even samples + i odd ones
        data, other = (scratch(name, self._points + 1, rows, dtype=torch.complex128) for name in ("data", "other"))
        # The phase is not used, so the window stands at the start of the transform; zeros follow it.
        data[columns // 2 :] = 0.0
        data[: columns // 2].copy_(pairs.T)
        torch.index_select(data, 0, self.order, out=other[:-1])
        data, other, length = other, data, 1
        for number, radix in enumerate(self.tables.transform.radices):
            if self._stage(data[:-1], other[:-1], number, length, radix, scratch):
                data, other = other, data
            length *= radix
        return self._split(data[:-1], other, scratch), shift

    def _stage(self, data: Tensor, other: Tensor, number: int, length: int, radix: int, scratch: Scratch) -> bool:
        """Join `radix` neighbouring transforms of `length` points each; data, other [points, n] are used up.

        Returns whether the result is in `other`.
        """
        shape = (len(data) // (radix * length), radix, length, data.shape[1])
        parts, spare = data.view(shape), other.view(shape)
        if length > 1:
            parts[:, 1:, 1:].mul_(self.get_buffer(f"turn_{number}"))  # point 0 is not turned
            round_half_up(torch.view_as_real(data))
        if radix == 2:
            torch.add(parts[:, 0], parts[:, 1], out=spare[:, 0])
            torch.sub(parts[:, 0], parts[:, 1], out=spare[:, 1])
            return True
        if radix == 4:
            # Sums, then differences, of parts 0 and 2, 1 and 3.
            torch.add(parts[:, :2], parts[:, 2:], out=spare[:, :2])
            torch.sub(parts[:, :2], parts[:, 2:], out=spare[:, 2:])
            spare[:, 3].mul_(-1j)
            torch.add(spare[:, ::2], spare[:, 1::2], out=parts[:, :2])
            torch.sub(spare[:, ::2], spare[:, 1::2], out=parts[:, 2:])
            return False
        rows = scratch("rows", 2, radix - 1, shape[0], length * shape[3], dtype=data.dtype)
        rows[0].view(radix - 1, shape[0], length, -1).copy_(parts[:, 1:].transpose(0, 1))
        torch.mm(self.get_buffer(f"matrix_{number}"), rows[0].flatten(1), out=rows[1].flatten(1))
        turned = rows[1].view(radix - 1, shape[0], length, -1).transpose(0, 1)
        round_half_up(torch.view_as_real(rows[1]))
        torch.add(parts[:, :1], turned, out=spare[:, 1:])
        torch.sum(parts, 1, out=spare[:, 0])
        return True

    def _split(self, data: Tensor, whole: Tensor, scratch: Scratch) -> Parts:
        """Twice the spectrum of the real samples whose even ones are the real parts of `data`'s transform [points, n]."""
        points, filters, rows = self._points, self.tables.filters, data.shape[1]
        half = points // 2
        near = data[1 : half + 1]
        mirrored, even, odd = (
            scratch(name, half, rows, dtype=torch.complex128) for name in ("mirrored", "even", "odd")
        )
        torch.index_select(data, 0, self.mirror, out=mirrored).conj_physical_()
        torch.add(near, mirrored, out=even)
        torch.sub(near, mirrored, out=odd).mul_(self.get_buffer("split_wave"))
        round_half_up(torch.view_as_real(odd))
        odd.mul_(1j)
        real, imaginary = data[0].real, data[0].imag
        whole[0], whole[points] = 2 * (real + imaginary), 2 * (real - imaginary)
        if filters.high_bin > half:
            torch.add(even, odd, out=mirrored).conj_physical_()
            torch.index_select(mirrored, 0, self.backwards, out=whole[half:points])
        torch.sub(even, odd, out=whole[1 : half + 1])
        used = torch.view_as_real(whole[filters.low_bin : filters.high_bin + 1])
        real, imaginary = (scratch(name, rows, len(used)) for name in ("real", "imaginary"))
        return real.copy_(used[..., 0].T), imaginary.copy_(used[..., 1].T)
