"""Errors that name the nearest match, and typed settings from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import KestrelError, UsageError, nearest, unknown
from kestrel.settings import (
    build,
    describe,
    dump_yaml,
    load_yaml,
    merge,
    parse_assignment,
    parse_yaml,
    setting,
    to_dict,
)


@dataclass
class Inner:
    rate: float = setting(0.5, "a rate", min=0, max=1)
    words: list[str] = setting(["yes", "no"], "words")


@dataclass
class Outer:
    count: int = setting(3, "a count", min=1, max=9)
    maybe: int | None = setting(None, "a count or nothing", min=0)
    mode: Literal["fast", "slow"] = setting("fast", "a mode")
    method: Literal[0, 1, 2] = setting(1, "a method")
    on: bool = setting(True, "a switch")
    name: str = setting("", "a name")
    lr: list[float] = setting([0.1], "rates", min=0)
    table: dict[str, int] = setting({}, "counts", min=0)
    steps: list[Any] = setting([], "anything")
    inner: Inner = field(default_factory=Inner)


def fails(data: Any, *parts: str) -> None:
    """Building Outer from `data` fails in one line that has all `parts`."""
    with pytest.raises(UsageError) as caught:
        build(Outer, data)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ----------------------------------------------------------------------------------------------------------- errors


def test_nearest_match_or_all_choices() -> None:
    assert nearest("pretain", ["pretrain", "retrain", "score"]) == "pretrain"
    assert nearest("xyz", ["pretrain", "score"]) is None
    assert (
        str(unknown("stage", "pretain", ["score", "pretrain"])) == "unknown stage 'pretain'; did you mean 'pretrain'?"
    )
    assert str(unknown("stage", "xyz", ["score", "export"])) == "unknown stage 'xyz'; known: export, score"
    assert str(unknown("stage", "xyz", [])) == "unknown stage 'xyz'; known: none"
    assert isinstance(unknown("stage", "xyz", []), KestrelError)


# ------------------------------------------------------------------------------------------------------------- YAML


def test_keywords_stay_words_and_exponents_are_numbers() -> None:
    data = parse_yaml("words: [yes, no, on, off, y, n, True, false]\nrates: [1e-3, 2E4, -.5, 3., 10, .inf]")
    assert data["words"] == ["yes", "no", "on", "off", "y", "n", True, False]
    assert data["rates"] == [0.001, 20000.0, -0.5, 3.0, 10, float("inf")]
    assert [type(value) for value in data["rates"]] == [float, float, float, float, int, float]


def test_dumped_words_read_the_same_in_every_yaml_reader() -> None:
    data = {
        "words": ["yes", "no", "on", "1e-3", "null", "~", "0x1", "2001-01-01", "zwölf"],
        "rate": 1e-07,
        "none": None,
    }
    assert parse_yaml(dump_yaml(data)) == data
    assert yaml.safe_load(dump_yaml({"words": data["words"]})) == {"words": data["words"]}


# Without control characters and Unicode line ends, which PyYAML folds.
text = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\ufeff"), max_size=12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_dump_and_parse_are_inverse(data: Any) -> None:
    assert parse_yaml(dump_yaml(data)) == data


def test_yaml_errors_name_the_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a: 1\nb: [1,\nc: 2\n")
    with pytest.raises(UsageError, match=r"bad\.yaml line \d+: not valid YAML"):
        load_yaml(path)
    path.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(UsageError, match="key 'a' stands twice"):
        load_yaml(path)
    path.write_text("- a\n")
    with pytest.raises(UsageError, match="expected a mapping"):
        load_yaml(path)
    with pytest.raises(UsageError, match="cannot read .*none.yaml"):
        load_yaml(tmp_path / "none.yaml")
    path.write_text("# nothing\n")
    assert load_yaml(path) == {}


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system"])
def test_yaml_makes_no_objects(text: str) -> None:
    with pytest.raises(UsageError, match="not valid YAML"):
        parse_yaml(text)


# ------------------------------------------------------------------------------------------------------------ build


def test_defaults_are_fresh_for_each_instance() -> None:
    one, two = build(Outer, None), build(Outer, {})
    one.lr.append(9.0)
    one.inner.words.append("x")
    assert two.lr == [0.1] and two.inner.words == ["yes", "no"]


def test_build_fills_and_converts() -> None:
    made = build(
        Outer,
        {"count": 4, "maybe": 0, "mode": "slow", "lr": "1e-3, 2", "name": 12, "inner": {"rate": 1, "words": "on,off"}},
    )
    assert (made.count, made.maybe, made.mode, made.lr, made.name) == (4, 0, "slow", [0.001, 2.0], "12")
    assert made.inner == Inner(rate=1.0, words=["on", "off"])
    assert isinstance(made.inner.rate, float)
    assert build(Outer, {"lr": 0.5}).lr == [0.5]
    assert build(Outer, {"inner": {"words": ""}}).inner.words == []
    assert build(Outer, {"table": {1: 2}}).table == {"1": 2}


def test_to_dict_builds_back() -> None:
    made = build(Outer, {"count": 5, "inner": {"rate": 0.25}, "steps": [{"dct": 4}]})
    assert build(Outer, parse_yaml(dump_yaml(to_dict(made)))) == made


def test_unknown_keys_name_the_nearest() -> None:
    fails({"cuont": 3}, "unknown key 'cuont'", "did you mean 'count'")
    fails({"inner": {"rte": 3}}, "unknown key 'inner.rte'", "did you mean 'inner.rate'")
    fails({"zzzzzzz": 3}, "unknown key 'zzzzzzz'")


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"count": "x"}, ("count", "expected int", "'x'")),
        ({"count": 1.5}, ("count", "expected int", "1.5")),
        ({"count": True}, ("count", "expected int")),
        ({"count": None}, ("count", "expected int")),
        ({"count": 0}, ("count", "0 is out of bounds (1..9)")),
        ({"count": 10}, ("count", "out of bounds")),
        ({"maybe": -1}, ("maybe", "out of bounds (>= 0)")),
        ({"maybe": "x"}, ("maybe", "'x'")),
        ({"mode": "fats"}, ("mode", "did you mean 'fast'")),
        ({"method": 3}, ("method", "0, 1, 2", "3")),
        ({"method": True}, ("method", "0, 1, 2")),
        ({"method": 1.0}, ("method", "0, 1, 2")),
        ({"on": "yes"}, ("on", "expected bool")),
        ({"on": 1}, ("on", "expected bool")),
        ({"name": True}, ("name", "expected str")),
        ({"lr": {"a": 1}}, ("lr", "expected a list")),
        ({"lr": [0.1, "x"]}, ("lr[1]", "expected float")),
        ({"lr": [0.1, -1]}, ("lr[1]", "out of bounds")),
        ({"lr": float("nan")}, ("lr[0]", "not a finite number")),
        ({"lr": [float("inf")]}, ("lr[0]", "not a finite number")),
        ({"table": [1]}, ("table", "expected a mapping")),
        ({"table": {"a": "b"}}, ("table.a", "expected int")),
        ({"inner": 3}, ("inner", "expected a mapping")),
        ({"inner": {"rate": 2}}, ("inner.rate", "out of bounds (0..1)")),
        ([1], ("configuration", "expected a mapping")),
    ],
)
def test_wrong_values_name_the_key(data: Any, parts: tuple[str, ...]) -> None:
    fails(data, *parts)


# ----------------------------------------------------------------------------------------------------- merge and set


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), plain), st.dictionaries(st.sampled_from("abc"), plain))
def test_merge_lays_over_and_changes_neither(base: dict, delta: dict) -> None:
    before = repr((base, delta))
    merged = merge(base, delta)
    assert repr((base, delta)) == before
    assert set(merged) == set(base) | set(delta)
    for key, value in merged.items():
        if key not in delta:
            assert value == base[key]
        elif not (isinstance(delta[key], dict) and isinstance(base.get(key), dict)):
            assert value == delta[key]
    assert merge(merged, delta) == merged


@pytest.mark.parametrize(
    ("text", "nested"),
    [
        ("model.hidden=64", {"model": {"hidden": 64}}),
        ("train.lr=1e-3,5e-4", {"train": {"lr": "1e-3,5e-4"}}),
        ("train.lr=[0.1, 0.2]", {"train": {"lr": [0.1, 0.2]}}),
        ("protocol.words=yes,no,on", {"protocol": {"words": "yes,no,on"}}),
        ("protocol.words=on", {"protocol": {"words": "on"}}),
        ("retrain=null", {"retrain": None}),
        ("model.quant_w=", {"model": {"quant_w": None}}),
        ("corpus.test_dir=/my data/a=b", {"corpus": {"test_dir": "/my data/a=b"}}),
        ("feature.post=[{dct: 40}, {average: 2}]", {"feature": {"post": [{"dct": 40}, {"average": 2}]}}),
    ],
)
def test_assignments(text: str, nested: dict) -> None:
    assert parse_assignment(text) == nested


@pytest.mark.parametrize("text", ["model.hidden", "=3", ".a=3", "a.=3", "a b=3", "model..x=1", "a=[1", "a={b"])
def test_malformed_assignments_are_errors(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_assignment(text)


def test_describe_lists_every_setting() -> None:
    rows = {key: (shown, text) for key, shown, text in describe(Outer, build(Outer, {"count": 7}), "top")}
    assert list(rows) == [
        *(f"top.{name}" for name in ("count", "maybe", "mode", "method", "on", "name", "lr", "table", "steps")),
        "top.inner.rate",
        "top.inner.words",
    ]
    assert rows["top.count"] == ("7", "a count [int]")
    assert rows["top.maybe"] == ("null", "a count or nothing [int | null]")
    assert rows["top.on"][0] == "true"
    assert rows["top.mode"][1] == "a mode [fast | slow]"
    assert rows["top.lr"][1] == "rates [list of float]"
