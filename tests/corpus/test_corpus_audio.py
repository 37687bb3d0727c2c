from __future__ import annotations

import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.corpus.audio import is_audio_name, probe, read_window, stem
from kestrel.errors import KestrelError

RATE = 16000


def ramp(samples: int) -> np.ndarray:
    return (np.arange(samples) % 20000 + 1).astype(np.int16)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_good_file(tmp_path, name):
    soundfile.write(tmp_path / name, ramp(5000), RATE)
    result = probe(tmp_path / name, RATE)
    assert (result.samples, result.reason) == (5000, None)


def bad_files(folder):
    """Every kind of bad clip: name -> a part of its reason."""
    good = ramp(4000)

    def wav(name, data=good, rate=RATE, **options):
        soundfile.write(folder / name, data, rate, **options)
        return (folder / name).read_bytes()

    reasons = {
        "zero.wav": "zero bytes",
        "text.wav": "not an audio file",
        "rate.wav": "sample rate 8000 Hz instead of 16000",
    }
    (folder / "zero.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound " * 50)
    wav("rate.wav", rate=8000)
    wav("stereo.wav", np.stack([good, good], 1))
    reasons["stereo.wav"] = "2 channels instead of 1"
    wav("empty.wav", good[:0])
    reasons["empty.wav"] = "header only"
    whole = wav("whole.wav")
    (folder / "header.wav").write_bytes(whole[:44])  # declares 4,000 samples
    reasons["header.wav"] = "truncated"
    (folder / "cut.wav").write_bytes(whole[:3001])
    reasons["cut.wav"] = "truncated: 5043 bytes"
    (folder / "half.wav").write_bytes(whole[:30])
    reasons["half.wav"] = "not an audio file"
    flac = wav("whole.flac")
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    reasons["cut.flac"] = ""
    (folder / "noise.flac").write_bytes(flac[:200] + bytes(reversed(flac[200:])))
    reasons["noise.flac"] = ""
    for name, value in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        sound = good / 32768
        sound[1234] = value
        wav(name, sound.astype(np.float32), subtype="FLOAT")
        reasons[name] = "NaN or infinite"
    (folder / "folder.wav").mkdir()
    reasons["folder.wav"] = "not a file"
    (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    reasons["dangling.wav"] = "not a file"
    (folder / "whole.wav").unlink()
    (folder / "whole.flac").unlink()
    return reasons


def test_bad_files_have_a_reason_and_never_raise(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        result = probe(tmp_path / name, RATE)
        assert result.reason is not None and reason in result.reason, (name, result)
        assert "\n" not in result.reason


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_rejected_without_an_exception(tmp_path_factory, data, with_header):
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 9999, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", 9000
    )
    path = tmp_path_factory.getbasetemp() / "any.wav"
    path.write_bytes(header + data if with_header else data)
    assert probe(path, RATE).reason is not None


def test_extra_chunks_and_unknown_length(tmp_path):
    data = ramp(100).tobytes()
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # chunks are padded to even lengths
    for name, declared, missing in (("exact", 200, False), ("streamed", 0xFFFFFFFF, False), ("short", 202, True)):
        body = b"WAVE" + fmt + odd + b"data" + struct.pack("<I", declared) + data
        (tmp_path / name).write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
        result = probe(tmp_path / name, RATE)
        assert result.samples == 100
        assert (result.reason is not None) == missing


def test_stem_takes_off_all_audio_endings():
    assert stem("0a_nohash_0.wav") == stem("0a_nohash_0.wav.wav") == stem("0a_nohash_0.FLAC") == "0a_nohash_0"
    assert stem("v1.2.wav") == "v1.2"
    assert is_audio_name("a.WAV") and is_audio_name("a.flac") and not is_audio_name("a.mp3")


def naive_window(wave: np.ndarray, start: int, samples: int, clip: int, gain: float) -> list[int]:
    window = [wave[start + i] for i in range(samples)]
    while len(window) > clip:  # the odd one is cut at the end
        window.pop() if (len(window) - clip) % 2 else window.pop(0)
    result = [0] * ((clip - len(window)) // 2) + [min(32767, max(-32768, round(float(v) * gain))) for v in window]
    return result + [0] * (clip - len(result))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_read_window_equals_the_naive_one(tmp_path_factory, data):
    length = data.draw(st.integers(1, 60))
    wave = np.array(data.draw(st.lists(st.integers(-32768, 32767), min_size=length, max_size=length)), np.int16)
    start = data.draw(st.integers(0, length - 1))
    samples = data.draw(st.integers(1, length - start))
    clip = data.draw(st.integers(1, 60))
    gain = data.draw(st.sampled_from([1.0, 0.0, 0.5, 0.1836, 3.0]))
    path = tmp_path_factory.getbasetemp() / "window.wav"
    soundfile.write(path, wave, RATE, subtype="PCM_16")
    found = read_window(path, start, samples, clip, gain)
    assert found.dtype == np.int16
    assert found.tolist() == naive_window(wave, start, samples, clip, gain)


def test_float_files_are_clipped(tmp_path):
    soundfile.write(tmp_path / "f.wav", np.array([0.5, -1.5, 1.5, -1.0], np.float32), RATE, subtype="FLOAT")
    assert read_window(tmp_path / "f.wav", 0, 4, 4).tolist() == [16384, -32768, 32767, -32768]


def test_a_changed_file_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", ramp(100), RATE)
    for start, samples in ((0, 101), (200, 1)):
        with pytest.raises(KestrelError, match="stage 1 again"):
            read_window(tmp_path / "a.wav", start, samples, 200)
    with pytest.raises(KestrelError, match="stage 1 again"):
        read_window(tmp_path / "gone.wav", 0, 1, 100)
