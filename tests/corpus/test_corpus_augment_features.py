"""Augmentation of features: a naive reference, and independence of order, batches and inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.corpus.augment import FeatureAugmenter, uniform
from kestrel.corpus.spec import AugmentSpec

SEED = 3


def features(count: int, frames: int = 12, bands: int = 7) -> torch.Tensor:
    return torch.randn(count, frames, bands, generator=torch.Generator().manual_seed(count))


def naive(spec: AugmentSpec, clip: np.ndarray, row: int, epoch: int) -> np.ndarray:
    """One clip, value by value."""

    def whole(purpose: str, above: int) -> int:
        return int(uniform(SEED, epoch, purpose, [row])[0] * above)

    frames = len(clip)
    shift = whole("shift frames", 2 * spec.shift_frames + 1) - spec.shift_frames if spec.shift_frames else 0
    moved = np.stack([clip[min(max(t - shift, 0), frames - 1)] for t in range(frames)])
    out = moved.copy()
    for axis, name, count, widest in (
        (0, "frames", spec.time_masks, spec.time_mask),
        (1, "bands", spec.band_masks, spec.band_mask),
    ):
        size = clip.shape[axis]
        for index in range(count):
            width = whole(f"{name} width {index}", min(widest, size) + 1)
            start = whole(f"{name} start {index}", size + 1 - width)
            for place in range(start, start + width):
                for other in range(clip.shape[1 - axis]):
                    t, band = (place, other) if axis == 0 else (other, place)
                    out[t, band] = moved[:, band].mean()
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 15), st.integers(0, 3), st.integers(0, 20), st.integers(0, 3), st.integers(0, 9), st.integers(0, 5)
)
def test_equals_the_naive_reference(shift: int, times: int, longest: int, many: int, widest: int, epoch: int) -> None:
    spec = AugmentSpec(shift_frames=shift, time_masks=times, time_mask=longest, band_masks=many, band_mask=widest)
    rows = np.array([7, 0, 12345])
    given_features = features(3)
    before = given_features.clone()
    found = FeatureAugmenter(spec, SEED)(given_features, rows, epoch)
    assert torch.equal(given_features, before)
    for index, row in enumerate(rows):
        expected = naive(spec, before[index].numpy(), int(row), epoch)
        np.testing.assert_allclose(found[index].numpy(), expected, atol=1e-6)


def test_batches_and_their_order_do_not_matter() -> None:
    augment = FeatureAugmenter(AugmentSpec(shift_frames=4, time_masks=2, time_mask=4, band_masks=1), SEED)
    clips, rows = features(20), np.arange(20) * 3
    whole = augment(clips, rows, 2)
    order = np.random.default_rng(0).permutation(20)
    assert torch.equal(augment(clips[order], rows[order], 2), whole[order])
    assert torch.equal(torch.cat([augment(clips[:7], rows[:7], 2), augment(clips[7:], rows[7:], 2)]), whole)
    assert not torch.equal(augment(clips, rows, 3), whole)


def test_every_shift_and_mask_comes_up() -> None:
    clips = torch.arange(12.0).view(1, 12, 1).repeat(4000, 1, 7)
    moved = FeatureAugmenter(AugmentSpec(shift_frames=2), SEED)(clips, np.arange(4000), 0)
    shifts = (clips - moved)[:, 6, 0]
    assert sorted(set(shifts.tolist())) == [-2, -1, 0, 1, 2]
    assert min((shifts == value).float().mean() for value in range(-2, 3)) > 0.17
    masked = FeatureAugmenter(AugmentSpec(band_masks=1, band_mask=2), SEED)(clips, np.arange(4000), 0)
    widths = (masked[:, 0] != 0).sum(1)
    assert sorted(set(widths.tolist())) == [0, 1, 2]


def test_off_by_default() -> None:
    assert not AugmentSpec().features
    assert AugmentSpec(time_masks=1).features


def test_rows_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        FeatureAugmenter(AugmentSpec(shift_frames=1), SEED)(features(3), np.arange(2), 0)
