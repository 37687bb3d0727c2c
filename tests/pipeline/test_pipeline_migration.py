"""Every key that docs/migration.md names exists."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from kestrel import recipe as recipes
from kestrel.pipeline.config import SECTIONS, Config
from kestrel.pipeline.plan import _parser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
RECIPE = re.compile(r"recipe `(\w+)`")
CODE = re.compile(r"`([^`]+)`")


def rows() -> list[tuple[str, str, str, str]]:
    """(recipe, original option, our keys, remark) of every row of every table."""
    found, recipe, header = [], "", False
    for line in TEXT.splitlines():
        if line.startswith("## "):
            match = RECIPE.search(line)
            assert match, f"{line}: a section names its recipe"
            recipe = match.group(1)
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = True
        elif set("".join(cells)) <= set("-: "):
            header = False
        elif not header:
            assert len(cells) == 3, line
            found.append((recipe, cells[0], cells[1], cells[2]))
    return found


def sections(recipe: str) -> dict[str, type]:
    """Section name to settings class, with the recipe's own `model`."""
    found: dict[str, type] = {}
    for name, hint in typing.get_type_hints(Config).items():
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if kinds:
            found[name] = typing.cast(type, kinds[0])
    found["model"] = recipes.load(recipe, ROOT).ModelSpec
    return found


def exists(recipe: str, key: str) -> bool:
    if key.startswith("--"):
        return key.split()[0] in {option for action in _parser()._actions for option in action.option_strings}
    section, *names = key.partition("=")[0].split(".")
    kind = sections(recipe).get(section)
    for name in names:
        fields = typing.get_type_hints(kind) if kind is not None and dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            return False
        kind = fields[name]
    return kind is not None and bool(names)


def test_the_check_can_fail() -> None:
    assert exists("iscas21_lstm", "model.hidden") and exists("iscas21_lstm", "--seed")
    assert exists("iscas21_lstm", "model.weight_range=paper")
    for key in ("model.hiden", "modle.hidden", "--sead", "hidden", "protocol", "retrain.batch_size"):
        assert not exists("iscas21_lstm", key), key


def test_sections_are_those_of_the_configuration() -> None:
    assert set(SECTIONS) | {"corpus", "protocol"} == set(sections("iscas21_lstm"))


def test_there_is_a_table_for_every_recipe_that_has_an_original() -> None:
    assert {row[0] for row in rows()} <= set(recipes.names(ROOT))
    assert len(rows()) >= 37


@pytest.mark.parametrize(("recipe", "original", "ours", "remark"), rows())
def test_a_row_names_keys_that_exist(recipe: str, original: str, ours: str, remark: str) -> None:
    assert CODE.fullmatch(original), "one option of the original"
    keys = CODE.findall(ours)
    assert keys, f"{original}: names our key"
    for key in keys:
        assert exists(recipe, key), f"{original} -> {key}"
    for key in CODE.findall(remark):
        if re.match(r"(--)?[a-z]+\.\w", key):
            assert exists(recipe, key), f"{original}, remark: {key}"


def test_no_option_stands_twice() -> None:
    names = [(recipe, original) for recipe, original, _, _ in rows()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("recipe", sorted({row[0] for row in rows()}))
def test_every_setting_of_a_recipe_file_is_documented_by_its_original_name(recipe: str) -> None:
    """recipe.yaml and its variants name, in comments, the option of the original that each value stands for."""
    folder = ROOT / "recipes" / recipe
    files = [folder / "recipe.yaml", *(folder / "variants").glob("*.yaml")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    comments = "\n".join(line.partition("#")[2] for line in text.splitlines())
    ours = {option for action in _parser()._actions for option in action.option_strings}
    named = set(re.findall(r"--[a-zA-Z0-9_-]+", comments)) - ours
    table = {original.strip("`") for name, original, _, _ in rows() if name == recipe}
    assert named <= table, sorted(named - table)
    assert named or {option for option in table if re.search(rf"\b{re.escape(option)}\b", comments)}  # keys of a file
