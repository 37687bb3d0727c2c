"""The shift-add front end as an integer model: int16 samples to int16 features, bit for bit what the C code computes.

The arithmetic is defined in docs/microcontroller.md: a half-band filter, blocks of 256 samples, an int16 transform with block
scaling and twiddles of few signed digits, the Hann window as three bins of the spectrum, a magnitude of two shifts,
triangular filters as running sums, and a logarithm by table. Everything fits int32.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.frontend import shift_add_tables as constants
from kestrel.frontend.filters import frame_count
from kestrel.frontend.shift_add_tables import POINTS, QUARTER, WINDOW, ShiftAddTables, shift_add_tables
from kestrel.frontend.spec import FrontendSpec

_FRAMES = 1024  # frames in work at a time: their transforms stay in the processor's cache
_FULL_SCALE = 32768.0


def digits(x: Tensor) -> Tensor:
    """Binary digits of int32 0 <= x < 2^24, int32; those of 0 are 0."""
    return torch.frexp(x.float()).exponent.int()


def _largest_digits(x: Tensor) -> Tensor:
    """Digits of the largest of x ^ (x >> 31), per row of x [n, ...] int32: [n]."""
    return digits(torch.maximum(x.amax(dim=tuple(range(1, x.dim()))), -1 - x.amin(dim=tuple(range(1, x.dim())))))


def _shifted(x: Tensor, bits: Tensor) -> Tensor:
    """x [n, ...] shifted right by bits [n] >= 0, halves up."""
    bits = bits.view(-1, *[1] * (x.dim() - 1))
    return (x + ((torch.ones_like(bits) << bits) >> 1)) >> bits


class ShiftAddFeatures(nn.Module):
    """Shift-add front end with the interface of fixed.FixedFeatures: `scale` is what a code stands for, in octaves.

    Raises UsageError for settings that it cannot follow. Holds no trained values: its state_dict is empty.
    """

    cosine: Tensor
    log_table: Tensor
    order: Tensor
    taps: Tensor

    def __init__(self, spec: FrontendSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tables: ShiftAddTables = shift_add_tables(spec)
        self.width = spec.mel_bands
        self.fraction_bits = constants.LOG_BITS
        self.scale = 2.0**-self.fraction_bits
        order = [int(f"{place:07b}"[::-1], 2) for place in range(POINTS)]
        for name, values in (
            ("cosine", torch.from_numpy(self.tables.cosine)),
            ("log_table", torch.from_numpy(self.tables.log_table)),
            ("order", torch.tensor(order)),
        ):
            self.register_buffer(name, values, persistent=False)

    def frames(self, samples: int) -> int:
        """T of a clip of `samples` samples; UsageError where it is too short."""
        return frame_count(self.spec, samples)

    def describe_empty_filters(self) -> str | None:
        """None: every filter holds a bin."""
        return None

    def forward(self, wave: Tensor) -> Tensor:
        """Features float32 [B, T, F], codes times `scale`, of int16 samples [B, S] or of float32 ones in -1..1."""
        if wave.dim() != 2:
            raise ValueError(f"expected wave [B, S], got {tuple(wave.shape)}")
        if wave.dtype != torch.int16:
            wave = torch.round(wave * _FULL_SCALE).clamp_(-32768, 32767).to(torch.int16)
        return self.codes(wave).float().mul_(self.scale)

    @torch.no_grad()
    def codes(self, samples: Tensor) -> Tensor:
        """Feature codes int16 [B, T, F] of samples int16 [B, S]; every clip by itself."""
        if samples.dim() != 2 or samples.dtype != torch.int16:
            raise UsageError(f"expected int16 samples [B, S], not {samples.dtype} of shape {list(samples.shape)}")
        frames = self.frames(samples.shape[1])
        out = torch.empty(len(samples), frames, self.width, dtype=torch.int16, device=samples.device)
        step = max(1, _FRAMES // frames)
        for start in range(0, len(samples), step):
            low = self.decimate(samples[start : start + step])
            blocks = low.as_strided((len(low), frames, WINDOW), (low.stride(0), self.spec.hop, 1))
            spectrum, exponent = self._spectrum(blocks.reshape(-1, WINDOW).int())
            made = self._logarithm(self._filters(spectrum), exponent)
            out[start : start + step] = made.view(-1, frames, self.width)
        return out

    def decimate(self, samples: Tensor) -> Tensor:
        """int16 [B, S] -> int16 [B, S // decimation]: every second output of the half-band filter, from silence on."""
        if self.spec.decimation == 1:
            return samples
        count = samples.shape[1] // 2
        taps = constants.HALF_BAND
        pairs = nn.functional.pad(samples[:, : 2 * count].int(), (2 * len(taps), 0))
        even, odd = pairs[:, ::2], pairs[:, 1::2]
        first = len(taps)
        total = constants.HALF_BAND_MIDDLE * even[:, first - constants.HALF_BAND_DELAY :][:, :count]
        for age, tap in enumerate(taps):
            total = total + tap * odd[:, first - age :][:, :count]
        half = 1 << (constants.HALF_BAND_SHIFT - 1)
        return ((total + half) >> constants.HALF_BAND_SHIFT).clamp_(-32768, 32767).to(torch.int16)

    # ------------------------------------------------------------------------------------------------------- spectrum

    def _spectrum(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """int32 samples [n, 256] -> (real, imaginary) int32 [n, 129] of twice the spectrum times 2^exponent [n]."""
        lift = constants.STAGE_BITS - _largest_digits(x)  # [n], below 0 for loud frames
        x = _shifted(x << lift.clamp(min=0)[:, None], (-lift).clamp(min=0))
        exponent = lift
        real, imaginary = x[:, ::2][:, self.order], x[:, 1::2][:, self.order]  # [n, 128]
        for stage in range(constants.STAGES):
            half = 1 << stage
            real, imaginary, cut = self._fitted(real, imaginary, constants.STAGE_BITS)
            exponent = exponent - cut
            real, imaginary = self._stage(real, imaginary, half)
        real, imaginary, cut = self._fitted(real, imaginary, constants.SPLIT_BITS)
        return self._split(real, imaginary), exponent - cut

    @staticmethod
    def _fitted(real: Tensor, imaginary: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Both parts shifted right until they have at most `bits` digits, and by how much [n]."""
        cut = (torch.maximum(_largest_digits(real), _largest_digits(imaginary)) - bits).clamp(min=0)
        if not cut.any():
            return real, imaginary, cut
        return _shifted(real, cut), _shifted(imaginary, cut), cut

    def _turn(self, real: Tensor, imaginary: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """(real, imaginary) times exp(-2 pi i angle / 256), angles 0 .. 64 along the last axis."""
        cosine, sine = self.cosine[angles], self.cosine[QUARTER - angles]
        half, bits = 1 << (constants.TWIDDLE_BITS - 1), constants.TWIDDLE_BITS
        return (
            real.mul(cosine).addcmul_(imaginary, sine).add_(half).bitwise_right_shift_(bits),
            imaginary.mul(cosine).addcmul_(real, sine, value=-1).add_(half).bitwise_right_shift_(bits),
        )

    def _stage(self, real: Tensor, imaginary: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """Joins neighbouring transforms of `half` points."""
        shape = (len(real), POINTS // (2 * half), 2, half)
        a_re, b_re = real.reshape(shape).unbind(2)  # [n, groups, half]
        a_im, b_im = imaginary.reshape(shape).unbind(2)
        if half > 1:
            angles = torch.arange(half // 2, device=real.device) * (POINTS // half)
            below = self._turn(b_re[..., : half // 2], b_im[..., : half // 2], angles)
            turned = self._turn(b_re[..., half // 2 :], b_im[..., half // 2 :], angles)
            # A quarter turn more: times -i, after the rounding.
            b_re = torch.cat([below[0], turned[1]], -1)
            b_im = torch.cat([below[1], -turned[0]], -1)
        joined = (
            torch.stack([a_re + b_re, a_re - b_re], 2),
            torch.stack([a_im + b_im, a_im - b_im], 2),
        )
        return joined[0].view(len(real), -1), joined[1].view(len(real), -1)

    def _split(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """The transform of pairs of samples -> twice the spectrum of the samples, bins 0 .. 128."""
        k = torch.arange(1, QUARTER + 1, device=real.device)
        even_re, odd_re = real[:, k] + real[:, POINTS - k], real[:, k] - real[:, POINTS - k]
        even_im, odd_im = imaginary[:, k] - imaginary[:, POINTS - k], imaginary[:, k] + imaginary[:, POINTS - k]
        turned_re, turned_im = self._turn(odd_re, odd_im, k)
        out_re, out_im = (real.new_zeros(len(real), POINTS + 1) for _ in range(2))
        out_re[:, 0], out_re[:, POINTS] = 2 * (real[:, 0] + imaginary[:, 0]), 2 * (real[:, 0] - imaginary[:, 0])
        out_re[:, POINTS - k], out_im[:, POINTS - k] = even_re - turned_im, -even_im - turned_re
        out_re[:, k], out_im[:, k] = even_re + turned_im, even_im - turned_re
        return out_re, out_im

    # -------------------------------------------------------------------------------------------- filters and logarithm

    def _filters(self, spectrum: tuple[Tensor, Tensor]) -> Tensor:
        """int32 [n, bands]: sums of triangular filters over magnitudes, behind a Hann window."""
        corners = self.tables.corners.tolist()
        low, high = corners[0], corners[-1]  # magnitudes of bins low .. high - 1 are used; at low the weight is 0
        parts = [
            (2 * part[:, low:high] - part[:, low - 1 : high - 1] - part[:, low + 1 : high + 1]).abs_()
            for part in spectrum
        ]
        larger, smaller = torch.maximum(*parts), torch.minimum(*parts)
        values = torch.maximum(larger, larger - (larger >> 3) + (smaller >> 1))  # [n, bins]
        sums, falling = [], []
        for segment, (start, stop) in enumerate(itertools.pairwise(corners)):
            part = values[:, start - low : stop - low]
            weights = torch.arange(stop - start, 0, -1, dtype=torch.int32, device=part.device)
            weighted = (part * weights).sum(1, dtype=torch.int32)
            half = 1 << (constants.RECIPROCAL_BITS - 1)
            scaled = weighted * int(self.tables.reciprocal[segment]) + half
            falling.append(scaled >> constants.RECIPROCAL_BITS)
            sums.append(part.sum(1, dtype=torch.int32))
        rising = torch.stack(sums[:-1], 1) - torch.stack(falling[:-1], 1)
        return rising + torch.stack(falling[1:], 1)

    def _logarithm(self, x: Tensor, exponent: Tensor) -> Tensor:
        """64 log2 of x [n, bands] >= 0, times 2^-(exponent + 18), not below the floor: int16."""
        bits = constants.LOG_BITS
        length = digits(x)
        leading = (x << (bits + 1 - length).clamp(min=0)) >> (length - bits - 1).clamp(min=0)
        mantissa = self.log_table[(leading & ((1 << bits) - 1)).long()]
        octaves = length - 1 - constants.SCALE_BITS - exponent[:, None]
        found = torch.where(x > 0, (octaves << bits) + mantissa, self.tables.floor)
        return found.clamp_(min=self.tables.floor).to(torch.int16)


def shift_add_codes(spec: FrontendSpec, audio: ArrayLike) -> NDArray[np.int16]:
    """Feature codes int16 [B, T, F] of samples int16 [B, S]."""
    return ShiftAddFeatures(spec).codes(torch.from_numpy(np.array(audio, np.int16))).numpy()
