"""Power spectrum of overlapping frames, restricted to the bins that a filter bank uses.

Two ways to the same numbers. `FourierPower` runs an FFT, the fastest where n_fft has small factors only. `FoldedPower` is a
matrix product, for lengths such as the prime 641 whose FFT is slow. Only the magnitude is wanted, so the phase may be counted from
the middle of the window, about which the window is even: with pairs e = x[+d] + x[-d] and o = x[+d] - x[-d],

    |X[k]|^2 = (sum_d w[d] e[d] cos(2 pi k d / n_fft))^2 + (sum_d w[d] o[d] sin(2 pi k d / n_fft))^2

which halves the length of both products. The periodic Hann window begins with a zero, so a window of 641 is 320 such pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def largest_prime_factor(number: int) -> int:
    """Largest prime factor of a number above 1."""
    factor, largest = 2, 1
    while number > 1:
        if number % factor:
            factor += 1
        else:
            largest, number = factor, number // factor
    return largest


def power_spectrum(window: Tensor, n_fft: int, hop: int, offset: int, first_bin: int, bins: int) -> FourierPower | FoldedPower:
    """The faster of the two ways for these sizes; arguments as of the classes."""
    kind = FourierPower if largest_prime_factor(n_fft) <= 13 else FoldedPower
    return kind(window, n_fft, hop, offset, first_bin, bins)


class FourierPower(nn.Module):
    """Squared magnitudes by FFT.

    Arguments: window float64 [W]; n_fft; hop; offset = samples from the start of a frame to the start of its window;
    bins first_bin .. first_bin + bins - 1 are computed.
    """

    window: Tensor

    def __init__(self, window: Tensor, n_fft: int, hop: int, offset: int, first_bin: int, bins: int) -> None:
        super().__init__()
        self.n_fft, self.hop, self.offset = n_fft, hop, offset
        self.first_bin, self.bins = first_bin, bins
        self.register_buffer("window", window.float(), persistent=False)

    def workspace(self, clips: int, frames: int, device: torch.device) -> tuple[Tensor, ...]:
        """Scratch memory for `clips` clips of `frames` frames, to be used by several calls."""
        windowed = torch.zeros(clips, frames, self.n_fft, device=device)
        spectrum = torch.empty(clips, frames, self.n_fft // 2 + 1, dtype=torch.complex64, device=device)
        return windowed, spectrum

    def forward(self, padded: Tensor, space: tuple[Tensor, ...], out: Tensor) -> None:
        """Fill out [B, T, bins] from padded [B, S], contiguous; `space` is the workspace of B clips of T frames."""
        windowed, spectrum = space
        clips, frames, _ = out.shape
        width = self.window.numel()
        framed = padded.as_strided((clips, frames, width), (padded.stride(0), self.hop, 1), padded.storage_offset() + self.offset)
        # The phase is not used, so the window may stand at the start of the transform; zeros follow it.
        torch.mul(framed, self.window, out=windowed[:clips, :, :width])
        torch.fft.rfft(windowed[:clips], out=spectrum[:clips])
        parts = torch.view_as_real(spectrum[:clips, :, self.first_bin : self.first_bin + self.bins])
        torch.square(parts[..., 0], out=out)
        out.addcmul_(parts[..., 1], parts[..., 1])


class FoldedPower(nn.Module):
    """Squared magnitudes by two matrix products over folded frames; arguments as FourierPower."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, window: Tensor, n_fft: int, hop: int, offset: int, first_bin: int, bins: int) -> None:
        super().__init__()
        lead = 1 if window[0] == 0 else 0
        span = window[lead:]
        if not torch.allclose(span, span.flip(0), rtol=1e-9, atol=1e-12):
            raise ValueError("the window is not symmetric about its middle")
        self.hop, self.offset, self.bins = hop, offset + lead, bins
        self.length = span.numel()
        self.pairs = (self.length + 1) // 2
        distance = (self.length - 1) / 2 - torch.arange(self.pairs).double()
        # A middle sample is paired with itself: e holds it twice.
        weight = torch.where(distance == 0, 0.5, 1.0) * span[: self.pairs]
        number = torch.arange(first_bin, first_bin + bins).double()
        angle = 2.0 * math.pi / n_fft * torch.outer(distance, number)
        self.register_buffer("cosines", (weight[:, None] * torch.cos(angle)).float(), persistent=False)
        self.register_buffer("sines", (weight[:, None] * torch.sin(angle)).float(), persistent=False)

    def workspace(self, clips: int, frames: int, device: torch.device) -> tuple[Tensor, ...]:
        """As FourierPower.workspace."""
        halves = torch.empty(2, clips, frames, self.pairs, device=device)
        return halves[0], halves[1], torch.empty(clips, frames, self.bins, device=device)

    def forward(self, padded: Tensor, space: tuple[Tensor, ...], out: Tensor) -> None:
        """As FourierPower.forward."""
        clips, frames, bins = out.shape
        even, odd, imaginary = (buffer[:clips] for buffer in space)
        size, strides = (clips, frames, self.pairs), (padded.stride(0), self.hop, 1)
        start = padded.storage_offset() + self.offset
        left = padded.as_strided(size, strides, start)
        right = padded.as_strided(size, strides, start + self.length - self.pairs).flip(-1)
        torch.add(left, right, out=even)
        torch.sub(left, right, out=odd)
        real_rows, imaginary_rows = out.view(-1, bins), imaginary.view(-1, bins)
        torch.mm(even.view(-1, self.pairs), self.cosines, out=real_rows)
        torch.mm(odd.view(-1, self.pairs), self.sines, out=imaginary_rows)
        real_rows.square_().addcmul_(imaginary_rows, imaginary_rows)
