"""Augmentation: a naive reference, and independence of order, batches and inputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.corpus.augment import Augmenter, mixed, uniform
from kestrel.corpus.spec import AugmentSpec

RATE, SAMPLES, SILENCE = 1000, 400, 2
OFFSETS = np.array([0, 900, 900, 1500, 1800])  # the second is empty, the last is shorter than a clip


def noise() -> np.ndarray:
    """Recordings that can be told apart by their values: 1000.., 2000.., ..."""
    pieces = [1000 * (index + 1) + np.arange(length) % 1000 for index, length in enumerate(np.diff(OFFSETS))]
    return np.concatenate(pieces).astype(np.int16)


def batch(count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    audio = draw.integers(-20000, 20000, (count, SAMPLES)).astype(np.int16)
    return audio, draw.integers(0, 3, count), draw.permutation(5000)[:count]


def augmenter(seed: int = 1, **spec: float) -> Augmenter:
    return Augmenter(AugmentSpec(**spec), noise(), OFFSETS, RATE, SILENCE, seed)  # type: ignore[arg-type]


def naive(spec: AugmentSpec, seed: int, audio: np.ndarray, label: int, row: int, epoch: int) -> np.ndarray:
    """One clip, sample by sample, in float64."""
    draw = {p: float(uniform(seed, epoch, p, [row])[0]) for p in ("shift", "add noise", "recording", "window", "gain")}
    recordings = [noise()[a:b] for a, b in itertools.pairwise(OFFSETS) if b > a]
    recording = recordings[int(draw["recording"] * len(recordings))]
    starts = len(recording) - SAMPLES + 1 if len(recording) >= SAMPLES else len(recording)
    start = int(draw["window"] * starts)
    largest = round(spec.time_shift_ms * RATE / 1000)
    shift = int(draw["shift"] * (2 * largest + 1)) - largest
    out = np.zeros(SAMPLES)
    for n in range(SAMPLES):
        background = recording[(start + n) % len(recording)] / 32768
        if label == SILENCE:
            out[n] = background * draw["gain"] * spec.silence_volume
            continue
        if 0 <= n - shift < SAMPLES:
            out[n] = audio[n - shift] / 32768
        if draw["add noise"] < spec.noise_frequency:
            out[n] += background * draw["gain"] * spec.noise_volume
    return out.clip(-1, 1)


def test_equals_a_naive_reference() -> None:
    spec = AugmentSpec(noise_volume=3.0, silence_volume=2.0)
    audio, labels, rows = batch(60)
    found = Augmenter(spec, noise(), OFFSETS, RATE, SILENCE, 9)(audio, labels, rows, 4)
    assert found.dtype == torch.float32 and found.shape == audio.shape
    for clip, samples, label, row in zip(found.numpy(), audio, labels, rows, strict=True):
        assert np.abs(clip - naive(spec, 9, samples, label, row, 4)).max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(24)), size=st.integers(1, 24))
def test_order_and_batches_cannot_matter(order: list[int], size: int) -> None:
    audio, labels, rows = batch(24)
    together = augmenter()(audio, labels, rows, 3)
    parts = [np.array(order[i : i + size]) for i in range(0, 24, size)]
    again = torch.cat([augmenter()(audio[p], labels[p], rows[p], 3) for p in parts])
    assert torch.equal(again, together[order])


def test_epochs_seeds_and_rows_differ() -> None:
    audio, labels, rows = batch()
    base = augmenter()(audio, labels, rows, 0)
    assert torch.equal(augmenter()(audio, labels, rows, 0), base)
    for other in (
        augmenter()(audio, labels, rows, 1),
        augmenter(2)(audio, labels, rows, 0),
        augmenter()(audio, labels, rows + 1, 0),
    ):
        assert (other != base).any(1).float().mean() > 0.95


def test_arguments_stay_as_they_are() -> None:
    audio, labels, rows = batch()
    copies = audio.copy(), labels.copy(), rows.copy()
    draws = augmenter()
    before = draws._recordings[0].copy()
    draws(audio, labels, rows, 0).zero_()
    assert all(np.array_equal(a, b) for a, b in zip((audio, labels, rows), copies, strict=True))
    assert np.array_equal(draws._recordings[0], before)


def test_global_generators_are_not_used() -> None:
    audio, labels, rows = batch(4)
    np.random.seed(0)
    torch.manual_seed(0)
    one = augmenter()(audio, labels, rows, 0)
    state = torch.get_rng_state()
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(augmenter()(audio, labels, rows, 0), one)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_shift_goes_both_ways_and_is_uniform() -> None:
    count = 4000
    audio = np.zeros((count, SAMPLES), np.int16)
    audio[:, 200] = 1000
    moved = augmenter(time_shift_ms=50.0, noise_frequency=0.0)(audio, np.zeros(count, int), np.arange(count), 0)
    assert ((moved != 0).sum(1) == 1).all()
    shifts = moved.argmax(1).numpy() - 200
    assert shifts.min() == -50 and shifts.max() == 50
    counts = np.bincount(shifts + 50, minlength=101)
    assert (np.abs(counts - count / 101) < 6 * np.sqrt(count / 101)).all() and abs(shifts.mean()) < 2


def test_shift_moves_zeros_in() -> None:
    audio = np.full((300, SAMPLES), 77, np.int16)
    moved = augmenter(time_shift_ms=100.0, noise_frequency=0.0)(audio, np.zeros(300, int), np.arange(300), 0).numpy()
    for clip in moved:
        kept = np.flatnonzero(clip)
        assert (np.diff(kept) == 1).all() and len(kept) >= 300 and (kept[0] == 0 or kept[-1] == SAMPLES - 1)


def test_shift_longer_than_a_clip_may_empty_it() -> None:
    audio = np.full((200, 20), 77, np.int16)
    moved = augmenter(time_shift_ms=1000.0, noise_frequency=0.0)(audio, np.zeros(200, int), np.arange(200), 0)
    assert moved.shape == (200, 20) and ((moved != 0).sum(1) < 20).any()


def test_share_and_gain_of_noise() -> None:
    count = 3000
    audio = np.zeros((count, SAMPLES), np.int16)
    out = augmenter(noise_frequency=0.3, noise_volume=0.5)(audio, np.zeros(count, int), np.arange(count), 0).numpy()
    noisy = (out != 0).any(1)
    assert abs(noisy.mean() - 0.3) < 0.03
    gains = out[noisy].max(1) * 32768 / np.array([noise().max()])
    assert gains.max() <= 0.5 and (out >= 0).all()
    first = out[noisy][:, 0] * 32768
    assert len(np.unique(first)) > 0.9 * noisy.sum()  # windows and gains differ


def test_every_recording_is_used_alike() -> None:
    count = 3000
    audio = np.zeros((count, SAMPLES), np.int16)
    draws = augmenter(noise_frequency=1.0, noise_volume=1.0)
    out = draws(audio, np.zeros(count, int), np.arange(count), 0).numpy() * 32768
    gains = uniform(1, 0, "gain", np.arange(count))
    sources = np.rint(out.max(1) / gains / 1000).astype(int)
    shares = [((out.max(1) / gains) // 1000 == k).mean() for k in (1, 3, 4)]
    assert len(sources) == count and all(abs(share - 1 / 3) < 0.05 for share in shares)


def test_silence_is_drawn_from_noise_alone() -> None:
    audio, _, rows = batch(500)
    labels = np.full(500, SILENCE)
    one = augmenter(silence_volume=0.5)(audio, labels, rows, 0)
    two = augmenter(silence_volume=0.5)(-audio, labels, rows, 0)
    assert torch.equal(one, two)
    loudness = one.amax(1) * 32768 / noise().max()
    assert loudness.max() <= 0.5 and loudness.max() > 0.4 and loudness.min() < 0.1
    assert (augmenter(silence_volume=0.0)(audio, labels, rows, 0) == 0).all()
    assert not torch.equal(augmenter(silence_volume=0.5)(audio, labels, rows, 1), one)


def test_no_silence_class() -> None:
    audio, labels, rows = batch(50)
    draws = Augmenter(AugmentSpec(time_shift_ms=0.0, noise_frequency=0.0), noise(), OFFSETS, RATE, None, 0)
    assert torch.equal(draws(audio, labels, rows, 0), torch.from_numpy(audio / np.float32(32768)))


def test_without_noise_nothing_is_added() -> None:
    audio, labels, rows = batch(50)
    draws = Augmenter(AugmentSpec(time_shift_ms=0.0), np.zeros(0, np.int16), [0], RATE, SILENCE, 0)
    assert torch.equal(draws(audio, labels, rows, 0), torch.from_numpy(audio / np.float32(32768)))


def test_loud_sums_are_clipped() -> None:
    audio = np.full((100, SAMPLES), 32767, np.int16)
    out = augmenter(noise_frequency=1.0, noise_volume=10.0)(audio, np.zeros(100, int), np.arange(100), 0)
    assert out.max() == 1.0 and out.min() >= -1.0


def test_uniform_is_uniform_and_keyed() -> None:
    draws = uniform(0, 0, "gain", np.arange(20000))
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert (np.abs(counts - 1000) < 150).all()
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    for other in (
        uniform(1, 0, "gain", np.arange(20000)),
        uniform(0, 1, "gain", np.arange(20000)),
        uniform(0, 0, "window", np.arange(20000)),
    ):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.03
    assert np.array_equal(uniform(0, 0, "gain", [7, 3]), draws[[7, 3]])


def test_uniform_is_the_same_on_every_machine() -> None:
    assert uniform(80085, 3, "shift", [0, 1, 10**9]).tolist() == GOLDEN


GOLDEN = [0.8193464025778283, 0.539709686903428, 0.03745521273853669]


def test_arguments_must_fit() -> None:
    audio, labels, rows = batch(5)
    with pytest.raises(ValueError, match="do not fit"):
        augmenter()(audio, labels[:4], rows, 0)


@given(snr=st.floats(-10, 30), level=st.floats(10, 12000))
def test_noise_at_a_ratio(snr: float, level: float) -> None:
    draw = np.random.default_rng(0)
    speech, background = draw.normal(0, level, 500), draw.normal(0, 50, 500)
    made = mixed(speech, background, snr).astype(np.float64)
    weights, *_ = np.linalg.lstsq(np.stack([speech, background], 1), made, rcond=None)
    powers = [weight**2 * np.square(part).mean() for weight, part in zip(weights, (speech, background), strict=True)]
    assert abs(10 * np.log10(powers[0] / powers[1]) - snr) < 0.1
    assert np.abs(made).max() <= 0.99 * 32768 * 1.0001
    silent = np.zeros(500)
    assert not mixed(silent, background, snr).any()
    np.testing.assert_allclose(mixed(speech, silent, snr), speech, rtol=1e-6)


def test_training_clips_get_noise_at_a_ratio_and_silence_stays_as_it_was() -> None:
    audio, labels, rows = batch(60)
    audio = (audio // 4).astype(np.int16)
    by_volume = augmenter(time_shift_ms=0, noise_frequency=1.0)(audio, labels, rows, 2).numpy()
    by_ratio = augmenter(time_shift_ms=0, noise_frequency=1.0, noise_snr=[10.0, 5.0])(audio, labels, rows, 2).numpy()
    silent = labels == SILENCE
    np.testing.assert_array_equal(by_ratio[silent], by_volume[silent])
    speech = audio[~silent] / 32768
    noise = by_ratio[~silent] - speech
    ratios = 10 * np.log10(np.square(speech).mean(1) / np.square(noise).mean(1))
    assert set(np.rint(ratios)) == {5, 10}
    kept = augmenter(time_shift_ms=0, noise_frequency=0.0, noise_snr=[5.0])(audio, labels, rows, 2).numpy()
    np.testing.assert_allclose(kept[~silent], speech, atol=1e-6)
