"""Checkpoints kept with a recipe: recipes/<recipe>/pretrained/<variant>.pt, with its facts in .json and a card in .md."""

from __future__ import annotations

from pathlib import Path

from kestrel.errors import KestrelError, UsageError
from kestrel.store.atomic import read_json
from kestrel.store.hashing import sha256_file


def folder(root: Path, recipe: str) -> Path:
    """Where a recipe's checkpoints are kept."""
    return root / "recipes" / recipe / "pretrained"


def kept(root: Path, recipe: str) -> list[str]:
    """Variants of a recipe that have a checkpoint."""
    return sorted(path.stem for path in folder(root, recipe).glob("[!.]*.pt"))


def find(root: Path, recipe: str, variant: str) -> Path:
    """The checkpoint of a variant. Raises UsageError where there is none, KestrelError where it is not the one described."""
    path = folder(root, recipe) / f"{variant}.pt"
    if not path.is_file():
        names = kept(root, recipe)
        have = f"there is one for --variant {', '.join(names)}" if names else "the recipe keeps none"
        raise UsageError(f"--pretrained: no checkpoint of {recipe}, variant {variant}; {have}")
    description = path.with_suffix(".json")
    if not description.is_file():
        raise KestrelError(
            f"--pretrained: {description.relative_to(root)} is missing, so {path.name} cannot be checked"
        )
    expected, found = read_json(description).get("sha256"), sha256_file(path)
    if found != expected:
        raise KestrelError(
            f"--pretrained: {path.relative_to(root)} is not the file that {description.name} describes (SHA-256 "
            f"{found[:12]}..., expected {str(expected)[:12]}...): restore both"
        )
    return path
