"""The points of a sweep gathered: tables, one file to keep, and pictures."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError
from kestrel.pipeline.config import load_config
from kestrel.pipeline.published import read_published
from kestrel.pipeline.stages import Run, done_file, present, result_id, settings_of, started_file
from kestrel.pipeline.sweep import POINTS, REPEATS
from kestrel.score import plots, sweep_plots
from kestrel.score.sweep_plots import Line, Setting, Strip
from kestrel.store.atomic import read_json, remove_stale, write_json, write_text
from kestrel.store.hashing import sha256_file

NUMBERS = (
    "accuracy",
    "ci95_low",
    "ci95_high",
    "n",
    "integer_accuracy",
    "energy_uj",
    "parameters",
    "macs",
    "weight_bytes",
    "temporal_sparsity",
    "weight_sparsity",
)
PROVENANCE = ("variant", "protocol", "protocol_hash", "split", "git_commit", "git_dirty")
AVERAGED = ("accuracy", "integer_accuracy", "energy_uj")
WHERE_KNOWN = ("temporal_sparsity",)  # averaged, too, in sweeps of networks that have it
_CURVES = 8  # runs in one picture of training


@dataclass(frozen=True)
class Gathered:
    """What gathering made of a sweep."""

    table: Path
    points: int
    failed: int
    pictures: tuple[Path, ...]


def gather(root: Path, folder: Path) -> Gathered:
    """Gather the results of the sweep in `folder`: results.csv, summary.csv, sweep.json and pictures.

    A point that failed, or was not run, stays in the table with the last error line of its logs. A result counts only
    where it was made with the settings that the point has now.
    """
    content = read_json(folder / POINTS)
    rows = [_row(root, folder, point) for point in content["points"]]
    remove_stale(folder)
    content = {**content, "points": rows}
    write_json(folder / "sweep.json", content)
    table = folder / "results.csv"
    axes = list(content["axes"])
    keys = [*axes, *([] if "seed" in axes else ["seed"]), *NUMBERS, *PROVENANCE]
    _write_csv(
        table,
        ["point", "status", *keys, "error"],
        [
            [row["point"], row["status"], *({**row, **row["values"]}.get(key) for key in keys), row["error"]]
            for row in rows
        ],
    )
    header, lines = summary_rows(content)
    _write_csv(folder / "summary.csv", header, lines)
    failed = sum(row["status"] != "ok" for row in rows)
    return Gathered(table, len(rows), failed, tuple(draw(root, folder, content)))


def finished(root: Path, exp: Path) -> bool:
    """Whether the score of a run was made by the settings that its config.yaml has now, its training included."""
    if not (exp / "config.yaml").exists():
        return False
    run = Run(root, exp, load_config(exp / "config.yaml", root))
    given = run.config.checkpoint is not None
    for stage in ("score",) if given else ("pretrain", "retrain", "score"):
        if present(run, stage) is not None:
            continue
        folder = run.out(stage)
        if not done_file(folder).exists() or started_file(folder).exists():
            return False
        marker = read_json(done_file(folder))
        if marker["settings"] != json.loads(json.dumps(settings_of(run, stage))):
            return False
        for earlier in ("pretrain", "retrain"):
            if earlier in marker["inputs"] and marker["inputs"][earlier] != result_id(run.out(earlier)):
                return False
        if given:
            path = run.root / str(run.config.checkpoint)
            return path.exists() and marker["inputs"]["checkpoint"] == sha256_file(path)
    return True


def _row(root: Path, folder: Path, point: dict[str, Any]) -> dict[str, Any]:
    exp = folder / point["name"]
    row: dict[str, Any] = {"point": point["name"], "status": "ok", "values": point["values"]}
    if point["error"] is not None:
        return {**row, "status": "failed", "error": point["error"]}
    trained = folder / point["trained"] if point["trained"] is not None else None
    if not finished(root, exp):
        error = _last_error(exp / "log")
        if trained is not None and not done_file(_trained_stage(root, trained)).exists():
            error = _last_error(trained / "log")
        return {**row, "status": "not run" if error is None else "failed", "error": error or "not run"}
    result = read_json(exp / "score" / "result.json")
    row |= {key: result[key] for key in (*NUMBERS, *PROVENANCE, "seed") if key in result}
    row |= {"ci95_low": result["ci95"][0], "ci95_high": result["ci95"][1]}
    row |= {"protocol": result["protocol"]["name"], "protocol_hash": result["protocol"]["hash"]}
    if "energy" in result:
        row["energy"] = {"model": result["energy"]["model"], "components": result["energy"]["components"]}
    return {**row, "error": None}


def _trained_stage(root: Path, exp: Path) -> Path:
    config = exp / "config.yaml"
    retrain = config.exists() and load_config(config, root).retrain is not None
    return exp / ("retrain" if retrain else "pretrain")


def _last_error(folder: Path) -> str | None:
    """The error line that ended the newest attempt, where the log's last words are an error."""
    errors = []
    for log in folder.glob("*.log"):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if " ERROR " in line]
        if lines:
            errors.append((log.stat().st_mtime_ns, lines[-1].split(" ERROR ", 1)[1].removeprefix("error: ")))
    return max(errors)[1] if errors else None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_text(value) for value in row] for row in rows)
    write_text(path, text.getvalue())


def settings(content: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(values without repeats, rows) of each setting of a gathered sweep, in the order of the points."""
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for row in content["points"]:
        values = {key: value for key, value in row["values"].items() if key not in REPEATS}
        found.setdefault(json.dumps(values), (values, []))[1].append(row)
    return list(found.values())


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation); None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def summary_rows(content: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) of summary.csv: mean and standard deviation of each setting over seeds (and chips)."""
    axes = [key for key in content["axes"] if key not in REPEATS]
    header = [*axes, "points", "ok"]
    averaged = [*AVERAGED, *(key for key in WHERE_KNOWN if any(row.get(key) is not None for row in content["points"]))]
    for key in averaged:
        header += [f"{key}_mean", f"{key}_sd"]
    header += ["accuracy_min", "accuracy_max", "n", "macs", "weight_bytes", "protocol"]
    lines = []
    for values, rows in settings(content):
        good = [row for row in rows if row["status"] == "ok"]
        line = [*(values[key] for key in axes), len(rows), len(good)]
        for key in averaged:
            line += [
                None if number is None else round(number, 6)
                for number in spread([row[key] for row in good if key in row])
            ]
        right = [row["accuracy"] for row in good]
        line += [round(min(right), 6), round(max(right), 6)] if right else [None, None]
        for key in ("n", "macs", "weight_bytes", "protocol"):
            line.append("; ".join(dict.fromkeys(str(row[key]) for row in good if key in row)))
        lines.append(line)
    return header, lines


# ------------------------------------------------------------------------------------------------------------- pictures


def _level(value: Any) -> str:
    if value is None:
        return "analog"
    return f"{value:g}" if isinstance(value, float) else _text(value)


def _series_name(content: dict[str, Any], values: dict[str, Any]) -> str:
    others = [key for key in values if key != content["x"]]
    return ", ".join(f"{key.split('.')[-1]} = {_level(values[key])}" for key in others)


def plotted(content: dict[str, Any]) -> list[Setting]:
    """The settings of a gathered sweep that have a result, as the pictures take them."""
    found = []
    figure = content.get("y", "accuracy")
    for values, rows in settings(content):
        good = [row for row in rows if row["status"] == "ok" and row.get(figure) is not None]
        if good:
            x = values[content["x"]] if content["x"] in values else good[0]["values"][content["x"]]
            found.append(
                Setting(
                    x,
                    _series_name(content, values),
                    tuple(row[figure] for row in good),
                    tuple(row["energy_uj"] for row in good if row.get("energy_uj") is not None),
                    tuple(row["temporal_sparsity"] for row in good if row.get("temporal_sparsity") is not None),
                )
            )
    return found


def _references(content: dict[str, Any]) -> list[Line]:
    """Rows of published figures whose `where` names a series of this sweep."""
    reference = content["reference"]
    if reference is None:
        return []
    names = {}
    for values, _ in settings(content):
        names[_series_name(content, values)] = values
    found = []
    for line in reference["lines"]:
        for name, values in names.items():
            if all(key not in values or values[key] == wanted for key, wanted in line["where"].items()):
                found.append(Line(name, tuple(line["x"]), tuple(number / 100 for number in line["accuracy"])))
    return found


def _title(content: dict[str, Any]) -> str:
    good = [row for row in content["points"] if row["status"] == "ok"]
    protocols = ", ".join(dict.fromkeys(f"{row['protocol']} ({row['split']}, n = {row['n']:,})" for row in good))
    made = ", ".join(dict.fromkeys(row["variant"] for row in good))
    return f"{content['recipe']}: {content['name']}, variant {made}\n{protocols}"


def draw(root: Path, folder: Path, content: dict[str, Any]) -> list[Path]:
    """Draw the pictures of a gathered sweep into its folder; none where no point has a result."""
    found = plotted(content)
    if not found:
        return []
    pareto = _pareto(root, folder, content)
    title, label = _title(content), content["labels"].get(content["x"], content["x"])
    reference = content["reference"]
    paths = [folder / "accuracy.png"]
    source = f"published: {reference['source']}" if reference else ""
    sweep_plots.accuracy_against(found, label, title, _references(content), source, paths[0])
    energies = {f"{setting.energy:.3g}" for setting in found if setting.energy}
    if len(energies) > 1:  # else it is a vertical line
        paths.append(folder / "energy.png")
        sweep_plots.accuracy_energy(found, label, title, paths[-1])
    if len({round(setting.sparsity, 3) for setting in found if setting.sparsity is not None}) > 1:
        paths.append(folder / "frontier.png")
        sweep_plots.accuracy_sparsity(found, label, title, paths[-1])
    bars = _bars(content)
    if bars:
        paths.append(folder / "energy_bars.png")
        plots.energy_bars(bars, paths[-1], title)
    paths.append(folder / "strips.png")
    sweep_plots.strips([Strip(label, tuple(found))], title, paths[-1])
    runs = _training(folder, content)
    if runs:
        paths.append(folder / "error.png")
        sweep_plots.error_curves(runs, title, paths[-1])
    together = _ablation(folder, content)
    if together is not None:
        paths.append(together)
    return [*paths, *pareto]


def _pareto(root: Path, folder: Path, content: dict[str, Any]) -> list[Path]:
    """pareto.csv and pareto.png: accuracy against multiply-adds and bytes, for networks of different size.

    Published networks of the recipe's published.yaml stand beside them, at 8 bits.
    """
    found, figure = [], content.get("y", "accuracy")
    needed = ("macs", "weight_bytes", figure)
    for values, rows in settings(content):
        good = [row for row in rows if row["status"] == "ok" and all(row.get(key) is not None for key in needed)]
        if good:
            label = (
                ", ".join(f"{key.split('.')[-1]} = {_level(value)}" for key, value in values.items())
                or good[0]["point"]
            )
            macs, stored = (statistics.fmean(row[key] for row in good) for key in ("macs", "weight_bytes"))
            found.append(sweep_plots.Network(label, macs, stored, tuple(row[figure] for row in good)))
    if len({(each.macs, each.bytes) for each in found}) < 2:
        return []
    published = [
        sweep_plots.Network(name, 1e6 * net.ops, 1e3 * net.weights, (net.accuracy / 100,))
        for name, net in read_published(root, content["recipe"]).nets.items()
    ]
    front = sweep_plots.front([(each.macs, each.mean) for each in found])
    light = sweep_plots.front([(each.bytes, each.mean) for each in found])
    _write_csv(
        folder / "pareto.csv",
        ["network", "kind", "macs", "weight_bytes", "accuracy", "runs", "best_at_macs", "best_at_bytes"],
        [
            [each.label, kind, round(each.macs), round(each.bytes), round(each.mean, 6), len(each.accuracy),
             kind == "here" and (each.macs, each.mean) in front, kind == "here" and (each.bytes, each.mean) in light]
            for kind, group in (("here", found), ("published", published))
            for each in group
        ],
    )  # fmt: skip
    path = folder / "pareto.png"
    sweep_plots.pareto(found, published, _title(content), path)
    return [path]


def _bars(content: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """(label, mean uJ by component) of each setting whose results name the components; settings of equal energy once."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for values, rows in settings(content):
        parts = [row["energy"]["components"] for row in rows if row["status"] == "ok" and row.get("energy")]
        if parts:
            label = ", ".join(f"{key.split('.')[-1]} = {_level(value)}" for key, value in values.items())
            mean = {name: statistics.fmean(part.get(name, 0.0) for part in parts) for name in parts[0]}
            found.setdefault(json.dumps(mean), (label or content["name"], mean))
    return list(found.values())


def _training(folder: Path, content: dict[str, Any]) -> list[tuple[str, list[tuple[str, Path]]]]:
    """(label, metrics.csv of its phases) of the first repeat of each setting that was trained here."""
    runs: dict[str, tuple[str, list[tuple[str, Path]]]] = {}
    trained = {point["name"]: point["trained"] or point["name"] for point in read_json(folder / POINTS)["points"]}
    for _, rows in settings(content):
        good = [row for row in rows if row["status"] == "ok"]
        if not good:
            continue
        name = trained[good[0]["point"]]
        values = {key: good[0]["values"][key] for key in good[0]["values"] if key.split(".")[-1] + "=" in name}
        shown = {key: value for key, value in values.items() if key not in REPEATS and len(content["axes"][key]) > 1}
        label = ", ".join(f"{key.split('.')[-1]} = {_level(value)}" for key, value in shown.items()) or name
        files = [(stage, folder / name / stage / "metrics.csv") for stage in ("pretrain", "retrain")]
        runs.setdefault(name, (label, [(stage, path) for stage, path in files if path.exists()]))
    found = [run for run in runs.values() if run[1]]
    if len(found) > _CURVES:  # of several series the last one alone
        series = {
            name: _series_name(content, values)
            for values, rows in settings(content)
            for name in {trained[row["point"]] for row in rows}
        }
        last = series[next(reversed(runs))]
        found = [run for name, run in runs.items() if run[1] and series[name] == last] or found
    if len(found) > _CURVES:  # evenly chosen, the first and the last among them
        found = [found[round(index * (len(found) - 1) / (_CURVES - 1))] for index in range(_CURVES)]
    return found


def _ablation(folder: Path, content: dict[str, Any]) -> Path | None:
    """Strips of all sweeps gathered beside this one on the same clips; None where it is the only one."""
    mine = {row["protocol_hash"] for row in content["points"] if row["status"] == "ok"}
    found = []
    for path in sorted(folder.parent.glob("*/sweep.json")):
        try:
            other = read_json(path)
            hashes = {row["protocol_hash"] for row in other["points"] if row["status"] == "ok"}
            if hashes == mine and (points := plotted(other)):
                found.append((other["labels"].get(other["x"], other["x"]), points))
        except (KestrelError, KeyError, TypeError):
            continue  # of another version: it is drawn again when it is gathered again
    if len(found) < 2:
        return None
    good = next(row for row in content["points"] if row["status"] == "ok")
    title = f"{content['recipe']}: all sweeps\n{good['protocol']} ({good['split']}, n = {good['n']:,})"
    path = folder.parent / "ablation.png"
    sweep_plots.strips([Strip(label, tuple(points)) for label, points in found], title, path)
    return path
