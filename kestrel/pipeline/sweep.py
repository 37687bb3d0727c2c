"""Sweep files: a grid of settings and seeds, one run for each of its points."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kestrel.errors import UsageError
from kestrel.settings import build, load_yaml, parse_assignment, setting
from kestrel.store.atomic import write_json

OPTIONS = ("recipe", "variant", "corpus", "protocol", "seed", "feat_dir")
REPEATS = ("seed", "score.chip")  # axes over which a setting is averaged
POINTS = "points.json"


@dataclass
class Point:
    """One run of a sweep."""

    name: str
    options: dict[str, Any]
    set: list[str]  # settings of the file for all points
    grid: list[str]  # settings of this point
    values: dict[str, Any]
    trained: str | None = None  # name of the point whose checkpoint this one scores
    error: str | None = None  # why it cannot run

    @property
    def trains(self) -> bool:
        """Whether it has weights of its own."""
        return self.trained is None


@dataclass
class ReferenceLine:
    """A published row of figures, drawn beside the points with the values `where`."""

    where: dict[str, Any] = setting({}, "axis -> value: the points that this row is compared with; empty: all")
    x: list[Any] = setting([], "values on the x axis")
    accuracy: list[float] = setting([], "accuracy in per cent", min=0, max=100)


@dataclass
class Reference:
    """Published figures of a sweep."""

    source: str = setting("", "where they are published, and on what")
    lines: list[ReferenceLine] = setting([], "rows")


@dataclass
class Sweep:
    """A sweep file."""

    name: str = setting("", "name of the sweep; default: name of the file")
    options: dict[str, Any] = setting(
        {}, "options of run.sh for all points: recipe, variant, corpus, protocol, seed, feat_dir"
    )
    set: dict[str, Any] = setting({}, "settings for all points")
    grid: dict[str, list[Any]] = setting({}, "setting (or option) -> values; every combination is a point")
    score: dict[str, list[Any]] = setting(
        {}, "settings of scoring alone -> values; each trained point is scored at each"
    )
    x: str | None = setting(None, "axis drawn to the right; default: the last one of score or the first one of grid")
    y: Literal["accuracy", "integer_accuracy"] = setting("accuracy", "figure of the pictures")
    labels: dict[str, str] = setting({}, "axis -> its name in pictures; default: the help of the setting")
    reference: Reference | None = setting(None, "published figures to draw beside")
    stop_stage: int = setting(5, "last stage of each point", min=0, max=6)

    @property
    def axes(self) -> dict[str, list[Any]]:
        """All axes: those of the grid, then those of scoring."""
        return {**self.grid, **self.score}

    @property
    def x_axis(self) -> str:
        """The axis of the pictures."""
        varied = [key for key in [*reversed(self.score), *self.grid] if key not in REPEATS]
        return self.x or (varied[0] if varied else next(iter(self.axes)))

    def narrowed(self, options: Mapping[str, Any], settings: list[str]) -> Sweep:
        """The sweep under options and settings of the command line: these replace the file's, axes included."""
        given = {**options, **{key: value for text in settings for key, value in _flat(parse_assignment(text)).items()}}

        def axis(axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {key: [given[key]] if key in given else values for key, values in axes.items()}

        return replace(
            self,
            options={key: value for key, value in self.options.items() if key not in options},
            set={key: value for key, value in self.set.items() if key not in given},
            grid=axis(self.grid),
            score=axis(self.score),
        )

    def points(self) -> list[Point]:
        """Every combination of the grid in the order of the file; each followed by the points that only score it."""
        found = []
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            options = {**self.options, **{k: v for k, v in chosen.items() if k in OPTIONS}}
            fixed = _texts(self.set)
            grid = _texts({k: v for k, v in chosen.items() if k not in OPTIONS})
            trained = Point(_name(chosen), options, fixed, grid, chosen)
            found.append(trained)
            if self.score:
                for levels in itertools.product(*self.score.values()):
                    level = dict(zip(self.score, levels, strict=True))
                    both = {**chosen, **level}
                    found.append(
                        Point(_name(both), options, fixed, [*grid, *_texts(level)], both, trained=trained.name)
                    )
        return found


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _texts(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _name(values: dict[str, Any]) -> str:
    return ",".join(
        f"{key.split('.')[-1]}={re.sub(r'[^A-Za-z0-9.+-]+', '-', str(value))}" for key, value in values.items()
    )


def about(path: Path) -> str:
    """The comment at the head of a sweep file, as one paragraph."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines).strip()


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises UsageError where the grid is empty or an option is unknown.

    A file in recipes/<name>/sweeps belongs to that recipe unless it names another.
    """
    sweep: Sweep = build(Sweep, load_yaml(path), path.name)
    sweep.name = sweep.name or path.stem
    if not re.fullmatch(r"[\w=,+-][\w .=,+-]*", sweep.name):
        raise UsageError(f"{path.name}: name {sweep.name!r}: letters, digits, blanks, '.', '_', '-', '=' and ',' only")
    for key in sweep.options:
        if key not in OPTIONS:
            raise UsageError(f"{path.name}: options.{key} is none of {', '.join(OPTIONS)}; settings belong under set")
    for key in OPTIONS:
        for value in [*([sweep.options[key]] if key in sweep.options else []), *sweep.grid.get(key, [])]:
            if type(value) is not (int if key == "seed" else str):
                raise UsageError(
                    f"{path.name}: {key}: expected a {'whole number' if key == 'seed' else 'name'}, not {value!r}"
                )
    if not sweep.grid or not all(sweep.axes.values()):
        raise UsageError(f"{path.name}: grid needs at least one setting with at least one value")
    for key in sweep.score:
        if key in sweep.grid or key in OPTIONS:
            raise UsageError(f"{path.name}: score.{key}: a setting of scoring, not one of grid or an option")
    if sweep.x is not None and sweep.x not in sweep.axes:
        raise UsageError(f"{path.name}: x: {sweep.x} is none of the axes {', '.join(sweep.axes)}")
    for key in sweep.labels:
        if key not in sweep.axes:
            raise UsageError(f"{path.name}: labels: {key} is none of the axes {', '.join(sweep.axes)}")
    if sweep.reference is not None:
        for line in sweep.reference.lines:
            if len(line.x) != len(line.accuracy):
                raise UsageError(
                    f"{path.name}: reference: {len(line.x)} values of x for {len(line.accuracy)} of accuracy"
                )
    names = [point.name for point in sweep.points()]
    if len(set(names)) != len(names):
        raise UsageError(
            f"{path.name}: two points of the grid have the same name (settings that end alike, or a value twice)"
        )
    folder = path.resolve().parent
    if folder.name == "sweeps" and (folder.parent / "recipe.yaml").exists():
        sweep.options.setdefault("recipe", folder.parent.name)
    return sweep


def write_points(folder: Path, sweep: Sweep, points: list[Point], description: Mapping[str, Any]) -> None:
    """Write what gathering needs: the list of points and what describes the sweep."""
    content = {
        "name": sweep.name,
        **description,
        "axes": sweep.axes,
        "x": sweep.x_axis,
        "y": sweep.y,
        "reference": None
        if sweep.reference is None
        else {"source": sweep.reference.source, "lines": [vars(line) for line in sweep.reference.lines]},
        "points": [
            {"name": point.name, "values": point.values, "trained": point.trained, "error": point.error}
            for point in points
            if not (sweep.score and point.trains)
        ],
    }
    write_json(folder / POINTS, content)
