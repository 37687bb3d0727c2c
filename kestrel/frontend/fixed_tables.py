"""Constants and tables of the fixed-point front end, made from the settings of a front end.

Everything here is computed in float64 once, rounded to integers, and then read by the integer model (fixed.py) and by the C
runtime (through fixed_c.py). The arithmetic that uses the tables is written down in docs/fixed-frontend.md; the letters of its
formulas stand in the comments below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kestrel.errors import UsageError
from kestrel.frontend.filters import check, filter_edges, padding
from kestrel.frontend.spec import FrontendSpec
from kestrel.frontend.spectrum import largest_prime_factor

ONE = 32767  # tables of cosines and windows hold 1.0 as this, the largest int16
LARGEST_RADIX = 7
SPECTRUM_LIMIT = 30  # bits that no sum inside the transform exceeds
DENSE_DATA_BITS = 20
LOG_SEGMENTS = 128  # pieces of the logarithm's table
WEIGHT_BITS = 14  # fractional bits of a filter's output
_KEEP_LIMIT = 22

_Table = NDArray[np.int16]


def table(values: ArrayLike, scale: float = 1.0) -> _Table:
    """Round values * scale to int16, halves up.

    Exact halves are frequent (a Hann window passes through 0.5), so a little is added: the last digit of a machine's cosine
    must not decide. Raises ValueError where a value does not fit.
    """
    codes = np.floor(np.asarray(values, np.float64) * scale + (0.5 + 2.0**-20))
    if codes.size and (codes.max() > 32767 or codes.min() < -32768):
        raise ValueError("a table's value does not fit 16 bits")
    return codes.astype(np.int16)


@dataclass(frozen=True, eq=False)
class Transform:
    """How the spectrum is computed: by FFT of n_fft / 2 complex values, or by sums over folded samples (`dense`)."""

    dense: bool
    data_bits: int  # B: the windowed samples are scaled to at most 2^B
    output_shift: int  # D: right shift of a dense sum
    bits: int  # S: the spectrum is X 2^(S - r)
    wave: _Table  # FFT: sin(2 pi i / n_fft), i < 5/4 n_fft. Dense: cosines, then sines, n_fft each
    start: int  # dense: index of the first sample of bin 1
    radices: tuple[int, ...]
    order: NDArray[np.int64]  # FFT: where value n of the input goes


@dataclass(frozen=True, eq=False)
class FilterBank:
    """Triangular filters as runs of weights; weights of filter m are scaled by 2^(14 + shift[m])."""

    first: NDArray[np.int64]  # [bands] first bin
    count: NDArray[np.int64]  # [bands] bins, 0 for an empty filter
    shift: NDArray[np.int64]  # [bands] right shift of the weighted sum
    weights: _Table  # all weights, filter by filter
    low_bin: int
    high_bin: int  # bins low_bin .. high_bin are used


@dataclass(frozen=True, eq=False)
class Tables:
    """Constants of one front end. Frame t covers the `taps` samples from t * hop - lead."""

    spec: FrontendSpec
    taps: int
    lead: int
    window: _Table  # [(taps + 1) // 2], the other half is its mirror image
    transform: Transform
    filters: FilterBank
    minimum_shift: int  # r is at least this
    keep_bits: int  # K: real and imaginary part are cut to K bits before they are squared
    log_table: _Table  # [129] log2(1 + i / 128) - i / 128, times 2^16
    log_gain: int  # log2 of the factor between integers and the definition, times 2^16
    log_floor: int  # log2 of the floor, times 2^16
    floor_mantissa: int  # floor of log ln, as mantissa 2^-exponent with 31 bits; 0 for the other logarithms
    floor_exponent: int
    log_bits: int  # fractional bits of the stored logarithms to base 2
    top_codes: int  # top_db in their unit; 0: none
    cosine: _Table  # [4 * mel_bands] cos(pi i / (2 mel_bands)); empty without a cosine transform
    multipliers: tuple[int, int]  # for coefficient 0 and for the others (equal without a cosine transform)
    output_shift: int
    fraction_bits: int  # Q: a feature is code * 2^-Q

    @property
    def width(self) -> int:
        """Features of a frame."""
        return self.spec.coefficients or self.spec.mel_bands

    @property
    def power(self) -> int:
        """Exponent of the magnitude, 1 or 2."""
        return int(self.spec.power)


def log_unit(spec: FrontendSpec) -> float:
    """One octave (a factor of 2) in the unit of the features: ln 2, 10 log10 2 or 20 log10 2."""
    return {"ln": math.log(2.0), "db": 10.0 * math.log10(2.0), "db20": 20.0 * math.log10(2.0)}[spec.log]


def make_tables(spec: FrontendSpec) -> Tables:
    """All constants of a front end. Raises UsageError for settings that the fixed-point front end cannot follow."""
    check(spec)
    _check_fixed(spec)
    window = _window(spec)
    skipped = 1 if window[0] == 0 else 0  # the zero that a periodic Hann window begins with
    taps = len(window) - skipped
    offset = (spec.n_fft - spec.window) // 2 if spec.framing == "fft" else 0
    transform = _transform(spec.n_fft, taps)
    filters = _filters(spec)
    power = int(spec.power)

    heaviest = max((int(run.sum(dtype=np.int64)) for run in _runs(filters)), default=0)
    keep_bits = min(_KEEP_LIMIT, (61 - heaviest.bit_length()) // 2)
    # The window holds ONE for 1.0, and so do the cosines of the dense transform: both are a gain just below 1.
    gain = (ONE / 32768.0) ** (2 if transform.dense else 1)
    octaves_of_gain = power * math.log2(spec.spectrum_scale / gain)
    minimum_shift = 1 - transform.data_bits
    mantissa = exponent = 0
    if spec.log == "ln":
        fraction, power_of_two = math.frexp(spec.log_floor * 2.0**-octaves_of_gain)
        mantissa, exponent = math.floor(fraction * 2**31 + 0.5), 31 - power_of_two
        # The floor must fit 62 bits in the unit of the filters' outputs, which is largest where r is least.
        most = (exponent + 31 - WEIGHT_BITS) // power
        minimum_shift = max(minimum_shift, transform.bits - most)

    low = math.log2(spec.log_floor)
    high = _highest(spec, window)
    log_bits = _fraction_bits(max(abs(low), abs(high)))
    unit = log_unit(spec)
    cosine = np.zeros(0, np.int16)
    if spec.coefficients is None:
        fraction_bits = _fraction_bits(unit * max(abs(low), abs(high)))
        factors = [unit * 2.0 ** (fraction_bits - log_bits)] * 2
    else:
        bands = spec.mel_bands
        cosine = table(np.cos(np.arange(4 * bands) * (math.pi / (2 * bands))), ONE)
        fraction_bits = _fraction_bits(unit * _largest_coefficient(bands, spec.coefficients, low, high))
        norms = math.sqrt(1.0 / bands), math.sqrt(2.0 / bands)
        factors = [unit * norm * 2.0 ** (fraction_bits - log_bits) / ONE for norm in norms]
    output_shift = 14 - math.floor(math.log2(max(factors)))
    multipliers = [math.floor(factor * 2.0**output_shift + 0.5) for factor in factors]
    if max(multipliers) > 32767:  # 0.99999 of a power of two, rounded up
        output_shift -= 1
        multipliers = [math.floor(factor * 2.0**output_shift + 0.5) for factor in factors]

    steps = np.arange(LOG_SEGMENTS + 1) / LOG_SEGMENTS
    return Tables(
        spec=spec,
        taps=taps,
        lead=padding(spec) - offset - skipped,
        window=table(window[skipped:][: (taps + 1) // 2], ONE),
        transform=transform,
        filters=filters,
        minimum_shift=minimum_shift,
        keep_bits=keep_bits,
        log_table=table(np.log2(1.0 + steps) - steps, 65536.0),
        log_gain=math.floor(octaves_of_gain * 65536.0 + 0.5),
        log_floor=math.floor(low * 65536.0 + 0.5),
        floor_mantissa=mantissa,
        floor_exponent=exponent,
        log_bits=log_bits,
        top_codes=0 if spec.top_db is None else math.floor(spec.top_db / unit * 2**log_bits + 0.5),
        cosine=cosine,
        multipliers=(multipliers[0], multipliers[1]),
        output_shift=output_shift,
        fraction_bits=fraction_bits,
    )


def _check_fixed(spec: FrontendSpec) -> None:
    problem = None
    if spec.arithmetic == "shift-add":
        problem = "arithmetic shift-add has a C form of its own (docs/microcontroller.md)"
    elif spec.filters == "iir":
        problem = "filters iir has no fixed-point form"
    elif spec.power not in (1.0, 2.0):
        problem = f"power {spec.power:g} has no fixed-point form, choose 1 or 2"
    elif spec.n_fft % 2 == 0 and (spec.n_fft % 4 or largest_prime_factor(spec.n_fft) > LARGEST_RADIX):
        problem = (
            f"n_fft {spec.n_fft} has no fixed-point form, choose a multiple of 4 without prime factors above "
            f"{LARGEST_RADIX}, or an odd number"
        )
    elif spec.spectrum_scale <= 0:
        problem = "spectrum_scale must be above 0"
    elif spec.n_fft > 4096:
        problem = f"n_fft {spec.n_fft} has no fixed-point form, 4096 is the most"
    elif spec.top_db == 0:
        problem = "top_db must be above 0"
    if problem:
        raise UsageError(f"front end {spec.name!r}: {problem}")


def _window(spec: FrontendSpec) -> NDArray[np.float64]:
    """The window of filters.analysis_window [window]; that one is computed by vector code whose last digits vary."""
    number = np.arange(spec.window)
    if spec.window_function == "hann":
        return 0.5 - 0.5 * np.cos(2.0 * math.pi / spec.window * number)
    return 0.54 - 0.46 * np.cos(2.0 * math.pi / max(1, spec.window - 1) * number)


def _transform(n_fft: int, taps: int) -> Transform:
    if n_fft % 2:
        # |X| is asked for, so phases may count from the middle of the window. Where that lies between two samples, distances
        # are halves; n_fft is odd, so a half is (n_fft + 1) / 2 in indices modulo n_fft, but for a sign per bin.
        angle = np.arange(n_fft) * (2.0 * math.pi / n_fft)
        pairs = (taps + 1) // 2
        shift = max(0, (pairs << (DENSE_DATA_BITS + 15)).bit_length() - SPECTRUM_LIMIT)
        return Transform(
            dense=True,
            data_bits=DENSE_DATA_BITS,
            output_shift=shift,
            bits=45 - shift,
            wave=np.concatenate([table(np.cos(angle), ONE), table(np.sin(angle), ONE)]),
            start=0 if taps % 2 else (n_fft + 1) // 2,
            radices=(),
            order=np.zeros(0, np.int64),
        )
    points, radices = n_fft // 2, []
    for radix in (7, 5, 3):
        while points % radix == 0:
            radices.append(radix)
            points //= radix
    while points % 4 == 0:
        radices.append(4)
        points //= 4
    radices += [2] if points == 2 else []
    # Decimation in time: the last stage joins transforms of every r-th value, the one before it of every r-th of those, ...
    rest, order, block = np.arange(n_fft // 2), np.zeros(n_fft // 2, np.int64), n_fft // 2
    for radix in reversed(radices):
        block //= radix
        order += rest % radix * block
        rest = rest // radix
    return Transform(
        dense=False,
        data_bits=SPECTRUM_LIMIT - (2 * taps - 1).bit_length(),
        output_shift=0,
        bits=31,
        # Factors of 1 are not multiplied, so the others must have no gain of their own; only +1 itself does not fit.
        wave=table(np.minimum(np.sin(np.arange(n_fft + n_fft // 4) * (2.0 * math.pi / n_fft)), ONE / 32768.0), 32768.0),
        start=0,
        radices=tuple(radices),
        order=order,
    )


def filter_bank(spec: FrontendSpec) -> NDArray[np.float64]:
    """Triangular filters [n_fft // 2 + 1, mel_bands] as filters.mel_filters, in float64.

    That function answers in float32, rounded along the way, with last digits that differ between processors.
    """
    bins = spec.n_fft // 2 + 1
    corners = np.array(filter_edges(spec))
    if spec.mel_rule == "htk":
        place = np.arange(bins) * (
            (spec.sample_rate // 2) / (bins - 1)
        )  # torchaudio's bins end at half the sample rate
    else:
        place = np.arange(bins, dtype=np.float64)
        corners = np.floor((spec.n_fft + 1) * corners / spec.sample_rate)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        rising = (place[:, None] - low) / (centre - low)
        falling = (high - place[:, None]) / (high - centre)
    bank = np.where(place[:, None] < centre, rising, falling)
    return np.where((place[:, None] >= low) & (place[:, None] < high), bank, 0.0)


def _filters(spec: FrontendSpec) -> FilterBank:
    bank = filter_bank(spec)
    first, count, shifts, weights = [], [], [], []
    for column in bank.T:
        # Each filter is scaled by a power of two of its own: one that is narrower than the distance of two bins may hold
        # nothing but a single small weight.
        largest = float(column.max())
        exponent = min(WEIGHT_BITS + 24, math.floor(math.log2(ONE / largest))) if largest > 0 else WEIGHT_BITS
        codes = table(column, 2.0**exponent)
        used = codes.nonzero()[0]
        run = codes[used[0] : used[-1] + 1] if len(used) else codes[:0]
        first.append(int(used[0]) if len(used) else 0)
        count.append(len(run))
        shifts.append(exponent - WEIGHT_BITS if len(used) else 0)
        weights.append(run)
    spans = [(start, start + length - 1) for start, length in zip(first, count, strict=True) if length]
    return FilterBank(
        first=np.array(first, np.int64),
        count=np.array(count, np.int64),
        shift=np.array(shifts, np.int64),
        weights=np.concatenate(weights),
        low_bin=min((span[0] for span in spans), default=1),
        high_bin=max((span[1] for span in spans), default=1),
    )


def _runs(filters: FilterBank) -> list[_Table]:
    ends = np.cumsum(filters.count)
    return [filters.weights[end - count : end] for end, count in zip(ends, filters.count, strict=True) if count]


def _highest(spec: FrontendSpec, window: NDArray[np.float64]) -> float:
    """log2 of a bound of the filters' outputs: no spectrum is above the sum of the window."""
    heaviest = float(filter_bank(spec).sum(0).max())
    octaves = spec.power * math.log2(spec.spectrum_scale * float(np.abs(window).sum()))
    floor = math.log2(spec.log_floor)
    if heaviest == 0:
        return floor
    octaves += math.log2(heaviest)
    return math.log2(2.0**octaves + spec.log_floor) if spec.log == "ln" else max(octaves, floor)


def _largest_coefficient(bands: int, kept: int, low: float, high: float) -> float:
    """Bound of the cosine transform's magnitudes, inputs in low .. high."""
    largest = 0.0
    for k in range(kept):
        row = np.cos(math.pi / bands * k * (np.arange(bands) + 0.5)) * math.sqrt((1.0 if k == 0 else 2.0) / bands)
        ends = np.stack([row * low, row * high])
        largest = max(largest, float(ends.max(0).sum()), -float(ends.min(0).sum()))
    return largest


def _fraction_bits(largest: float) -> int:
    """Fractional bits with which +-largest fits int16."""
    return math.floor(math.log2(32767.0 / largest)) if largest > 0 else 15
