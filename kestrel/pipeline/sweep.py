"""Sweeps: a grid of settings and seeds, one run each, gathered into one table."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.errors import UsageError
from kestrel.settings import build, load_yaml, setting
from kestrel.store.atomic import read_json, write_json, write_text

_OPTIONS = ("recipe", "variant", "corpus", "protocol", "seed", "feat_dir")
RESULT_COLUMNS = ("accuracy", "ci95_low", "ci95_high", "n", "parameters", "macs", "weight_bytes", "protocol")


@dataclass
class Point:
    """One run of a sweep."""

    name: str
    options: dict[str, Any]
    set: list[str]
    values: dict[str, Any]


@dataclass
class Sweep:
    """A sweep file."""

    name: str = setting("", "name of the sweep; default: name of the file")
    options: dict[str, Any] = setting(
        {}, "options of run.sh for all points: recipe, variant, corpus, protocol, seed, feat_dir"
    )
    set: dict[str, Any] = setting({}, "settings for all points")
    grid: dict[str, list[Any]] = setting({}, "setting (or option) -> values; every combination is a point")
    stop_stage: int = setting(5, "last stage of each point", min=0, max=6)

    def points(self) -> list[Point]:
        """Every combination of the grid, in the order of the file."""
        found = []
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            options = {**self.options, **{k: v for k, v in chosen.items() if k in _OPTIONS}}
            settings = {**self.set, **{k: v for k, v in chosen.items() if k not in _OPTIONS}}
            texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            parts = [
                f"{key.split('.')[-1]}={re.sub(r'[^A-Za-z0-9.+-]+', '-', str(value))}" for key, value in chosen.items()
            ]
            found.append(Point(",".join(parts), options, texts, chosen))
        return found

    def write_points(self, folder: Path) -> None:
        """Write the list of points that `gather` reads."""
        write_json(folder / "points.json", [{"name": p.name, "values": p.values} for p in self.points()])


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises UsageError where the grid is empty or an option is unknown."""
    sweep: Sweep = build(Sweep, load_yaml(path), path.name)
    sweep.name = sweep.name or path.stem
    if not re.fullmatch(r"[\w=,+-][\w .=,+-]*", sweep.name):
        raise UsageError(f"{path.name}: name {sweep.name!r}: letters, digits, blanks, '.', '_', '-', '=' and ',' only")
    for key in sweep.options:
        if key not in _OPTIONS:
            raise UsageError(f"{path.name}: options.{key} is none of {', '.join(_OPTIONS)}; settings belong under set")
    for key in _OPTIONS:
        for value in [*([sweep.options[key]] if key in sweep.options else []), *sweep.grid.get(key, [])]:
            if type(value) is not (int if key == "seed" else str):
                raise UsageError(
                    f"{path.name}: {key}: expected a {'whole number' if key == 'seed' else 'name'}, not {value!r}"
                )
    if not sweep.grid or not all(sweep.grid.values()):
        raise UsageError(f"{path.name}: grid needs at least one setting with at least one value")
    if len({point.name for point in sweep.points()}) != len(sweep.points()):
        raise UsageError(
            f"{path.name}: two points of the grid have the same name (settings that end alike, or a value twice)"
        )
    return sweep


def gather(folder: Path) -> tuple[Path, int, int]:
    """Gather the results of a sweep into `results.csv`; returns its path, the points and how many have no result.

    A point that failed stays in the table with the last error line of its logs.
    """
    points = read_json(folder / "points.json")
    keys = list(points[0]["values"])
    rows = [["point", "status", *keys, *RESULT_COLUMNS, "error"]]
    missing = 0
    for point in points:
        values = [
            json.dumps(value) if isinstance(value, (list, dict)) else str(value) for value in point["values"].values()
        ]
        score = folder / point["name"] / "score"
        if (score / ".done.json").exists():
            result = read_json(score / "result.json")
            flat = {
                **result,
                "ci95_low": result["ci95"][0],
                "ci95_high": result["ci95"][1],
                "protocol": result["protocol"]["name"],
            }
            rows.append([point["name"], "ok", *values, *(str(flat.get(column, "")) for column in RESULT_COLUMNS), ""])
        else:
            missing += 1
            rows.append(
                [
                    point["name"],
                    "failed",
                    *values,
                    *("" for _ in RESULT_COLUMNS),
                    _last_error(folder / point["name"] / "log"),
                ]
            )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path = folder / "results.csv"
    write_text(path, text.getvalue())
    return path, len(points), missing


def _last_error(folder: Path) -> str:
    errors = []
    for log in folder.glob("*.log"):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if " ERROR " in line]
        if lines:
            errors.append((log.stat().st_mtime_ns, lines[-1].split(" ERROR ", 1)[1]))
    return max(errors)[1] if errors else "not run"
