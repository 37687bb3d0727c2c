"""Published figures and networks of a recipe: its published.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kestrel.settings import build, load_yaml, setting


@dataclass
class Figure:
    """One published figure."""

    system: str = setting("", "what it is a figure of")
    accuracy: float | None = setting(None, "per cent", min=0, max=100)
    energy_uj: float | None = setting(None, "uJ per decision", min=0)
    parameters: int | None = setting(None, "parameters", min=0)
    protocol: str = setting("", "test clips, where known")
    source: str = setting("", "where it is published")


@dataclass
class Net:
    """A published network, whose blocks are what kestrel.models.architecture reads."""

    accuracy: float = setting(0.0, "per cent", min=0, max=100)
    ops: float = setting(0.0, "millions of multiply-adds, by the rule of their authors", min=0)
    weights: float = setting(0.0, "thousands of weights", min=0)
    n_mfcc: int = setting(10, "coefficients", min=1)
    width_mult: float = setting(1.0, "width multiplier", min=0)
    blocks: str = setting("", "blocks in order")


@dataclass
class Published:
    """published.yaml of a recipe."""

    note: str = setting("", "what to know before comparing")
    figures: list[Figure] = setting([], "figures")
    nets: dict[str, Net] = setting({}, "networks by name")


def read_published(root: Path, recipe: str) -> Published:
    """The published figures of a recipe; none where it has no such file."""
    path = root / "recipes" / recipe / "published.yaml"
    if not path.exists():
        return Published()
    found: Published = build(Published, load_yaml(path), path.name)
    return found
