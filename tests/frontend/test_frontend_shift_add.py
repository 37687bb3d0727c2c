"""The shift-add front end: against a frame-by-frame reference in plain Python, a float definition, and in training's place."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kestrel.digits import signed_digits
from kestrel.errors import UsageError
from kestrel.frontend.extract import extract
from kestrel.frontend.make import make_frontend, makes_codes
from kestrel.frontend.shift_add import ShiftAddFeatures, shift_add_codes
from kestrel.frontend.shift_add_tables import HALF_BAND, HALF_BAND_MIDDLE, shift_add_tables
from kestrel.frontend.spec import FrontendSpec, stored
from kestrel.settings import build, load_yaml
from kestrel.store.hdf5 import AudioFile, AudioWriter, FeatureFile

ROOT = Path(__file__).resolve().parents[2]
SPEC = build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / "tinyspeech_mcu.yaml"), "front end")


def _turn(re: int, im: int, angle: int, cosine: list[int]) -> tuple[int, int]:
    c, s = cosine[angle], cosine[64 - angle]
    return (re * c + im * s + 1024) >> 11, (im * c - re * s + 1024) >> 11


def _fit(z: list[list[int]], bits: int) -> int:
    reached = max(x if x >= 0 else -1 - x for pair in z for x in pair)
    cut = max(0, reached.bit_length() - bits)
    half = (1 << cut) >> 1
    z[:] = [[(x + half) >> cut for x in pair] for pair in z]
    return cut


def naive_frame(frame: list[int], spec: FrontendSpec) -> list[int]:
    """One frame of 256 samples by the text of the definition, with Python's integers."""
    tables = shift_add_tables(spec)
    cosine = tables.cosine.tolist()
    exponent = 13 - max(x if x >= 0 else -1 - x for x in frame).bit_length()
    half = (1 << max(0, -exponent)) >> 1
    frame = [((x << max(0, exponent)) + half) >> max(0, -exponent) for x in frame]
    z = [[0, 0] for _ in range(128)]
    for place in range(128):
        z[int(f"{place:07b}"[::-1], 2)] = frame[2 * place : 2 * place + 2]
    size = 1
    while size < 128:
        exponent -= _fit(z, 13)
        for start in range(0, 128, 2 * size):
            for number in range(size):
                angle = number * (128 // size)
                re, im = _turn(*z[start + number + size], angle % 64, cosine)
                if angle >= 64:
                    re, im = im, -re
                a = z[start + number]
                z[start + number + size] = [a[0] - re, a[1] - im]
                z[start + number] = [a[0] + re, a[1] + im]
        size *= 2
    exponent -= _fit(z, 12)
    bins = [[2 * (z[0][0] + z[0][1]), 0], *([0, 0] for _ in range(127)), [2 * (z[0][0] - z[0][1]), 0]]
    for k in range(1, 65):
        (a_re, a_im), (b_re, b_im) = z[k], z[128 - k]
        re, im = _turn(a_re - b_re, a_im + b_im, k, cosine)
        bins[128 - k] = [a_re + b_re - im, -(a_im - b_im) - re]
        bins[k] = [a_re + b_re + im, a_im - b_im - re]
    assert all(-32768 <= x <= 32767 for pair in bins for x in pair)
    corners = tables.corners.tolist()
    rising, made = 0, []
    for segment, (first, last) in enumerate(itertools.pairwise(corners)):
        total = falling = 0
        for k in range(first, last):
            x, y = (abs(2 * bins[k][p] - bins[k - 1][p] - bins[k + 1][p]) for p in (0, 1))
            x, y = max(x, y), min(x, y)
            value = max(x, x - (x >> 3) + (y >> 1))
            total += value
            falling += value * (last - k)
        falling = (falling * int(tables.reciprocal[segment]) + 512) >> 10
        if segment:
            made.append(_log(rising + falling, exponent, tables))
        rising = total - falling
    return made


def _log(x: int, exponent: int, tables: object) -> int:
    if x == 0:
        return tables.floor
    length = x.bit_length()
    mantissa = (x << max(0, 7 - length) >> max(0, length - 7)) & 63
    return max(tables.floor, 64 * (length - 19 - exponent) + int(tables.log_table[mantissa]))


def clips(count: int, samples: int = 2000) -> np.ndarray:
    draw = np.random.default_rng(3)
    loud = np.geomspace(1, 32767, count)[:, None]
    rows = np.rint(draw.uniform(-1, 1, (count, samples)) * loud).astype(np.int16)
    rows[0], rows[-1] = 0, np.where(np.arange(samples) % 2, 32767, -32768)
    rows[-2] = -32768
    return rows


def test_codes_equal_the_text() -> None:
    audio = clips(7)
    found = shift_add_codes(SPEC, audio)
    low = ShiftAddFeatures(SPEC).decimate(torch.from_numpy(audio)).tolist()
    for clip, rows in zip(low, found.tolist(), strict=True):
        for frame, row in enumerate(rows):
            assert row == naive_frame(clip[160 * frame : 160 * frame + 256], SPEC)


def test_decimation_is_the_half_band_filter() -> None:
    audio = clips(6)
    taps = np.zeros(19, np.int64)
    taps[::2], taps[9] = HALF_BAND, HALF_BAND_MIDDLE
    assert taps.sum() == 512 and np.array_equal(taps, taps[::-1])
    wanted = np.stack([np.convolve(clip.astype(np.int64), taps)[1 : audio.shape[1] : 2] for clip in audio])
    found = ShiftAddFeatures(SPEC).decimate(torch.from_numpy(audio))
    assert np.array_equal(found.numpy(), ((wanted + 256) >> 9).clip(-32768, 32767))


def test_close_to_the_float_definition() -> None:
    """Speech-like noise: mean error of 1/40 octave, that of a log table of 64 steps and of the magnitude's two shifts."""
    draw = np.random.default_rng(8)
    spectrum = np.fft.rfft(draw.standard_normal((12, 16000)))
    spectrum /= np.maximum(200.0, np.arange(spectrum.shape[1]))
    wave = np.fft.irfft(spectrum)
    audio = np.rint(wave / np.abs(wave).max(1, keepdims=True) * np.geomspace(800, 32000, 12)[:, None]).astype(np.int16)
    found = shift_add_codes(SPEC, audio) / 64
    low = ShiftAddFeatures(SPEC).decimate(torch.from_numpy(audio)).numpy() / 32768
    frames = np.lib.stride_tricks.sliding_window_view(low, 256, axis=1)[:, ::160]
    magnitudes = np.abs(np.fft.rfft(frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256))))
    corners = shift_add_tables(SPEC).corners
    bank = np.stack([np.interp(np.arange(129), corners[m : m + 3], [0, 1, 0]) for m in range(20)], axis=1)
    wanted = np.log2(np.maximum(magnitudes @ bank, SPEC.log_floor))
    assert found.shape == wanted.shape == (12, 49, 20)
    error = np.abs(found - wanted)
    assert error.mean() < 0.025 and np.quantile(error, 0.99) < 0.15


def test_louder_sound_is_the_same_spectrum() -> None:
    audio = (clips(9)[1:-2] // 16).astype(np.int16)
    difference = shift_add_codes(SPEC, audio * 16).astype(int) - shift_add_codes(SPEC, audio)
    loud = shift_add_codes(SPEC, audio) > shift_add_tables(SPEC).floor + 64
    assert loud.any() and abs(difference[loud] - 4 * 64).mean() < 4


def test_tables_need_few_digits() -> None:
    tables = shift_add_tables(SPEC)
    assert max(len(signed_digits(value)) for value in tables.cosine.tolist()) <= 4
    wanted = np.cos(2 * np.pi * np.arange(65) / 256) * 2048
    assert np.abs(tables.cosine - wanted).max() <= 8 and tables.cosine[0] == 2048 and tables.cosine[64] == 0


def test_extraction_stores_codes(tmp_path: Path) -> None:
    audio = clips(6, 4000)
    writer = AudioWriter(
        tmp_path / "audio.h5", labels=[0, 1] * 3, utt_ids=list("abcdef"), speakers=list("uvwxyz"), clip_samples=4000,
        sample_rate=16000, classes=["yes", "no"], corpus="c", protocol={"name": "p", "hash": "h"}, split="test",
    )  # fmt: skip
    with writer:
        writer.append(audio)
    module = make_frontend(SPEC)
    assert makes_codes(module)
    with AudioFile(tmp_path / "audio.h5") as packed:
        extract(packed, module, tmp_path / "test.h5")
    features = FeatureFile(tmp_path / "test.h5")
    assert features.scale == 1 / 64 and features.shape == (6, 11, 20)
    assert np.array_equal(features.rows(np.arange(6)), shift_add_codes(SPEC, audio).astype(np.float32) / 64)
    assert build(FrontendSpec, features.frontend) == SPEC
    assert stored(SPEC)["decimation"] == 2 and "decimation" not in stored(FrontendSpec())


def test_float_samples_become_integers() -> None:
    audio = torch.from_numpy(clips(4))
    module = ShiftAddFeatures(SPEC)
    assert torch.equal(module(audio.double() / 32768), module(audio))
    with pytest.raises(ValueError, match="expected wave"):
        module(audio[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"power": 2.0}, "needs power: 1"),
        ({"log": "ln"}, "needs log: log2"),
        ({"n_fft": 512}, "needs n_fft: 256"),
        ({"f_min": 0.0}, "fewer mel_bands"),
        ({"mel_bands": 33}, "fewer mel_bands|at most 32"),
        ({"f_max": 5000.0}, "above half the sample rate, 4000"),
        ({"arithmetic": "float"}, "need arithmetic: shift-add"),
        ({"arithmetic": "fixed"}, "need arithmetic: shift-add"),
    ],
)
def test_what_cannot_be_followed_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_frontend(dataclasses.replace(SPEC, **changes))


def test_short_clips_are_refused() -> None:
    assert math.isclose(ShiftAddFeatures(SPEC).frames(512), 1)
    with pytest.raises(UsageError, match="too short"):
        shift_add_codes(SPEC, np.zeros((1, 511), np.int16))
