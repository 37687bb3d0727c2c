"""The fixed-point front end as an integer model: int16 samples to int16 features, bit for bit what the C runtime computes.

The arithmetic is defined in docs/fixed-frontend.md. Everything is exact in int64 (products with cosine tables run as float64
matrix products of integers below 2^53, which are exact as well, in any order).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kestrel.errors import UsageError
from kestrel.frontend.filters import frame_count, padding
from kestrel.frontend.fixed_tables import LOG_SEGMENTS, WEIGHT_BITS, Tables, make_tables
from kestrel.frontend.spec import FrontendSpec

Integers = NDArray[np.int64]

_FRAMES = 256  # frames computed at a time: their spectra fit the second-level cache
_SEGMENT_BITS = 16 - LOG_SEGMENTS.bit_length() + 1


def shift_right(x: ArrayLike, bits: ArrayLike) -> Integers:
    """x * 2^-bits rounded to the nearest integer, halves up: (x + 2^(bits - 1)) >> bits. Negative bits shift left."""
    value, amount = np.asarray(x, np.int64), np.asarray(bits, np.int64)
    right, left = np.maximum(amount, 0), np.maximum(-amount, 0)
    half: Integers = np.asarray((np.int64(1) << right) >> 1, np.int64)
    return ((value << left) + half) >> right


def saturate16(x: ArrayLike) -> NDArray[np.int16]:
    """The nearest value of 16-bit two's complement."""
    return np.clip(np.asarray(x), -32768, 32767).astype(np.int16)


def bit_length(x: ArrayLike) -> Integers:
    """Binary digits of integers 0 <= x < 2^63; those of 0 are 0."""
    value = np.asarray(x, np.int64)
    digits = np.frexp(value.astype(np.float64))[1].astype(np.int64)
    # Above 2^53 the conversion may round up to the next power of two.
    return digits - ((digits > 0) & (value >> np.maximum(digits - 1, 0) == 0))


def log2_fixed(x: ArrayLike, log_table: NDArray[np.int16]) -> Integers:
    """log2 of integers x >= 1, times 2^16: the mantissa's first 16 bits plus an interpolated correction."""
    value = np.asarray(x, np.int64)
    octave = bit_length(value) - 1
    fraction = ((value >> np.maximum(octave - 16, 0)) << np.maximum(16 - octave, 0)) & 0xFFFF
    segment = fraction >> _SEGMENT_BITS
    rest = fraction & ((1 << _SEGMENT_BITS) - 1)
    corrections = log_table.astype(np.int64)
    low = corrections[segment]
    return (octave << 16) + fraction + low + shift_right((corrections[segment + 1] - low) * rest, _SEGMENT_BITS)


def magnitude(squares: ArrayLike) -> Integers:
    """Square root of integers 0 <= x < 2^62, rounded down to 16 significant bits."""
    value = np.asarray(squares, np.int64)
    half = np.maximum(bit_length(value) - 31, 0) >> 1  # the least with value >> 2 half below 2^32
    return np.floor(np.sqrt((value >> 2 * half).astype(np.float64))).astype(np.int64) << half


class FixedFrontend:
    """Integer model of a front end. A feature is code * `scale`, with one power-of-two scale for all of them.

    `width` = F. Raises UsageError for settings without a fixed-point form (power other than 1 or 2; n_fft that is neither odd
    nor a multiple of 4 with prime factors up to 7).
    """

    def __init__(self, spec: FrontendSpec) -> None:
        self.spec = spec
        self.tables: Tables = make_tables(spec)
        self.width = self.tables.width
        self.fraction_bits = self.tables.fraction_bits
        self.scale = 2.0**-self.fraction_bits
        tables = self.tables
        half = tables.window.astype(np.int64)
        self._window: Integers = np.concatenate([half, half[: tables.taps // 2][::-1]])
        self._cosine_transform = _cosine_matrix(tables)
        self._spectrum = _Dense(tables) if tables.transform.dense else _Fourier(tables)
        filters = tables.filters
        self._weights = filters.weights.astype(np.int64)
        self._bins: Integers = np.concatenate(
            [np.arange(first, first + count) for first, count in zip(filters.first, filters.count, strict=True)]
        )
        self._used = filters.count > 0
        self._starts = (np.cumsum(filters.count) - filters.count)[self._used]

    def frames(self, samples: int) -> int:
        """T of a clip of `samples` samples; UsageError where it is too short."""
        return frame_count(self.spec, samples)

    def __call__(self, audio: ArrayLike) -> NDArray[np.int16]:
        """Feature codes int16 [B, T, F] of samples int16 [B, S]; every clip by itself."""
        samples = _check_audio(audio)
        out = np.empty((len(samples), self.frames(samples.shape[1]), self.width), np.int16)
        step = max(1, _FRAMES // out.shape[1])
        for start in range(0, len(samples), step):
            logs = self._logs(samples[start : start + step])
            out[start : start + step] = self.features(logs)
        return out

    def dequantise(self, codes: ArrayLike) -> NDArray[np.float32]:
        """Feature codes as numbers in the unit of the float front end."""
        return np.asarray(codes, np.float32) * np.float32(self.scale)

    def logs(self, audio: ArrayLike) -> NDArray[np.int16]:
        """log2 of the filters' outputs, before top_db: int16 [B, T, mel_bands] in units of 2^-tables.log_bits."""
        samples = _check_audio(audio)
        step = max(1, _FRAMES // self.frames(samples.shape[1]))
        return np.concatenate([self._logs(samples[start : start + step]) for start in range(0, len(samples), step)])

    def features(self, logs: NDArray[np.int16]) -> NDArray[np.int16]:
        """Feature codes int16 [B, T, F] of whole clips' `logs` [B, T, mel_bands]."""
        tables = self.tables
        values = logs.astype(np.int64)
        if tables.top_codes:
            values = np.maximum(values, values.max((1, 2), keepdims=True) - tables.top_codes)
        first, others = tables.multipliers
        if self._cosine_transform is None:
            return saturate16(shift_right(values * others, tables.output_shift))
        sums = (values.astype(np.float64) @ self._cosine_transform).astype(np.int64)  # [B, T, F]
        multipliers = np.full(self.width, others, np.int64)
        multipliers[0] = first
        return saturate16(shift_right(sums * multipliers, tables.output_shift))

    def _logs(self, samples: NDArray[np.int16]) -> NDArray[np.int16]:
        frames = self._cut(samples)
        logs = self._log_mel(frames.reshape(-1, self.tables.taps))
        return logs.reshape(len(samples), -1, self.spec.mel_bands)

    def _cut(self, samples: NDArray[np.int16]) -> NDArray[np.int16]:
        """The samples under the window, int16 [B, T, taps]."""
        spec, tables = self.spec, self.tables
        count, margin = self.frames(samples.shape[1]), padding(spec)
        start = margin - tables.lead
        padded = np.pad(samples, ((0, 0), (margin, margin)), mode="reflect") if margin else samples
        missing = start + (count - 1) * spec.hop + tables.taps - padded.shape[1]
        if missing > 0:  # framing window fills its last frame with zeros
            padded = np.pad(padded, ((0, 0), (0, missing)))
        view = np.lib.stride_tricks.sliding_window_view(padded, tables.taps, axis=1)
        return view[:, start :: spec.hop][:, :count]

    def _log_mel(self, frames: NDArray[np.int16]) -> NDArray[np.int16]:
        """int16 [n, mel_bands] of frames [n, taps]."""
        tables, filters = self.tables, self.tables.filters
        real, imaginary, shift = self._spectrum(frames * self._window)  # [n, bins of low_bin .. high_bin], [n]
        if tables.power == 2:
            largest = np.maximum(np.abs(real).max(1), np.abs(imaginary).max(1))
            cut = np.maximum(bit_length(largest) - tables.keep_bits, 0)
            real, imaginary = shift_right(real, cut[:, None]), shift_right(imaginary, cut[:, None])
            values = real * real + imaginary * imaginary
            exponent = 2 * (tables.transform.bits - shift - cut) + WEIGHT_BITS
        else:
            values = magnitude(real * real + imaginary * imaginary)
            exponent = tables.transform.bits - shift + WEIGHT_BITS

        sums = np.zeros((len(frames), len(filters.count)), np.int64)
        if len(self._starts):
            sums[:, self._used] = np.add.reduceat(
                values[:, self._bins - filters.low_bin] * self._weights, self._starts, axis=1
            )
        sums = shift_right(sums, filters.shift)
        if tables.floor_mantissa:
            sums += shift_right(tables.floor_mantissa, np.minimum(tables.floor_exponent - exponent, 62))[:, None]
        logs = log2_fixed(np.maximum(sums, 1), tables.log_table) + (tables.log_gain - (exponent << 16))[:, None]
        logs = np.where(sums == 0, tables.log_floor, np.maximum(logs, tables.log_floor))
        return saturate16(shift_right(logs, 16 - tables.log_bits))


def _check_audio(audio: ArrayLike) -> NDArray[np.int16]:
    samples = np.asarray(audio)
    if samples.dtype != np.int16 or samples.ndim != 2:
        raise UsageError(f"expected int16 samples [B, S], not {samples.dtype} of shape {list(samples.shape)}")
    return samples


def _cosine_matrix(tables: Tables) -> NDArray[np.float64] | None:
    """[mel_bands, F] of cosines times 32767, or None."""
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
    return matrix


def _frame_shift(largest: Integers, tables: Tables) -> Integers:
    """r [n]: the right shift that brings a frame's largest magnitude to data_bits bits, limited for near-silence."""
    return np.maximum(bit_length(largest) - tables.transform.data_bits, tables.minimum_shift)


class _Dense:
    """Spectrum by sums over folded samples, for odd n_fft. Returns real and imaginary parts [n, bins] and shifts r [n]."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        transform, n_fft = tables.transform, tables.spec.n_fft
        pairs = np.arange((tables.taps + 1) // 2)
        bins = np.arange(tables.filters.low_bin, tables.filters.high_bin + 1)
        index = np.outer(pairs + transform.start, bins) % n_fft  # [pairs, bins], from the middle of the window outwards
        self._cosines = transform.wave[:n_fft][index].astype(np.float64)
        self._sines = transform.wave[n_fft:][index].astype(np.float64)

    def __call__(self, windowed: Integers) -> tuple[Integers, Integers, Integers]:
        tables = self._tables
        middle = tables.taps // 2
        after = windowed[:, middle:]  # [n, pairs]: the middle sample, where there is one, and those after it
        before = windowed[:, : tables.taps - middle][:, ::-1]
        even, odd = after + before, after - before
        if tables.taps % 2:
            even[:, 0] = windowed[:, middle]  # paired with itself
        shift = _frame_shift(np.maximum(np.abs(even).max(1), np.abs(odd).max(1)), tables)
        parts = []
        for values, matrix in ((even, self._cosines), (odd, self._sines)):
            sums = shift_right(values, shift[:, None]).astype(np.float64) @ matrix
            parts.append(shift_right(sums.astype(np.int64), tables.transform.output_shift))
        return parts[0], parts[1], shift


class _Fourier:
    """Spectrum by a mixed-radix FFT of n_fft / 2 complex values; results as those of _Dense."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        n_fft = tables.spec.n_fft
        wave = tables.transform.wave.astype(np.int64)
        self._sine, self._cosine = wave[:n_fft], wave[n_fft // 4 :]

    def __call__(self, windowed: Integers) -> tuple[Integers, Integers, Integers]:
        tables = self._tables
        shift = _frame_shift(np.abs(windowed).max(1), tables)
        points = tables.spec.n_fft // 2
        data = np.zeros((points, 2, len(windowed)), np.int64)  # real and imaginary parts of the points, frames last
        # The phase is not used, so the window stands at the start of the transform; zeros follow it.
        scaled = shift_right(windowed, shift[:, None]).T  # [taps, n]
        number = np.arange(tables.taps)
        data[tables.transform.order[number >> 1], number & 1] = scaled
        real, imaginary = data[:, 0].copy(), data[:, 1].copy()
        length = 1
        for radix in tables.transform.radices:
            real, imaginary = self._stage(real, imaginary, length, radix)
            length *= radix
        real, imaginary = self._split(real, imaginary)
        used = slice(tables.filters.low_bin, tables.filters.high_bin + 1)
        return real[used].T, imaginary[used].T, shift

    def _turn(self, real: Any, imaginary: Any, index: Integers) -> tuple[Integers, Integers]:
        """Multiply by exp(-2 pi i index / n_fft) [j], along the values' axis before the last."""
        cosine, sine = self._cosine[index][:, None], self._sine[index][:, None]
        return shift_right(real * cosine + imaginary * sine, 15), shift_right(imaginary * cosine - real * sine, 15)

    def _stage(self, real: Integers, imaginary: Integers, length: int, radix: int) -> tuple[Integers, Integers]:
        """Join `radix` neighbouring transforms of `length` points each."""
        n_fft = self._tables.spec.n_fft
        shape = (len(real) // (length * radix), radix, length, real.shape[1])
        step = n_fft // (length * radix)
        a, b = real.reshape(shape), imaginary.reshape(shape)
        for part in range(1, radix):
            index = np.arange(1, length) * (part * step)  # point 0 is not turned
            a[:, part, 1:], b[:, part, 1:] = self._turn(a[:, part, 1:], b[:, part, 1:], index)
        out_a, out_b = np.empty(shape, np.int64), np.empty(shape, np.int64)
        if radix == 2:
            for target, x in ((out_a, a), (out_b, b)):
                target[:, 0], target[:, 1] = x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]
        elif radix == 4:
            even_a, even_b = a[:, 0] + a[:, 2], b[:, 0] + b[:, 2]
            odd_a, odd_b = a[:, 1] + a[:, 3], b[:, 1] + b[:, 3]
            out_a[:, 0], out_b[:, 0] = even_a + odd_a, even_b + odd_b
            out_a[:, 2], out_b[:, 2] = even_a - odd_a, even_b - odd_b
            even_a, even_b = a[:, 0] - a[:, 2], b[:, 0] - b[:, 2]
            odd_a, odd_b = a[:, 1] - a[:, 3], b[:, 1] - b[:, 3]
            out_a[:, 1], out_b[:, 1] = even_a + odd_b, even_b - odd_a
            out_a[:, 3], out_b[:, 3] = even_a - odd_b, even_b + odd_a
        else:
            out_a[:, 0], out_b[:, 0] = a.sum(1), b.sum(1)
            x, y = a[:, 1:], b[:, 1:]
            for row in range(1, radix):
                index = np.arange(1, radix) * row % radix * (n_fft // radix)
                cosine, sine = self._cosine[index][:, None, None], self._sine[index][:, None, None]
                out_a[:, row] = a[:, 0] + shift_right((x * cosine + y * sine).sum(1), 15)
                out_b[:, row] = b[:, 0] + shift_right((y * cosine - x * sine).sum(1), 15)
        return out_a.reshape(real.shape), out_b.reshape(real.shape)

    def _split(self, real: Integers, imaginary: Integers) -> tuple[Integers, Integers]:
        """Twice the spectrum [n_fft / 2 + 1, n] of the real samples whose even ones are `real`, odd ones `imaginary`."""
        points = len(real)
        out_a, out_b = (np.zeros((points + 1, real.shape[1]), np.int64) for _ in range(2))
        out_a[0], out_a[points] = 2 * (real[0] + imaginary[0]), 2 * (real[0] - imaginary[0])
        k = np.arange(1, points // 2 + 1)
        mirror = points - k
        even_a, even_b = real[k] + real[mirror], imaginary[k] - imaginary[mirror]
        odd_a, odd_b = self._turn(real[k] - real[mirror], imaginary[k] + imaginary[mirror], k)
        out_a[k], out_b[k] = even_a + odd_b, even_b - odd_a
        out_a[mirror], out_b[mirror] = even_a - odd_b, -even_b - odd_a
        return out_a, out_b
