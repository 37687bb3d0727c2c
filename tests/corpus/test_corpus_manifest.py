from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.corpus.manifest import Clip, protocol_hash, protocol_roots, read_manifest, read_protocol, write_manifest
from kestrel.corpus.source import check_layout, read_roots, write_roots
from kestrel.errors import KestrelError

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
clips = st.lists(
    st.builds(
        Clip, text, text, text, st.integers(0, 40), text, st.integers(0, 10**7), st.integers(0, 10**6), st.floats(0, 1)
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(clips)
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    write_manifest(path, rows)
    assert read_manifest(path) == rows


def test_damaged_manifests(tmp_path):
    with pytest.raises(KestrelError, match="stage 1 first"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("name,label\nx,1\n")
    with pytest.raises(KestrelError, match="columns"):
        read_manifest(tmp_path / "a.csv")
    write_manifest(tmp_path / "b.csv", [Clip("yes/a", "main:yes/a.wav", "yes", 0, "a", 0, 16000, 1.0)])
    cut = (tmp_path / "b.csv").read_text()[:-12]
    (tmp_path / "b.csv").write_text(cut)
    with pytest.raises(KestrelError, match="damaged"):
        read_manifest(tmp_path / "b.csv")


def test_locate(tmp_path):
    clip = Clip("yes/a", "test:yes/a.wav", "yes", 0, "a", 0, 1, 1.0)
    assert clip.locate({"main": Path("m"), "test": tmp_path}) == tmp_path / "yes/a.wav"
    with pytest.raises(KestrelError, match="test:yes"):
        clip.locate({"main": tmp_path})


def test_the_hash_sees_what_defines_a_protocol_and_nothing_else():
    row = Clip("yes/a", "main:yes/a.wav", "yes", 0, "a", 0, 16000, 1.0)
    splits = {"train": [row], "validation": [], "test": []}
    value = protocol_hash(splits)
    assert value == protocol_hash({"test": [], "validation": [], "train": [row]})
    moved = Clip("yes/a", "main:elsewhere/a.flac", "yes", 0, "a", 0, 15000, 1.0)
    assert protocol_hash(splits | {"train": [moved]}) == value
    for change in ({"utt_id": "yes/b"}, {"label": 1}, {"start": 5}, {"gain": 0.5}):
        other = Clip(**{name: getattr(row, name) for name in Clip.__slots__} | change)
        assert protocol_hash(splits | {"train": [other]}) != value
    assert protocol_hash({"train": [], "validation": [row], "test": []}) != value


def test_roots(tmp_path):
    raw = tmp_path / "data" / "c" / "raw"
    raw.mkdir(parents=True)
    with pytest.raises(KestrelError, match="stage 0"):
        read_roots(raw)
    write_roots(raw, raw / "main", None)
    assert '"main": "main"' in (raw / "roots.json").read_text()
    assert read_roots(raw) == (raw / "main", None)
    write_roots(raw, tmp_path / "mine", tmp_path / "tests")
    assert read_roots(raw) == (tmp_path / "mine", tmp_path / "tests")
    protocol = {"roots": {"main": "raw/main", "test": str(tmp_path / "tests")}}
    assert protocol_roots(protocol, tmp_path / "data/c/p") == {"main": raw / "main", "test": tmp_path / "tests"}
    assert protocol_roots({"roots": {"main": "raw/main", "test": None}}, tmp_path / "data/c/p") == {
        "main": raw / "main"
    }
    with pytest.raises(KestrelError, match="stage 1 first"):
        read_protocol(tmp_path)


def test_layout(tmp_path, write_clip):
    with pytest.raises(KestrelError, match="does not exist"):
        check_layout(tmp_path / "none")
    (tmp_path / "yes").mkdir()
    (tmp_path / "yes" / "a.mp3").write_text("x")
    with pytest.raises(KestrelError, match="GSC layout"):
        check_layout(tmp_path)
    write_clip(tmp_path / "yes" / "a.flac")
    check_layout(tmp_path)
