"""Counts of published networks, reading of blocks and of architecture files."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_kit import ROOT

from kestrel.errors import KestrelError, UsageError
from kestrel.models.architecture import Architecture, Choice, Family, div8, parse_blocks, read_file, to_file
from kestrel.settings import load_yaml

NETS = load_yaml(ROOT / "recipes" / "proxylessnas_kws" / "published.yaml")["nets"]


def _published(name: str) -> tuple[Architecture, tuple[int, int]]:
    row = NETS[name]
    return Architecture(width_mult=float(row["width_mult"]), blocks=parse_blocks(row["blocks"])), (row["n_mfcc"], 51)


def test_all_published_networks_are_there() -> None:
    assert len(NETS) == 36


@pytest.mark.parametrize("name", NETS)
def test_published_networks_have_the_published_counts(name: str) -> None:
    architecture, size = _published(name)
    assert architecture.macs(size, 12, "floor") / 1e6 == pytest.approx(NETS[name]["ops"], abs=0.01)
    assert architecture.weights(size, 12) / 1e3 == pytest.approx(NETS[name]["weights"], abs=0.1)
    layers = architecture.layers(size, 12)
    by_hand = sum(each.weights * each.output_size[0] * each.output_size[1] for each in layers)
    assert architecture.macs(size, 12) == by_hand


def test_weights_of_the_two_of_the_abstract() -> None:
    """The paper's memory counts weights twice, normalisation and the bias: 494.8 kB and 340.1 kB."""
    for name, weights in (("wm1.25_3", 244_208), ("mfcc20_4", 167_472)):
        architecture, size = _published(name)
        assert architecture.weights(size, 12) == weights


def test_exact_counts_differ_where_a_size_is_odd() -> None:
    architecture, size = _published("5")
    first = architecture.layers(size, 12)[0]
    assert first.output_size == (10, 26)
    assert first.macs() == 72 * 55 * 260
    assert first.macs("floor") == 72 * 55 * 250


@pytest.mark.parametrize(("value", "rounded"), [(54, 56), (108, 112), (72, 72), (90, 88), (180, 184), (3, 8), (20, 24)])
def test_div8(value: float, rounded: int) -> None:
    assert div8(value) == rounded


def test_several_stages_change_channels_and_stride() -> None:
    family = Family(width_stages=[16, 24], n_cell_stages=[2, 2], stride_stages=[2, 2], width_first=8)
    places = family.places()
    assert [(p.inputs, p.outputs, p.stride, p.shortcut) for p in places] == [
        (8, 16, 2, False),
        (16, 16, 1, True),
        (16, 24, 2, False),
        (24, 24, 1, True),
    ]
    assert family.sizes((10, 51)) == [(10, 26), (5, 13), (5, 13), (3, 7), (3, 7)]


def test_file_comes_back(tmp_path: Path) -> None:
    architecture, _ = _published("wm0.75_5")
    path = tmp_path / "net.yaml"
    path.write_text(to_file(architecture, ["a remark"]))
    assert path.read_text().startswith("# a remark\n")
    assert read_file(path) == architecture


GOOD = {"format": "kestrel-architecture-1", "n_cell_stages": "[2]", "blocks": "7e2 Z"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "net.yaml: format: expected kestrel-architecture-1"),
        ({"blocks": None}, "net.yaml: blocks: missing"),
        ({"blocks": "7e2"}, "net.yaml: blocks: 1 blocks, n_cell_stages has 2"),
        ({"blocks": "7e2 4e1"}, r"net.yaml: blocks\[1\]: expected an odd kernel"),
        ({"blocks": "7e2 7e0"}, r"net.yaml: blocks\[1\]: expected an odd kernel"),
        ({"blocks": "Z 7e2"}, r"net.yaml: blocks\[0\]: block 1 cannot be skipped"),
        ({"blocks": "7e2 7e99"}, r"net.yaml: blocks\[1\]: 7128 channels, at most 4096"),
        ({"blocks": "[7e2, {a: 1}]"}, r"net.yaml: blocks\[1\]: expected str"),
        ({"width_mult": "1e9"}, "net.yaml: width_mult: .* out of bounds"),
        ({"width_mult": ".nan"}, "net.yaml: width_mult: nan is not a finite number"),
        ({"width_stages": "[1000]", "width_mult": "8"}, "net.yaml: width_stages: 8000 channels"),
        ({"stride_stages": "[1, 2]"}, "net.yaml: stride_stages: 1 stages"),
        ({"n_cell_stages": "[65]"}, r"net.yaml: n_cell_stages\[0\]: 65 is out of bounds"),
        ({"width_frist": "72"}, "net.yaml: unknown key 'width_frist'"),
        ({"blocks": "!!python/object/apply:os.system ['true']"}, "not valid YAML"),
    ],
)
def test_hostile_files_are_refused_with_the_field(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "net.yaml"
    data = {**GOOD, **change}
    path.write_text("".join(f"{key}: {value}\n" for key, value in data.items() if value is not None))
    with pytest.raises(UsageError, match=message):
        read_file(path)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(KestrelError, match="no such architecture file"):
        read_file(tmp_path / "none.yaml")
    path = tmp_path / "large.yaml"
    path.write_text("#" * 200_000)
    with pytest.raises(UsageError, match="larger than"):
        read_file(path)


def test_choices_are_written_as_read() -> None:
    assert [str(Choice.parse(text, "block")) for text in ("7e2", "3e6", "Z")] == ["7e2", "3e6", "Z"]
