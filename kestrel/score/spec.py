"""Settings of the score stage (no heavy imports: the planner reads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kestrel.settings import setting


@dataclass
class ScoreSpec:
    """Stage 5."""

    split: Literal["test", "validation"] = setting("test", "split that is scored")
    chip: int = setting(0, "keys the noise drawn in evaluation, together with the seed", min=0)
