"""Site flags of the job backends."""

from __future__ import annotations

from pathlib import Path

from kestrel.errors import UsageError, unknown
from kestrel.pipeline.stages import BY_NAME
from kestrel.settings import load_yaml


def flags(path: Path, stage: str) -> list[str]:
    """The flags that a site file gives to a stage: those of `all`, then its own.

    Raises UsageError for a stage that does not exist, or a value that is not a list of words.
    """
    data = load_yaml(path)
    for name, value in data.items():
        if name != "all" and name not in BY_NAME:
            raise unknown(f"stage in {path.name}", name, [*BY_NAME, "all"])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise UsageError(f"{path.name}: {name} must be a list of flags, such as [--time=02:00:00]")
    return [*data.get("all", []), *data.get(stage, [])]
