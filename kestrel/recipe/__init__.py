"""Recipes: what one paper is. Each module here builds its network from typed settings.

A recipe is a folder `recipes/<name>/` with a `recipe.yaml`, and the module `kestrel.recipe.<name>` with

* `ModelSpec`, the dataclass of its `model:` settings (no heavy import at the top of the module), and
* `build(model, input_shape, classes)`, which makes the network for features (frames, width).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kestrel.errors import unknown

if TYPE_CHECKING:
    from kestrel.models.network import Network


class Recipe(Protocol):
    """What the pipeline needs of a recipe module."""

    ModelSpec: type[Any]

    def build(self, model: Any, input_shape: tuple[int, int], classes: int) -> Network:
        """The network for features of `input_shape` (frames, width) and that many classes."""
        ...


def names(root: Path) -> list[str]:
    """The recipes below `root`/recipes."""
    return sorted(path.parent.name for path in (root / "recipes").glob("*/recipe.yaml"))


def load(name: str, root: Path) -> Recipe:
    """The module of recipe `name`. Raises UsageError with the nearest name."""
    if name not in names(root):
        raise unknown("recipe", name, names(root))
    module: Any = importlib.import_module(f"kestrel.recipe.{name}")
    return module
