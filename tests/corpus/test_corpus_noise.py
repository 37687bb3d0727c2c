from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kestrel.corpus.manifest import SPLITS
from kestrel.corpus.noise import NoiseFile, noise_part, silence_windows


@given(st.integers(0, 10**7))
def test_the_parts_of_a_noise_file_are_its_whole_and_share_no_sample(samples):
    parts = [noise_part(samples, split) for split in SPLITS]
    assert parts[0][0] == 0 and parts[2][1] == samples
    assert parts[0][1] == parts[1][0] and parts[1][1] == parts[2][0]
    assert abs(parts[0][1] - 0.8 * samples) <= 1 and abs(parts[1][1] - 0.9 * samples) <= 1


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=4), st.integers(0, 60), st.sampled_from(SPLITS))
def test_windows_are_different_and_inside_their_part(lengths, count, split):
    clip = 100
    files = [NoiseFile(f"main:n/{i}.wav", str(i), length) for i, length in enumerate(lengths)]
    clips = silence_windows(files, split, count, clip, label=7)
    possible = sum(max(0, noise_part(n, split)[1] - noise_part(n, split)[0] - clip + 1) for n in lengths)
    assert len(clips) == min(count, possible)
    assert len({(c.path, c.start) for c in clips}) == len(clips)
    for c in clips:
        first, stop = noise_part(lengths[int(c.utt_id.split("/")[1].split("@")[0])], split)
        assert first <= c.start and c.start + c.samples <= stop
        assert 0 <= c.gain <= 1 and c.label == 7 and c.samples == clip and c.speaker == ""
    assert silence_windows(files[::-1], split, count, clip, 7) == clips  # order of the files does not matter


def test_windows_are_spread_over_files_and_gains_over_the_range():
    files = [NoiseFile(f"main:n/{i}.wav", str(i), 480_000) for i in range(6)]
    clips = silence_windows(files, "test", 400, 16000, 0)
    counts = [sum(c.path == f.path for c in clips) for f in files]
    assert min(counts) > 40
    assert 0.4 < sum(c.gain for c in clips) / len(clips) < 0.6


def test_golden_windows():
    # the same on every machine, for ever: protocols are compared by their hashes
    clips = silence_windows([NoiseFile("main:_background_noise_/a.wav", "a", 480_000)], "validation", 2, 16000, 11)
    assert [(c.utt_id, c.gain) for c in clips] == [("_silence_/a@392378", 0.8027), ("_silence_/a@414618", 0.9617)]
