"""Power spectrum of overlapping frames, restricted to the bins that a filter bank uses.

Three ways to the same numbers. `FourierPower` runs an FFT, the fastest where n_fft has small factors only. For lengths
such as the prime 641, whose FFT is slow, `FoldedPower` is a matrix product, and `SharedHalfPower` a shorter one for the
periodic Hann window of 2 hop + 1 samples. Only magnitudes are wanted, so phases may be counted from the middle of a
stretch of samples; with the pairs e = x[+d] + x[-d] and o = x[+d] - x[-d] about that middle, its transform is

    sum_d e[d] cos(2 pi k d / n_fft)  -  i sum_d o[d] sin(2 pi k d / n_fft)

which halves the length of the products.
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


def power_spectrum(
    window: Tensor, n_fft: int, hop: int, offset: int, first_bin: int, bins: int
) -> FourierPower | FoldedPower | SharedHalfPower:
    """The fastest of the three ways for these sizes; arguments as of FourierPower."""
    if largest_prime_factor(n_fft) <= 13:
        return FourierPower(window, n_fft, hop, offset, first_bin, bins)
    hann = torch.hann_window(n_fft, periodic=True, dtype=torch.float64)
    if len(window) == n_fft == 2 * hop + 1 and torch.allclose(window, window.mean() / hann.mean() * hann, rtol=1e-9):
        return SharedHalfPower(window, n_fft, hop, offset, first_bin, bins)
    return FoldedPower(window, n_fft, hop, offset, first_bin, bins)


def _folded_basis(span: Tensor, n_fft: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float64 [pairs, K], of the bins `numbers` for stretches weighted by an even span [L]."""
    length = span.numel()
    pairs = (length + 1) // 2
    distance = (length - 1) / 2 - torch.arange(pairs).double()
    # A sample in the middle is paired with itself: e holds it twice.
    weight = torch.where(distance == 0, 0.5, 1.0) * span[:pairs]
    angle = 2.0 * math.pi / n_fft * torch.outer(distance, numbers.double())
    return weight[:, None] * torch.cos(angle), weight[:, None] * torch.sin(angle)


def _fold(padded: Tensor, start: int, length: int, hop: int, even: Tensor, odd: Tensor) -> None:
    """Fold stretches of `length` samples, each `hop` after the last, into sums and differences [B, T, pairs]."""
    clips, frames, pairs = even.shape
    size, strides, first = (clips, frames, pairs), (padded.stride(0), hop, 1), padded.storage_offset() + start
    left = padded.as_strided(size, strides, first)
    right = padded.as_strided(size, strides, first + length - pairs).flip(-1)
    torch.add(left, right, out=even)
    torch.sub(left, right, out=odd)


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
        framed = padded.as_strided(
            (clips, frames, width), (padded.stride(0), self.hop, 1), padded.storage_offset() + self.offset
        )
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
        lead = 1 if window[0] == 0 else 0  # a periodic window begins with a zero; the rest is even about its middle
        span = window[lead:]
        if not torch.allclose(span, span.flip(0), rtol=1e-9, atol=1e-12):
            raise ValueError("the window is not symmetric about its middle")
        self.hop, self.offset, self.bins = hop, offset + lead, bins
        self.length = span.numel()
        cosines, sines = _folded_basis(span, n_fft, torch.arange(first_bin, first_bin + bins))
        self.register_buffer("cosines", cosines.float(), persistent=False)
        self.register_buffer("sines", sines.float(), persistent=False)

    def workspace(self, clips: int, frames: int, device: torch.device) -> tuple[Tensor, ...]:
        """As FourierPower.workspace."""
        halves = torch.empty(2, clips, frames, self.cosines.shape[0], device=device)
        return halves[0], halves[1], torch.empty(clips, frames, self.bins, device=device)

    def forward(self, padded: Tensor, space: tuple[Tensor, ...], out: Tensor) -> None:
        """As FourierPower.forward."""
        clips, _, bins = out.shape
        even, odd, imaginary = (buffer[:clips] for buffer in space)
        _fold(padded, self.offset, self.length, self.hop, even, odd)
        torch.mm(even.flatten(0, 1), self.cosines, out=out.view(-1, bins))
        torch.mm(odd.flatten(0, 1), self.sines, out=imaginary.view(-1, bins))
        out.square_().addcmul_(imaginary, imaginary)


class SharedHalfPower(nn.Module):
    """Squared magnitudes for the periodic Hann window of n_fft = 2 hop + 1 samples; arguments as FourierPower.

    The window begins with a zero; what follows are two halves of `hop` samples, and frame t shares its second half with
    frame t + 1. So each half is transformed once, without a window, into P[k] counted from its own middle. The frame,
    counted from its middle, is then X[k] = exp(i phi k) P_t[k] + exp(-i phi k) P_{t+1}[k], phi = pi hop / n_fft, and
    the Hann window is applied to bins: X[k] / 2 + X[k - 1] / 4 + X[k + 1] / 4. (The dropped first sample is the same in
    all X, up to the sign of odd k, and adds up to nothing there.)
    """

    cosines: Tensor
    sines: Tensor
    turn_cosine: Tensor
    turn_sine: Tensor

    def __init__(self, window: Tensor, n_fft: int, hop: int, offset: int, first_bin: int, bins: int) -> None:
        super().__init__()
        self.hop, self.offset, self.bins = hop, offset + 1, bins
        columns = -(-(bins + 2) // 16) * 16  # the neighbours of the outer bins, rounded up to whole vector registers
        numbers = torch.arange(first_bin - 1, first_bin - 1 + columns)
        scale = window.mean() * 2.0  # the mean of a Hann window is 1/2
        cosines, sines = _folded_basis(torch.full((hop,), float(scale) / 4.0).double(), n_fft, numbers)
        turn = math.pi * hop / n_fft * numbers.double()
        for name, values in (
            ("cosines", cosines),
            ("sines", sines),
            ("turn_cosine", torch.cos(turn)),
            ("turn_sine", torch.sin(turn)),
        ):
            self.register_buffer(name, values.float(), persistent=False)

    def workspace(self, clips: int, frames: int, device: torch.device) -> tuple[Tensor, ...]:
        """As FourierPower.workspace."""
        pairs, columns = self.cosines.shape
        halves = torch.empty(2, clips, frames + 1, pairs, device=device)
        transforms = torch.empty(2, clips, frames + 1, columns, device=device)
        return *halves, *transforms, *torch.empty(4, clips, frames, columns, device=device)

    def forward(self, padded: Tensor, space: tuple[Tensor, ...], out: Tensor) -> None:
        """As FourierPower.forward."""
        clips, columns = out.shape[0], self.cosines.shape[1]
        even, odd, cosine, sine, real, imaginary, spare, other = (buffer[:clips] for buffer in space)
        _fold(padded, self.offset, self.hop, self.hop, even, odd)
        torch.mm(even.flatten(0, 1), self.cosines, out=cosine.view(-1, columns))
        torch.mm(odd.flatten(0, 1), self.sines, out=sine.view(-1, columns))
        # P = cosine + i sine, since `odd` is left minus right.
        first, second = slice(None, -1), slice(1, None)
        torch.add(cosine[:, first], cosine[:, second], out=real).mul_(self.turn_cosine)
        torch.sub(sine[:, second], sine[:, first], out=spare)
        real.addcmul_(spare, self.turn_sine)
        torch.add(sine[:, first], sine[:, second], out=imaginary).mul_(self.turn_cosine)
        torch.sub(cosine[:, first], cosine[:, second], out=spare)
        imaginary.addcmul_(spare, self.turn_sine)
        for part, windowed in ((real, spare), (imaginary, other)):
            below, middle, above = (part[..., shift : shift + self.bins] for shift in range(3))
            torch.add(below, above, out=windowed[..., : self.bins]).add_(middle, alpha=2.0)
        torch.square(spare[..., : self.bins], out=out)
        out.addcmul_(other[..., : self.bins], other[..., : self.bins])
