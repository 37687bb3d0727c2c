from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kestrel.corpus.manifest import SPLITS
from kestrel.corpus.rules import hash_split, read_list, share_of, speaker_of, split_size
from kestrel.corpus.spec import CorpusSpec, ProtocolSpec
from kestrel.errors import KestrelError
from kestrel.settings import build, load_yaml

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize(
    ("keywords", "percentage", "size"),
    [
        (30769, 10.0, 36923),
        (3703, 10.0, 4445),
        (4074, 10.0, 4890),
        (84843, None, 84843),
        (9981, None, 9981),
        (11005, None, 11005),
    ],
)
def test_known_sizes(keywords, percentage, size):
    assert split_size(keywords, percentage, percentage) == size


def test_shares_are_rounded_up_without_floating_point_errors():
    assert share_of(4074, 10.0) == 408
    assert share_of(1000, 1.1) == 11  # 1000 * 1.1 / 100 is 11.000000000000002 in floating point
    assert share_of(1, 0.001) == 1
    assert share_of(0, 10.0) == share_of(50, 0.0) == 0


@given(st.integers(0, 10**6), st.decimals(0, 1000, places=2))
def test_share_is_the_smallest_that_suffices(count, percentage):
    share = share_of(count, float(percentage))
    exact = count * Fraction(percentage) / 100
    assert share - 1 < exact <= share


def test_known_speakers_of_the_archive():
    # listed for validation, used for training, and a speaker of the archive of test clips
    assert hash_split("0e17f595_nohash_1.wav", 10, 10) == "validation"
    assert hash_split("00176480_nohash_0.wav", 10, 10) == "train"
    assert hash_split("0c540988_nohash_0.wav", 10, 10) == "test"


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="_"), max_size=12), st.integers(0, 50), st.integers(0, 50)
)
def test_hash_rule_equals_integer_arithmetic(speaker, validation, testing):
    bucket = int.from_bytes(hashlib.sha1(speaker.encode()).digest(), "big") & (2**27 - 1)
    share = Fraction(bucket * 100, 2**27 - 1)
    expected = "validation" if share < validation else "test" if share < validation + testing else "train"
    assert hash_split(f"{speaker}_nohash_3.wav", validation, testing) == expected
    assert hash_split(f"{speaker}_nohash_7.flac", validation, testing) == expected  # the take does not matter


def test_speakers():
    assert speaker_of("yes", "0c540988_nohash_0") == "0c540988"
    assert speaker_of("_unknown_", "backward_0c540988_nohash_0") == "0c540988"
    assert speaker_of("_unknown_", "0c540988_nohash_0") == "0c540988"
    assert speaker_of("yes", "anna_b_nohash_0") == "anna_b"
    assert speaker_of("_silence_", "1024") == ""


def test_lists(tmp_path):
    (tmp_path / "list.txt").write_text("yes/a_nohash_0.wav\r\n\n./no/b_nohash_1.flac\ngo/c_nohash_0.wav.wav\n")
    assert read_list(tmp_path / "list.txt") == {"yes/a_nohash_0", "no/b_nohash_1", "go/c_nohash_0"}
    (tmp_path / "list.txt").write_text("yes/a.wav\nb.wav\n")
    with pytest.raises(KestrelError, match="line 2"):
        read_list(tmp_path / "list.txt")


def test_the_named_protocols_and_corpora_are_valid():
    data = load_yaml(CONF / "corpora.yaml")
    protocols = {}
    for path in (CONF / "protocols").glob("*.yaml"):
        content = load_yaml(path)
        corpus = content.pop("corpus")
        assert corpus in data["corpora"]
        protocols[path.stem] = build(ProtocolSpec, content)
    assert set(protocols) >= {"gsc_v2-12-official", "gsc_v2-12-hash", "gsc_v2-35-list", "gsc_v1-12-hash", "mini-12"}
    for name, entry in data["corpora"].items():
        assert entry.pop("protocol") in protocols
        assert (CONF.parent / entry.pop("script")).is_file()
        build(CorpusSpec, {"name": name} | entry)
    assert [protocols["gsc_v2-12-official"].expect[s] for s in SPLITS] == [
        split_size(n, 10, 10) for n in (30769, 3703, 4074)
    ]
    assert [protocols["gsc_v2-35-list"].expect[s] for s in SPLITS] == [84843, 9981, 11005]
    words = protocols["gsc_v2-35-list"].words
    assert len(set(words)) == 35 and all(isinstance(word, str) for word in words)
    assert set(protocols["mini-12"].words) < set(words)
    for name in ("gsc_v2-12-official", "gsc_v2-12-hash", "gsc_v1-12-hash", "mini-12"):
        assert protocols[name].words == ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
