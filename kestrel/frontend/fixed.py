"""The fixed-point front end as an integer model: int16 samples to int16 features, bit for bit what the C runtime computes.

The arithmetic is defined in docs/fixed-frontend.md. Most of it runs in float64 on integers (or integers times 2^-15) below
2^53: such sums and products are exact in any order, so matrix products and complex numbers may be used, on any device. What
does not fit runs in int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from kestrel.errors import UsageError
from kestrel.frontend.filters import describe_empty_filters, frame_count, padding
from kestrel.frontend.fixed_spectrum import Folded, Fourier, Powers, Scratch, largest, round_half_up
from kestrel.frontend.fixed_tables import LOG_SEGMENTS, WEIGHT_BITS, Tables, make_tables
from kestrel.frontend.spec import FrontendSpec

_CPU_FRAMES = 512  # frames computed at a time by each thread: fewer cost more in calls, more leave the caches
_GPU_FRAMES = 1 << 14
_SEGMENT_BITS = 16 - LOG_SEGMENTS.bit_length() + 1
_GROUP = 20  # filters of a group, which is multiplied with its own bins only
_HALF_WORD = 22  # values of bins have up to 45 bits: they are multiplied with weights in two parts
_FLOAT_BIAS = 1023  # of a float64's exponent
_FULL_SCALE = 32768.0


def half_of(bits: Tensor) -> Tensor:
    """2^(bits - 1) of int64 bits, 0 for bits = 0: what rounding adds before a right shift."""
    return (torch.ones_like(bits) << bits) >> 1


def shift_right_(x: Tensor, bits: int) -> Tensor:
    """x * 2^-bits of int64 x, bits >= 0, rounded to the nearest integer, halves up, in place."""
    return x.add_((1 << bits) >> 1).bitwise_right_shift_(bits)


def saturate16(x: Tensor) -> Tensor:
    """The nearest value of 16-bit two's complement; x is used up."""
    return x.clamp_(-32768, 32767).to(torch.int16)


def bit_length(x: Tensor) -> Tensor:
    """Binary digits of int64 0 <= x < 2^63, int64; those of 0 are 0."""
    digits = torch.frexp(x.double()).exponent.long()
    # Above 2^53 the conversion may round up to the next power of two.
    return digits - ((digits > 0) & (x >> (digits - 1).clamp(min=0) == 0)).long()


def log2_corrections(log_table: NDArray[np.int16]) -> Tensor:
    """What step 7 adds to the mantissa's first 16 bits f, for every f: int64 [65536]."""
    table = torch.from_numpy(log_table.astype(np.int64))
    fraction = torch.arange(1 << 16)
    segment, rest = fraction >> _SEGMENT_BITS, fraction & ((1 << _SEGMENT_BITS) - 1)
    low = table[segment]
    return low + shift_right_((table[segment + 1] - low) * rest, _SEGMENT_BITS)


def log2_fixed(x: Tensor, corrections: Tensor, scratch: Scratch) -> Tensor:
    """log2 of int64 0 <= x < 2^63, times 2^16: the mantissa's first 16 bits with their correction; 0 gives -1023 * 2^16.

    The result stands in `x`.
    """
    # Cut to what float64 holds exactly. Its bits are then exponent and mantissa, as they are wanted.
    spare = torch.bitwise_and(x, -1024, out=scratch("log spare", *x.shape, dtype=torch.int64))
    torch.where(x >= 1 << 53, spare, x, out=spare)
    octaves = scratch("log octaves", *x.shape).copy_(spare).view(torch.int64)
    octaves.bitwise_right_shift_(36).sub_(_FLOAT_BIAS << 16)
    torch.bitwise_and(octaves, 0xFFFF, out=spare)
    torch.index_select(corrections, 0, spare.view(-1), out=x.view(-1))
    return x.add_(octaves)


def magnitude(squares: Tensor) -> Tensor:
    """Square root of int64 0 <= x < 2^62, rounded down to 16 significant bits, float64."""
    half = (bit_length(squares) - 31).clamp(min=0) >> 1  # the least with x >> 2 half below 2^32
    return torch.sqrt((squares >> 2 * half).double()).floor_().long().bitwise_left_shift_(half).double()


@contextmanager
def _serial_operators() -> Iterator[int]:
    """Inside, operators run on the thread that calls them; gives the number of threads that they had before.

    They are short here: threads that meet at the end of each would mostly wait for each other, on a busy machine for long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class FixedFeatures(nn.Module):
    """Fixed-point front end with the interface of features.Frontend; `scale` = 2^-fraction_bits is what a code stands for.

    Raises UsageError for settings without a fixed-point form (power other than 1 or 2; n_fft that is neither odd nor a multiple
    of 4 with prime factors up to 7). Holds no trained values: its state_dict is empty. Not to be called by several threads at a time.
    """

    window: Tensor
    corrections: Tensor
    shifts: Tensor
    halves: Tensor
    multipliers: Tensor
    cosines: Tensor | None

    def __init__(self, spec: FrontendSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tables: Tables = make_tables(spec)
        tables = self.tables
        self.width = tables.width
        self.fraction_bits = tables.fraction_bits
        self.scale = 2.0**-self.fraction_bits
        self.powers = Powers()
        self._scratch: list[Scratch] = []  # one for each thread
        self.spectrum = Folded(tables, self.powers) if tables.transform.dense else Fourier(tables, self.powers)
        self._groups = self._cut_filters()
        shifts = torch.from_numpy(tables.filters.shift)
        multipliers = np.full(self.width, tables.multipliers[1], np.int64)
        multipliers[0] = tables.multipliers[0]
        for name, values in (
            ("corrections", log2_corrections(tables.log_table)),
            ("shifts", shifts),
            ("halves", half_of(shifts)),
            ("multipliers", torch.from_numpy(multipliers)),
            ("cosines", _cosine_matrix(tables)),
        ):
            self.register_buffer(name, values, persistent=False)

    def _cut_filters(self) -> list[tuple[int, int, int, int]]:
        """Groups (first filter, end, first bin, end) of neighbouring filters; their weights become buffers, float64."""
        filters = self.tables.filters
        ends = np.cumsum(filters.count)
        groups: list[tuple[int, int, int, int]] = []
        for first in range(0, len(ends), _GROUP):
            last = min(first + _GROUP, len(ends))
            used = [band for band in range(first, last) if filters.count[band]]
            low = min((int(filters.first[band]) for band in used), default=filters.low_bin)
            high = max((int(filters.first[band] + filters.count[band]) for band in used), default=low + 1)
            weights = torch.zeros(high - low, last - first, dtype=torch.float64)
            for band in used:
                start, count = int(filters.first[band]) - low, int(filters.count[band])
                run = filters.weights[ends[band] - count : ends[band]]
                weights[start : start + count, band - first] = torch.from_numpy(run).double()
            self.register_buffer(f"weights_{len(groups)}", weights, persistent=False)
            groups.append((first, last, low - filters.low_bin, high - filters.low_bin))
        return groups

    def frames(self, samples: int) -> int:
        """T of a clip of `samples` samples; UsageError where it is too short."""
        return frame_count(self.spec, samples)

    def describe_empty_filters(self) -> str | None:
        """One line about filters that hold nothing, or None where there are none."""
        return describe_empty_filters(self.spec, np.flatnonzero(self.tables.filters.count == 0).tolist())

    def forward(self, wave: Tensor) -> Tensor:
        """Features float32 [B, T, F], codes times `scale`, of int16 samples [B, S] or of float32 ones in -1..1.

        Float samples become integers first, as in an analog-digital converter: round(32768 x), halves to even, saturated.
        """
        if wave.dim() != 2:
            raise ValueError(f"expected wave [B, S], got {tuple(wave.shape)}")
        if wave.dtype != torch.int16:
            wave = saturate16(torch.round(wave * _FULL_SCALE))
        return self.codes(wave).float().mul_(self.scale)

    def codes(self, samples: Tensor) -> Tensor:
        """Feature codes int16 [B, T, F] of samples int16 [B, S]; every clip by itself."""
        return self._blockwise(
            samples, self.width, lambda block, scratch: self.features(self._logs(block, scratch), scratch)
        )

    def logs(self, samples: Tensor) -> Tensor:
        """log2 of the filters' outputs, before top_db: int16 [B, T, mel_bands] in units of 2^-tables.log_bits."""
        return self._blockwise(samples, self.spec.mel_bands, self._logs)

    @torch.no_grad()
    def features(self, logs: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Feature codes int16 [B, T, F] of whole clips' `logs` int16 [B, T, mel_bands]."""
        tables, scratch = self.tables, scratch or self._memory(logs.device)
        if tables.top_codes:
            highest = logs.amax((1, 2), keepdim=True).int()
            logs = torch.maximum(logs.int(), highest - tables.top_codes)
        sums = scratch("sums", *logs.shape[:2], self.width, dtype=torch.int64)
        if self.cosines is None:
            sums.copy_(logs)
        else:  # sums of cosines stay below 512 * 2^30
            values = scratch("values", *logs.shape).copy_(logs)
            sums.copy_(torch.matmul(values, self.cosines, out=scratch("cosine sums", *sums.shape)))
        return saturate16(shift_right_(sums.mul_(self.multipliers), tables.output_shift))

    def _memory(self, device: torch.device, number: int = 0) -> Scratch:
        if self._scratch and self._scratch[0].device != device:
            self._scratch.clear()
        while len(self._scratch) <= number:
            self._scratch.append(Scratch(device))
        return self._scratch[number]

    def _blockwise(self, samples: Tensor, width: int, compute: Callable[[Tensor, Scratch], Tensor]) -> Tensor:
        """int16 [B, T, width] made by `compute` from blocks of clips, on a CPU by as many threads as torch has."""
        if samples.dim() != 2 or samples.dtype != torch.int16:
            raise UsageError(f"expected int16 samples [B, S], not {samples.dtype} of shape {list(samples.shape)}")
        clips, frames = len(samples), self.frames(samples.shape[1])
        on_cpu = samples.device.type == "cpu"
        step = max(1, (_CPU_FRAMES if on_cpu else _GPU_FRAMES) // frames)
        starts = range(0, clips, step)
        out = torch.empty(clips, frames, width, dtype=torch.int16, device=samples.device)

        @torch.no_grad()
        def work(scratch: Scratch, mine: range) -> None:
            for start in mine:
                out[start : start + step] = compute(samples[start : start + step], scratch)

        if not on_cpu:
            work(self._memory(samples.device), starts)
            return out
        with _serial_operators() as allowed:
            threads = max(1, min(allowed, len(starts)))
            memories = [self._memory(samples.device, number) for number in range(threads)]
            if threads == 1:
                work(memories[0], starts)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(work, memories, (starts[number::threads] for number in range(threads))))
        return out

    def _logs(self, samples: Tensor, scratch: Scratch) -> Tensor:
        logs = self._log_mel(self._cut(samples, scratch), scratch)
        return logs.view(len(samples), -1, self.spec.mel_bands)

    def _cut(self, samples: Tensor, scratch: Scratch) -> Tensor:
        """The samples under the window, int16 [B, T, taps]: a view of the padded clips."""
        spec, tables = self.spec, self.tables
        count, margin = self.frames(samples.shape[1]), padding(spec)
        start = margin - tables.lead
        length = samples.shape[1] + 2 * margin
        whole = max(length, start + (count - 1) * spec.hop + tables.taps)
        padded = scratch("padded", len(samples), whole, dtype=torch.int16)
        padded[:, length:] = 0  # framing window fills its last frame with zeros
        padded[:, margin : length - margin] = samples
        if margin:
            padded[:, :margin] = samples[:, 1 : margin + 1].flip(1)
            padded[:, length - margin : length] = samples[:, -margin - 1 : -1].flip(1)
        return padded.as_strided((len(samples), count, tables.taps), (padded.stride(0), spec.hop, 1), start)

    def _log_mel(self, frames: Tensor, scratch: Scratch) -> Tensor:
        """int16 [n, mel_bands] of frames [B, T, taps], n = B T."""
        tables = self.tables
        parts, shift = self.spectrum(frames, scratch)  # [n, bins of low_bin .. high_bin], [n]
        if tables.power == 2:
            values, cut = self._square(parts, scratch)
            exponent = 2 * (tables.transform.bits - shift - cut) + WEIGHT_BITS  # [n]
        else:
            real, imaginary = (part.long() for part in parts)
            values = magnitude(real * real + imaginary * imaginary)
            exponent = tables.transform.bits - shift + WEIGHT_BITS
        sums = self._filter(values, scratch).add_(self.halves).bitwise_right_shift_(self.shifts)
        if tables.floor_mantissa:
            bits = (tables.floor_exponent - exponent).clamp_(max=62)
            mantissa = torch.full_like(bits, tables.floor_mantissa) << (-bits).clamp_(min=0)
            bits.clamp_(min=0)
            sums.add_(((mantissa + half_of(bits)) >> bits)[:, None])
        logs = log2_fixed(sums, self.corrections, scratch).add_((tables.log_gain - (exponent << 16))[:, None])
        return saturate16(shift_right_(logs.clamp_(min=tables.log_floor), 16 - tables.log_bits))

    def _square(self, parts: tuple[Tensor, Tensor], scratch: Scratch) -> tuple[Tensor, Tensor]:
        """(|X|^2 float64 [n, bins], the bits cut off before squaring [n]); `parts` are used up."""
        real, imaginary = parts
        spare = scratch("high", *real.shape)
        highest = torch.maximum(largest(real, spare), largest(imaginary, spare))
        cut = (torch.frexp(highest).exponent.long() - self.tables.keep_bits).clamp_(min=0)
        factor = self.powers(-cut)[:, None]
        real, imaginary = (round_half_up(part.mul_(factor)) for part in parts)
        return real.square_().add_(imaginary.square_()), cut

    def _filter(self, values: Tensor, scratch: Scratch) -> Tensor:
        """Weighted sums int64 [n, mel_bands] of values float64 [n, bins]."""
        rows, bands = len(values), self.spec.mel_bands
        halves = scratch("halves", 2, *values.shape)
        torch.mul(values, 2.0**-_HALF_WORD, out=halves[0]).floor_()
        torch.sub(values, halves[0], alpha=2.0**_HALF_WORD, out=halves[1])
        both = scratch("weighted", 2 * rows, bands)
        for number, (first, last, start, end) in enumerate(self._groups):
            torch.mm(halves.flatten(0, 1)[:, start:end], self.get_buffer(f"weights_{number}"), out=both[:, first:last])
        sums = scratch("sums", 2 * rows, bands, dtype=torch.int64).copy_(both)
        return sums[:rows].bitwise_left_shift_(_HALF_WORD).add_(sums[rows:])


class FixedFrontend:
    """The front end for NumPy arrays: feature codes of samples. A feature is code * `scale`; errors as FixedFeatures."""

    def __init__(self, spec: FrontendSpec) -> None:
        self.module = FixedFeatures(spec)
        self.spec, self.tables, self.width = spec, self.module.tables, self.module.width
        self.fraction_bits, self.scale = self.module.fraction_bits, self.module.scale

    def frames(self, samples: int) -> int:
        """T of a clip of `samples` samples; UsageError where it is too short."""
        return self.module.frames(samples)

    def __call__(self, audio: ArrayLike) -> NDArray[np.int16]:
        """Feature codes int16 [B, T, F] of samples int16 [B, S]; every clip by itself."""
        return self.module.codes(_samples(audio)).numpy()

    def logs(self, audio: ArrayLike) -> NDArray[np.int16]:
        """log2 of the filters' outputs, before top_db: int16 [B, T, mel_bands] in units of 2^-tables.log_bits."""
        return self.module.logs(_samples(audio)).numpy()

    def features(self, logs: NDArray[np.int16]) -> NDArray[np.int16]:
        """Feature codes int16 [B, T, F] of whole clips' `logs` [B, T, mel_bands]."""
        return self.module.features(torch.from_numpy(np.ascontiguousarray(logs))).numpy()

    def dequantise(self, codes: ArrayLike) -> NDArray[np.float32]:
        """Feature codes as numbers in the unit of the float front end."""
        return np.asarray(codes, np.float32) * np.float32(self.scale)


def _samples(audio: ArrayLike) -> Tensor:
    samples = np.asarray(audio)
    if samples.dtype != np.int16 or samples.ndim != 2:
        raise UsageError(f"expected int16 samples [B, S], not {samples.dtype} of shape {list(samples.shape)}")
    return torch.from_numpy(np.array(samples, order="C"))


def _cosine_matrix(tables: Tables) -> Tensor | None:
    """[mel_bands, F] of cosines times 32767, float64, or None."""
    if tables.spec.coefficients is None:
        return None
    bands = np.arange(tables.spec.mel_bands)
    index = np.outer(2 * bands + 1, np.arange(tables.spec.coefficients)) % len(tables.cosine)
    matrix = tables.cosine[index].astype(np.float64)
    # The C code adds mirrored bands first; it reads the table in the first half only.
    half = (len(bands) + 1) // 2
    sign = np.where(np.arange(tables.spec.coefficients) % 2, -1.0, 1.0)
    matrix[len(bands) - len(bands) // 2 :] = (matrix[: len(bands) // 2] * sign)[::-1]
    if len(bands) % 2:
        matrix[half - 1, 1::2] = 0.0
    return torch.from_numpy(matrix)
