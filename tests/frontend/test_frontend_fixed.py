"""The integer front end against a naive implementation of docs/fixed-frontend.md, and against the float front end."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kestrel.errors import UsageError
from kestrel.frontend import fixed_c, fixed_tables
from kestrel.frontend.features import Frontend
from kestrel.frontend.filters import analysis_window, frame_count, mel_filters
from kestrel.frontend.fixed import (
    FixedFeatures,
    FixedFrontend,
    bit_length,
    log2_corrections,
    log2_fixed,
    magnitude,
    saturate16,
    shift_right_,
)
from kestrel.frontend.fixed_spectrum import Powers, Scratch, round_half_up
from kestrel.frontend.fixed_tables import Tables, filter_bank, make_tables
from kestrel.frontend.make import make_frontend
from kestrel.frontend.spec import FrontendSpec, stored
from kestrel.quant.quantiser import quantise
from kestrel.settings import build, load_yaml

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(
    path.stem
    for path in (ROOT / "conf" / "frontends").glob("*.yaml")
    if not {"arithmetic: shift-add", "filters: iir"} & set(path.read_text().splitlines())
)
SMALL = FrontendSpec(name="small", n_fft=64, window=64, hop=32, mel_bands=6)


def spec_of(name: str) -> FrontendSpec:
    return build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / f"{name}.yaml"), name)


def clips(count: int, samples: int = 16000, seed: int = 0, loudest: float = 30000.0) -> np.ndarray:
    """Noise with a falling spectrum under a slow envelope, from very quiet to loud, and one least bit of white noise."""
    draw = np.random.default_rng(seed)
    spectrum = np.fft.rfft(draw.standard_normal((count, samples)))
    spectrum /= np.maximum(20.0, np.arange(spectrum.shape[1]))
    waves = np.fft.irfft(spectrum, samples) * (0.02 + np.sin(np.pi * np.arange(samples) / samples) ** 4)
    waves *= np.geomspace(100.0, loudest, count)[:, None] / np.abs(waves).max(1, keepdims=True)
    return np.rint(waves + draw.normal(0, 1, waves.shape)).clip(-32768, 32767).astype(np.int16)


# ---------------------------------------------------------------- primitives


def whole(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@given(st.integers(-(2**61), 2**61), st.integers(0, 62))
def test_shift_right_rounds_halves_up(x: int, bits: int) -> None:
    assume(abs(x) + 2**62 < 2**63)
    assert int(shift_right_(whole(x), bits)) == math.floor(Fraction(x, 2**bits) + Fraction(1, 2))


@given(st.integers(-(2**46), 2**46))
def test_floats_round_halves_up(x: int) -> None:
    """What the transforms round: integers times 2^-15."""
    value = torch.tensor([x * 2.0**-15], dtype=torch.float64)
    assert float(round_half_up(value)) == math.floor(Fraction(x, 2**15) + Fraction(1, 2))


def test_saturation_and_powers() -> None:
    assert saturate16(whole(-40000, -32768, 0, 32767, 32768)).tolist() == [-32768, -32768, 0, 32767, 32767]
    assert [float(Powers()(whole(exponent))) for exponent in range(-62, 63)] == [2.0**e for e in range(-62, 63)]


@given(st.integers(0, 2**62 + 5), st.integers(0, 62), st.integers(-2, 2))
def test_bit_length_and_magnitude(x: int, power: int, distance: int) -> None:
    for value in (x, max(0, 2**power + distance)):
        assert int(bit_length(whole(value))) == value.bit_length()
        if value < 2**62:
            half = 0
            while value >> 2 * half >= 2**32:
                half += 1
            assert int(magnitude(whole(value))) == math.isqrt(value >> 2 * half) << half


CORRECTIONS = log2_corrections(make_tables(SMALL).log_table)


@given(st.integers(1, 2**63 - 1), st.integers(0, 62), st.integers(-2, 2))
def test_log2_cuts_the_mantissa_and_is_exact_to_a_hundred_thousandth(x: int, power: int, distance: int) -> None:
    """Near powers of two float64 would round up to the next octave."""
    table = [int(value) for value in make_tables(SMALL).log_table]
    for value in (x, max(1, min(2**63 - 1, 2**power + distance))):
        got = int(log2_fixed(whole(value), CORRECTIONS, Scratch(torch.device("cpu"))))
        assert got == naive_log2(value, table)
        assert abs(got / 65536 - math.log2(value)) < 5e-5


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_the_float_front_end(name: str) -> None:
    spec = spec_of(name)
    tables = make_tables(spec)
    bank, wanted = filter_bank(spec), mel_filters(spec).numpy()
    assert np.abs(bank - wanted).max() < 5e-4  # float32 of 8 kHz edges
    filters = tables.filters
    assert np.array_equal(filters.count == 0, wanted.max(0) < 1e-6)
    end = 0
    for band, (first, count, shift) in enumerate(zip(filters.first, filters.count, filters.shift, strict=True)):
        run = filters.weights[end : end + count] / 2.0 ** (14 + shift)
        end += count
        assert np.abs(run - bank[first : first + count, band]).max(initial=0) <= 2.0 ** -(15 + shift) + 1e-9
        assert count == 0 or filters.weights[end - count : end].max() >= 16384
    assert end == len(filters.weights)
    window = analysis_window(spec).numpy()[-tables.taps :]
    half = tables.window / 32767.0
    assert np.abs(np.concatenate([half, half[: tables.taps // 2][::-1]]) - window).max() < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_sine_tables_are_symmetric(name: str) -> None:
    """The C code shares products of mirrored entries."""
    spec = spec_of(name)
    wave = make_tables(spec).transform.wave.astype(int)
    n_fft = spec.n_fft
    sine, cosine = (wave[n_fft:], wave[:n_fft]) if n_fft % 2 else (wave[:n_fft], wave[n_fft // 4 :])
    # The largest int16 stands for 1.0, so -1.0 alone may be one code further away.
    difference = sine[1:n_fft] + sine[1:n_fft][::-1]
    assert np.abs(difference).max() <= 1 and np.all((difference == 0) | (np.abs(sine[1:n_fft]) >= 32767))
    assert np.array_equal(cosine[1:n_fft], cosine[1:n_fft][::-1])


# First digits of the headers' SHA-256: they change with the settings and with the format, and must not with the machine.
HEADERS = {"iscas21": "de6bb75fa0fd6f2b", "nas_kws": "44826c3b589a47c1", "spartus": "8bba51beef42927e"}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_the_same_bytes_everywhere(name: str) -> None:
    assert hashlib.sha256(fixed_c.header(make_tables(spec_of(name))).encode()).hexdigest()[:16] == HEADERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_tables_do_not_depend_on_last_digits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's cosines and logarithms may differ there."""
    spec, table = spec_of(name), fixed_tables.table
    wanted = fixed_c.header(make_tables(spec))
    for factor in (1 - 1e-13, 1 + 1e-13):
        monkeypatch.setattr(
            fixed_tables, "table", lambda values, scale=1.0, factor=factor: table(values, scale * factor)
        )
        assert fixed_c.header(make_tables(spec)) == wanted


def test_a_name_cannot_leave_its_comment(tmp_path: Path) -> None:
    spec = FrontendSpec(**{**vars(SMALL), "name": "x */ int y; /*\n#error"})
    fixed_c.write_header(make_tables(spec), tmp_path / "tables.h")
    text = (tmp_path / "tables.h").read_text()
    assert "*/ int" not in text and "\n#error" not in text


# ---------------------------------------------------------------- naive implementation


def rounded(x: int, bits: int) -> int:
    """x 2^-bits in Python's unbounded integers."""
    return (x + (1 << bits >> 1)) >> bits if bits >= 0 else x << -bits


def fits(x: int, bits: int) -> int:
    """`x`, which the C code keeps in a signed integer of `bits`."""
    assert -(1 << (bits - 1)) <= x < 1 << (bits - 1), f"{x} does not fit {bits} bits"
    return x


def naive_fourier(
    values: list[tuple[int, int]], radices: tuple[int, ...], wave: list[int], n_fft: int
) -> list[tuple[int, int]]:
    """Recursive decimation in time; twiddle factors from the one table."""
    if not radices:
        return values
    radix, count = radices[-1], len(values)
    parts = [naive_fourier(values[offset::radix], radices[:-1], wave, n_fft) for offset in range(radix)]

    def product(value: tuple[int, int], index: int) -> tuple[int, int]:
        cosine, sine = wave[index + n_fft // 4], wave[index]
        return value[0] * cosine + value[1] * sine, value[1] * cosine - value[0] * sine

    out = [(0, 0)] * count
    for number in range(count // radix):
        turned = [parts[0][number]]
        for part in range(1, radix):
            value = parts[part][number]
            if number:
                real, imaginary = product(value, part * number * (n_fft // count))
                value = rounded(fits(real, 64), 15), rounded(fits(imaginary, 64), 15)
            turned.append(value)
        for target in range(radix):
            if radix in (2, 4):  # powers of -i
                real = imaginary = 0
                for part, (a, b) in enumerate(turned):
                    turns = part * target * (4 // radix) % 4
                    real += (a, b, -a, -b)[turns]
                    imaginary += (b, -a, -b, a)[turns]
            else:
                sums = [product(turned[part], part * target % radix * (n_fft // radix)) for part in range(1, radix)]
                if target == 0:
                    sums = [(32768 * a, 32768 * b) for a, b in turned[1:]]
                real = turned[0][0] + rounded(fits(sum(a for a, _ in sums), 64), 15)
                imaginary = turned[0][1] + rounded(fits(sum(b for _, b in sums), 64), 15)
            out[number + target * (count // radix)] = fits(real, 32), fits(imaginary, 32)
    return out


def naive_spectrum(frame: list[int], tables: Tables) -> tuple[dict[int, tuple[int, int]], int]:
    """Used bins of a frame [taps], and r."""
    transform, n_fft, taps = tables.transform, tables.spec.n_fft, tables.taps
    wave = [int(value) for value in transform.wave]
    half = [int(value) for value in tables.window]
    windowed = [sample * half[min(place, taps - 1 - place)] for place, sample in enumerate(frame)]
    bins = range(tables.filters.low_bin, tables.filters.high_bin + 1)
    if transform.dense:
        pairs = []
        for pair in range((taps + 1) // 2):
            after, before = windowed[taps // 2 + pair], windowed[taps - 1 - taps // 2 - pair]
            single = taps % 2 == 1 and pair == 0
            pairs.append((fits(after if single else after + before, 32), fits(after - before, 32)))
        shift = max(
            max(abs(part) for pair in pairs for part in pair).bit_length() - transform.data_bits, tables.minimum_shift
        )
        spectrum = {}
        for k in bins:
            real = imaginary = 0
            for place, (even, odd) in enumerate(pairs):
                index = (place + transform.start) * k % n_fft
                real += fits(rounded(even, shift), 32) * wave[index]
                imaginary += fits(rounded(odd, shift), 32) * wave[n_fft + index]
            spectrum[k] = tuple(fits(rounded(fits(part, 64), transform.output_shift), 32) for part in (real, imaginary))
        return spectrum, shift
    shift = max(max(abs(value) for value in windowed).bit_length() - transform.data_bits, tables.minimum_shift)
    scaled = [fits(rounded(value, shift), 32) for value in windowed] + [0] * (n_fft - taps)
    z = naive_fourier(list(zip(scaled[::2], scaled[1::2], strict=True)), transform.radices, wave, n_fft)
    spectrum = {}
    points = n_fft // 2
    for k in bins:
        if k in (0, points):
            spectrum[k] = 2 * (z[0][0] + (z[0][1] if k == 0 else -z[0][1])), 0
            continue
        low = min(k, points - k)
        (a, b), (c, d) = z[low], z[points - low]
        cosine, sine = wave[low + n_fft // 4], wave[low]
        odd_re = rounded((a - c) * cosine + (b + d) * sine, 15)
        odd_im = rounded((b + d) * cosine - (a - c) * sine, 15)
        mirrored = (a + c - odd_im, -(b - d) - odd_re) if k > low else (a + c + odd_im, b - d - odd_re)
        spectrum[k] = fits(mirrored[0], 32), fits(mirrored[1], 32)
    return spectrum, shift


def naive_log2(x: int, table: list[int]) -> int:
    octave = x.bit_length() - 1
    fraction = (x << 16 >> octave) - 65536
    low, high = table[fraction >> 9], table[(fraction >> 9) + 1]
    return octave * 65536 + fraction + low + rounded((high - low) * (fraction & 511), 9)


def naive_logs(frame: list[int], tables: Tables) -> list[int]:
    """One frame's logarithms, following docs/fixed-frontend.md."""
    spectrum, shift = naive_spectrum(frame, tables)
    power = tables.power
    if power == 2:
        largest = max(max(abs(a), abs(b)) for a, b in spectrum.values())
        cut = max(0, largest.bit_length() - tables.keep_bits)
        values = {k: rounded(a, cut) ** 2 + rounded(b, cut) ** 2 for k, (a, b) in spectrum.items()}
        exponent = 2 * (tables.transform.bits - shift - cut) + 14
    else:
        values = {}
        for k, (a, b) in spectrum.items():
            square, half = a * a + b * b, 0
            while square >> 2 * half >= 1 << 32:
                half += 1
            values[k] = fits(math.isqrt(square >> 2 * half) << half, 32)
        exponent = tables.transform.bits - shift + 14
    logs, end, filters = [], 0, tables.filters
    table = [int(value) for value in tables.log_table]
    for first, count, down in zip(filters.first.tolist(), filters.count.tolist(), filters.shift.tolist(), strict=True):
        weights = filters.weights[end : end + count].tolist()
        end += count
        total = rounded(fits(sum(values[first + i] * weight for i, weight in enumerate(weights)), 63), down)
        if tables.floor_mantissa:
            total = fits(total + rounded(tables.floor_mantissa, tables.floor_exponent - exponent), 64)
        log = tables.log_floor
        if total:
            log = max(log, naive_log2(total, table) + tables.log_gain - exponent * 65536)
        logs.append(max(-32768, min(32767, rounded(fits(log, 32), 16 - tables.log_bits))))
    return logs


def naive_features(logs: list[list[int]], tables: Tables) -> list[list[int]]:
    """Features of a whole clip's logarithms."""
    bands = tables.spec.mel_bands
    floor = max(map(max, logs)) - tables.top_codes if tables.top_codes else -32768
    rows = []
    for row in logs:
        raised = [max(log, floor) for log in row]
        if tables.spec.coefficients is None:
            products = [log * tables.multipliers[1] for log in raised]
        else:
            cosine = [int(value) for value in tables.cosine]
            products = []
            for k in range(tables.spec.coefficients):
                # Exactly odd or even about the middle band: mirrored bands take the cosine of the first half.
                total = 0
                for band, log in enumerate(raised):
                    near = min(band, bands - 1 - band)
                    sign = -1 if k % 2 and band > near else 1
                    if not (k % 2 and 2 * band == bands - 1):
                        total += sign * log * cosine[(2 * near + 1) * k % (4 * bands)]
                products.append(total * tables.multipliers[min(k, 1)])
        rows.append([max(-32768, min(32767, rounded(fits(product, 64), tables.output_shift))) for product in products])
    return rows


def hard_clip(samples: int, seed: int) -> np.ndarray:
    """Silence, a lone sample, least noise, full-scale noise, full-scale squares, one after the other."""
    draw = np.random.default_rng(seed)
    parts = np.array_split(np.zeros(samples), 6)
    parts[1][len(parts[1]) // 2] = -32768
    parts[2] = draw.integers(-1, 2, len(parts[2]))
    parts[3] = draw.integers(-32768, 32768, len(parts[3]))
    parts[4][:] = -32768
    parts[5] = np.where(np.arange(len(parts[5])) // 5 % 2, 32767, -32768)
    return np.concatenate(parts).astype(np.int16)


def naive(clip: np.ndarray, frontend: FixedFrontend) -> tuple[list[list[int]], list[list[int]]]:
    """(logs, features) of one clip."""
    spec, tables = frontend.spec, frontend.tables
    count, samples = frame_count(spec, len(clip)), clip.tolist()

    def sample(place: int) -> int:
        if spec.center:
            place = abs(place)
            place = 2 * (len(samples) - 1) - place if place >= len(samples) else place
        return samples[place] if place < len(samples) else 0

    starts = [t * spec.hop - tables.lead for t in range(count)]
    logs = [naive_logs([sample(start + place) for place in range(tables.taps)], tables) for start in starts]
    return logs, naive_features(logs, tables)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nas_kws", "nas_kws20")])
def test_equals_the_naive_implementation(name: str) -> None:
    frontend = FixedFrontend(spec_of(name))
    clip = hard_clip(3000, 1)
    logs, features = naive(clip, frontend)
    assert frontend.logs(clip[None])[0].tolist() == logs
    assert frontend(clip[None])[0].tolist() == features


@settings(max_examples=30, deadline=None)
@given(
    n_fft=st.sampled_from([12, 16, 20, 28, 35, 36, 41, 64, 84]),
    shorter=st.integers(0, 9),
    hop=st.integers(3, 40),
    samples=st.integers(84, 200),  # the longest n_fft
    center=st.booleans(),
    framing=st.sampled_from(["fft", "window"]),
    power=st.sampled_from([1.0, 2.0]),
    window=st.sampled_from(["hann", "hamming"]),
    log=st.sampled_from(["ln", "db", "db20"]),
    floor=st.sampled_from([1e-12, 1e-6, 0.5, 300.0]),
    top_db=st.sampled_from([None, 5.0]),
    bands=st.integers(1, 9),
    coefficients=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 1000),
)
def test_any_settings_equal_the_naive_implementation(
    n_fft, shorter, hop, samples, center, framing, power, window, log, floor, top_db, bands, coefficients, seed
) -> None:
    spec = FrontendSpec(
        name="any", n_fft=n_fft, window=n_fft - shorter, hop=hop, center=center and framing == "fft", framing=framing,
        power=power, window_function=window, log=log, log_floor=floor, top_db=None if log == "ln" else top_db,
        mel_bands=bands, coefficients=None if coefficients is None else min(coefficients, bands),
    )  # fmt: skip
    frontend = FixedFrontend(spec)
    clip = hard_clip(samples, seed)
    logs, features = naive(clip, frontend)
    assert frontend.logs(clip[None])[0].tolist() == logs
    assert frontend(clip[None])[0].tolist() == features


# ---------------------------------------------------------------- against the float front end


# Largest and mean difference in the unit of the features. A step of the codes alone gives a mean of a quarter of it.
ALLOWED = {
    "hello_edge": (0.05, 0.002),
    "hello_edge40": (0.05, 0.002),
    "iscas21": (0.06, 0.003),
    "logmel40": (0.05, 0.0005),
    "nas_kws": (0.25, 0.02),
    "nas_kws20": (0.25, 0.02),
    "nas_kws40": (0.25, 0.02),
    "spartus": (0.1, 0.007),
    "tinyspeech": (0.1, 0.006),
}


@pytest.mark.parametrize("name", NAMES)
def test_is_near_the_float_front_end(name: str) -> None:
    spec = spec_of(name)
    fixed, audio = FixedFrontend(spec), clips(10)
    codes = fixed(audio)
    assert codes.dtype == np.int16 and math.log2(fixed.scale).is_integer()
    mine, wanted = torch.from_numpy(fixed.dequantise(codes)), Frontend(spec)(torch.from_numpy(audio))
    assert mine.shape == wanted.shape == (10, fixed.frames(16000), fixed.width)
    difference = (mine - wanted).abs()
    largest, mean = ALLOWED[name]
    assert difference.max() <= largest and difference.mean() <= mean
    for bits, changed in ((8, 0.05), (4, 0.005)):  # what a network with an input range of 128 sees
        step = 128.0 / 2 ** (bits - 1)
        steps = (quantise(mine, bits, 128.0) - quantise(wanted, bits, 128.0)).abs() / step
        assert steps.max() <= 1 and steps.mean() <= changed


@pytest.mark.parametrize("name", NAMES)
def test_silence_is_the_floor(name: str) -> None:
    spec = spec_of(name)
    fixed, silence = FixedFrontend(spec), np.zeros((1, 16000), np.int16)
    wanted = Frontend(spec)(torch.from_numpy(silence)).numpy()
    relative = np.abs(fixed.dequantise(fixed(silence)) - wanted)
    assert relative.max() <= fixed.scale + 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_quietest_clips_are_as_exact_as_loud_ones(name: str) -> None:
    """Noise of one least bit: block floating point must keep its spectrum."""
    spec = spec_of(name)
    audio = np.random.default_rng(1).integers(-1, 2, (4, 16000)).astype(np.int16)
    fixed = FixedFrontend(spec)
    difference = np.abs(fixed.dequantise(fixed(audio)) - Frontend(spec)(torch.from_numpy(audio)).numpy())
    assert difference.mean() <= ALLOWED[name][1]


@settings(max_examples=30, deadline=None)
@given(
    n_fft=st.sampled_from([64, 81, 101, 128, 160, 168]),
    shorter=st.integers(0, 30),
    hop=st.integers(20, 60),
    center=st.booleans(),
    power=st.sampled_from([1.0, 2.0]),
    window=st.sampled_from(["hann", "hamming"]),
    bands=st.integers(4, 12),
    scale=st.sampled_from([1.0, 0.01, 3000.0]),
    loudness=st.sampled_from([3.0, 300.0, 32000.0]),
)
def test_any_settings_are_near_the_float_front_end(
    n_fft, shorter, hop, center, power, window, bands, scale, loudness
) -> None:
    spec = FrontendSpec(
        name="any", n_fft=n_fft, window=n_fft - shorter, hop=hop, center=center, power=power, window_function=window,
        mel_bands=bands, log="db", log_floor=1e-12, spectrum_scale=scale,
    )  # fmt: skip
    noise = np.random.default_rng(n_fft + shorter).standard_normal((2, 700)) * loudness / 4
    audio = np.rint(noise).clip(-32768, 32767).astype(np.int16)
    fixed = FixedFrontend(spec)
    wanted = Frontend(spec)(torch.from_numpy(audio)).numpy()
    assert np.abs(fixed.dequantise(fixed(audio)) - wanted).max() <= 0.02 + fixed.scale


# ---------------------------------------------------------------- clips and errors


@pytest.mark.parametrize("name", ["iscas21", "nas_kws", "spartus"])
def test_a_clip_does_not_depend_on_its_batch(name: str) -> None:
    fixed, audio = FixedFrontend(spec_of(name)), clips(13, seed=2)
    before, together = audio.copy(), fixed(audio)
    assert np.array_equal(audio, before)
    for clip, wanted in zip(audio, together, strict=True):
        assert np.array_equal(fixed(clip[None])[0], wanted)
    assert np.array_equal(fixed.features(fixed.logs(audio)), together)


def test_top_db_bounds_the_range_of_each_clip() -> None:
    spec = FrontendSpec(name="x", log="db", log_floor=1e-10, top_db=30.0, mel_bands=40)
    fixed = FixedFrontend(spec)
    features = fixed.dequantise(fixed(clips(6)))
    ranges = features.max((1, 2)) - features.min((1, 2))
    assert (np.abs(ranges - 30.0) <= 2 * fixed.scale).all()


@pytest.mark.parametrize("name", ["iscas21", "nas_kws", "spartus"])
def test_blocks_and_earlier_calls_leave_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks share their memory, and so do calls with clips of other lengths."""
    audio = np.concatenate([clips(5, seed=3), hard_clip(16000, 2)[None], np.zeros((1, 16000), np.int16)])
    wanted = FixedFrontend(spec_of(name))(audio)
    monkeypatch.setattr("kestrel.frontend.fixed._CPU_FRAMES", 1)
    fixed = FixedFrontend(spec_of(name))
    assert np.array_equal(fixed(audio), wanted)
    monkeypatch.setattr("kestrel.frontend.fixed._CPU_FRAMES", 100)
    fixed(hard_clip(40000, 1)[None]), fixed(audio[:1, :2000])
    assert np.array_equal(fixed(audio[::-1]), wanted[::-1])


def test_threads_do_not_matter_and_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, audio = FixedFrontend(spec_of("hello_edge")), clips(7, seed=4)
    wanted = fixed(audio)
    monkeypatch.setattr("kestrel.frontend.fixed._CPU_FRAMES", 49)
    torch.set_num_threads(3)  # the fixture of this folder sets it back
    assert np.array_equal(fixed(audio), wanted) and torch.get_num_threads() == 3
    with pytest.raises(UsageError):
        fixed(np.zeros((1, 32), np.int16))
    assert torch.get_num_threads() == 3


def test_no_clips_give_no_features() -> None:
    fixed = FixedFrontend(SMALL)
    assert fixed(np.zeros((0, 640), np.int16)).shape == (0, 21, 6)
    assert fixed.logs(np.zeros((0, 640), np.int16)).shape == (0, 21, 6)


def test_the_module_takes_what_the_float_front_end_takes() -> None:
    """int16 samples, or what augmentation makes of them: float samples that are rounded, halves to even, and saturated."""
    spec = spec_of("hello_edge")
    module, audio = make_frontend(FrontendSpec(**{**vars(spec), "arithmetic": "fixed"})), torch.from_numpy(clips(3))
    assert isinstance(module, FixedFeatures) and isinstance(make_frontend(spec), Frontend)
    assert module.width == 10 and module.frames(16000) == 49 and not module.state_dict()
    wanted = module.codes(audio).float() * module.scale
    assert wanted.dtype == torch.float32 and torch.equal(module(audio), wanted)
    assert torch.equal(module(audio.float() / 32768), wanted)
    ramp = torch.tensor([[-1.5, -1.0, 1.0, 1.5, 2.5 / 32768, 3.5 / 32768, -0.4 / 32768] * 400])
    rounded = torch.tensor([[-32768, -32768, 32767, 32767, 2, 4, 0] * 400], dtype=torch.int16)
    assert torch.equal(module(ramp), module(rounded))
    with pytest.raises(ValueError, match="expected wave"):
        module(audio[0])


def test_float_settings_are_stored_as_before_there_was_a_choice() -> None:
    float_spec, fixed_spec = spec_of("tinyspeech"), spec_of("tinyspeech")
    fixed_spec.arithmetic = "fixed"
    assert "arithmetic" not in stored(float_spec) and stored(fixed_spec)["arithmetic"] == "fixed"
    assert (
        build(FrontendSpec, stored(float_spec)) == float_spec and build(FrontendSpec, stored(fixed_spec)) == fixed_spec
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_fft": 642}, "multiple of 4"),
        ({"n_fft": 88, "window": 64}, "prime factors above 7"),
        ({"power": 1.5}, "choose 1 or 2"),
        ({"n_fft": 8192}, "4096 is the most"),
        ({"spectrum_scale": 0.0}, "spectrum_scale"),
        ({"log": "db", "top_db": 0.0}, "top_db"),
        ({"window": 65}, "longer than n_fft"),
    ],
)
def test_settings_without_a_fixed_point_form_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        FixedFrontend(FrontendSpec(**{**vars(SMALL), **changes}))
    assert "\n" not in str(caught.value)


def test_only_int16_clips_are_accepted() -> None:
    fixed = FixedFrontend(SMALL)
    for audio in (np.zeros((1, 100)), np.zeros(100, np.int16), np.zeros((1, 100), np.int32)):
        with pytest.raises(UsageError, match="int16 samples"):
            fixed(audio)
        with pytest.raises(UsageError, match="int16 samples"):
            fixed.module.codes(torch.from_numpy(audio))
    with pytest.raises(UsageError, match="too short"):
        fixed(np.zeros((1, 32), np.int16))
