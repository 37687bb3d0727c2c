"""Kept results of a recipe, and its RESULTS.md, which is made from them alone."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError, UsageError
from kestrel.models.evaluate import wilson
from kestrel.pipeline.console import duration
from kestrel.pipeline.gather import spread, summary_rows
from kestrel.pipeline.published import Published, read_published
from kestrel.pipeline.sweep import REPEATS
from kestrel.store.atomic import read_json, write_json, write_text
from kestrel.store.markdown import table

log = logging.getLogger("kestrel")
_NEEDED = (
    "recipe",
    "variant",
    "tag",
    "seed",
    "protocol",
    "split",
    "n",
    "accuracy",
    "parameters",
    "macs",
    "weight_bytes",
)
_SEED = re.compile(r"(?:^|[-_,])seed[=]?\d+$")
_DIRTY = "\\*"
PICTURES = (
    "accuracy.png",
    "frontier.png",
    "energy.png",
    "error.png",
    "pareto.png",
)  # of a sweep, kept beside its results


def results_folder(root: Path, recipe: str) -> Path:
    """Where kept results of a recipe lie."""
    return root / "recipes" / recipe / "results"


# ----------------------------------------------------------------------------------------------------------------- keep


def kept_name(result: dict[str, Any]) -> str:
    """File name of a kept result: `<variant>-<protocol>-seed<k>.json`; a tag of its own takes the variant's place."""
    protocol, seed = result["protocol"]["name"], result["seed"]
    group = _group(result)
    return f"{group}-{protocol}-seed{seed}.json"


def _group(result: dict[str, Any]) -> str:
    """The variant, or the tag without its seed where the run was given one."""
    if result["tag"] == f"{result['variant']}-{result['protocol']['name']}-seed{result['seed']}":
        return str(result["variant"])
    tag = _SEED.sub("", result["tag"])
    return tag.removesuffix(f"-{result['protocol']['name']}") or str(result["variant"])


def keep(root: Path, folder: Path) -> Path:
    """Keep the result of a run (or of a gathered sweep) in its recipe, and renew RESULTS.md; returns the kept file.

    Says so where the result came from a working tree with changes. Raises KestrelError where there is no result.
    """
    if (folder / "sweep.json").exists():
        content = read_json(folder / "sweep.json")
        good = [row for row in content["points"] if row["status"] == "ok"]
        if not good:
            raise KestrelError(f"{folder.relative_to(root)}: no point has a result to keep")
        missing = len(content["points"]) - len(good)
        if missing:
            log.warning("kept with %d of %d points without a result", missing, len(content["points"]))
        if any(row.get("git_dirty") for row in good):
            log.warning(
                "some points were scored with uncommitted changes: commit, then run the sweep again with --stage 5"
            )
        path = results_folder(root, content["recipe"]) / "sweeps" / f"{content['name']}.json"
        write_json(path, content)
        write_text(path.with_suffix(".csv"), (folder / "summary.csv").read_text(encoding="utf-8"))
        for picture in PICTURES:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(folder / picture, path.with_name(f"{path.stem}-{picture}"))
        recipe = content["recipe"]
    else:
        score = folder / "score" / "result.json"
        if not (score.parent / ".done.json").exists():
            raise KestrelError(f"{folder.relative_to(root)} has no finished score to keep: run --stage 5")
        result = read_json(score)
        recipe = result["recipe"]
        if result.get("git_dirty"):
            log.warning(
                "this result was scored with uncommitted changes, so its commit alone does not give it again: "
                "commit, then run --stage 5 --force --keep"
            )
        path = results_folder(root, recipe) / kept_name(result)
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = _packed_bytes(folder, result)
        if packed is None:
            write_text(path, score.read_text(encoding="utf-8"))
        else:
            write_json(path, {**result, "packed_bytes": packed})
    write_results(root, recipe)
    return path


def _packed_bytes(folder: Path, result: dict[str, Any]) -> int | None:
    """Bytes of pruned weights in packed form, from the files of the run's export; None where it has none of these weights."""
    export = folder / "export"
    if not (export / ".done.json").exists():
        return None
    exported = read_json(export / "export.json")
    if exported.get("checkpoint_sha256") != result.get("checkpoint_sha256"):
        return None
    return exported.get("packed_bytes")


def write_results(root: Path, recipe: str) -> Path:
    """Write RESULTS.md of a recipe."""
    path = root / "recipes" / recipe / "RESULTS.md"
    write_text(path, results_text(root, recipe))
    return path


# ----------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Kept:
    """A kept result of one run."""

    file: str
    result: dict[str, Any]

    @property
    def group(self) -> tuple[str, ...]:
        """What the seeds of one row share."""
        result = self.result
        protocol = result["protocol"]
        return (protocol["name"], protocol["hash"], result["split"], _group(result))


def read_kept(root: Path, recipe: str) -> list[Kept]:
    """The kept results of a recipe in the order of their names. Raises KestrelError where one lacks an entry."""
    found = []
    for path in sorted(results_folder(root, recipe).glob("*.json")):
        result = read_json(path)
        missing = [key for key in _NEEDED if key not in result]
        if missing:
            raise KestrelError(f"{path.relative_to(root)} has no entry {missing[0]}: keep its result again")
        if result["recipe"] != recipe:
            raise KestrelError(f"{path.relative_to(root)} is a result of recipe {result['recipe']}")
        found.append(Kept(path.name, result))
    return found


def results_text(root: Path, recipe: str) -> str:
    """RESULTS.md of a recipe, from recipes/<name>/results and published.yaml."""
    kept = read_kept(root, recipe)
    sweeps = [read_json(path) for path in sorted((results_folder(root, recipe) / "sweeps").glob("*.json"))]
    parts = [
        f"# Results: {recipe}",
        "Made by `steps/results.py` from `results/` and `published.yaml`: do not edit. "
        "`./run.sh ... --keep` keeps the result of a run or of a sweep and renews this page.",
        "A number without its protocol is no number: compare rows of one table only. *Accuracy* is the mean over seeds ± "
        "the sample standard deviation, under the noise in evaluation that the row names. *95 % interval* is Wilson's for "
        "that mean on the clips of the test split; all seeds answer the same clips, so that more seeds do not narrow it. "
        "*Integer model* is the accuracy of the integer arithmetic that is exported, without noise. *Bytes* are the weights "
        f"as stored. A commit with {_DIRTY} had uncommitted changes.",
    ]
    if any("narrow_accuracy" in item.result for item in kept):
        parts.append(
            "*Without multiplier* is the accuracy of the integers that a microcontroller of 2 KB RAM computes "
            "(docs/microcontroller.md), from sound where the features are those of its own front end."
        )
    if any("packed_bytes" in item.result for item in kept):
        parts.append(
            "*Packed* are all weights again, with pruned layers as values and indices without zeros (CBCSC), as measured from "
            "the files of an export."
        )
    if not kept and not sweeps:
        parts.append("No result is kept yet.")
    for protocol in dict.fromkeys(item.group[:3] for item in kept):
        parts += _protocol(protocol, [item for item in kept if item.group[:3] == protocol])
    if sweeps:
        parts.append("## Sweeps")
        for content in sweeps:
            parts += _sweep(content)
            folder = results_folder(root, recipe) / "sweeps"
            shown = [name for picture in PICTURES if (folder / (name := f"{content['name']}-{picture}")).exists()]
            if shown:
                parts.append("\n".join(f"![{name.removesuffix('.png')}](results/sweeps/{name})" for name in shown))
    published = read_published(root, recipe)
    if published.figures or published.nets:
        parts += _published(published)
    return "\n\n".join(parts) + "\n"


def _protocol(protocol: tuple[str, ...], kept: list[Kept]) -> list[str]:
    name, digest, split = protocol
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in kept:
        groups.setdefault(item.group[3], []).append(item.result)
    rows = [_row(group, sorted(results, key=lambda r: int(r["seed"]))) for group, results in sorted(groups.items())]
    header = (
        "variant", "seeds", "clips", "noise", "accuracy", "95 % interval", "integer model", "without multiplier",
        "energy, µJ", "parameters", "multiply-adds", "zero deltas", "zero weights", "µs a frame (model)", "bytes",
        "packed, bytes", "RAM, bytes", "training", "commit",
    )  # fmt: skip
    shown = [index for index in range(len(header)) if any(row[index] is not None for row in rows)]
    lines = [table([header[index] for index in shown], [[row[index] for index in shown] for row in rows])]
    commands = ["Commands:"]
    for group, results in sorted(groups.items()):
        commands.append(f"{group}:\n\n```\n" + "\n".join(_commands(results)) + "\n```")
    return [f"## {name}, {split}", f"SHA-256 over the lists of clips: `{digest}`", *lines, *commands]


def _mean_text(values: Sequence[float], scale: float = 100.0, unit: str = " %", digits: int = 2) -> str | None:
    mean, sd = spread(values)
    if mean is None:
        return None
    text = f"{scale * mean:.{digits}f}"
    return text + (f" ± {scale * sd:.{digits}f}" if sd is not None else "") + unit


def _one(results: list[dict[str, Any]], key: str) -> Any:
    """The value that all seeds share; `a to b` where they differ; None where none has it."""
    values = sorted({result[key] for result in results if result.get(key) is not None})
    if not values:
        return None
    return values[0] if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _row(group: str, results: list[dict[str, Any]]) -> list[Any]:
    right = [result["accuracy"] for result in results]
    n = min(result["n"] for result in results)
    mean, _ = spread(right)
    assert mean is not None
    low, high = wilson(mean * n, n)
    seconds = [result["train_seconds"] for result in results if result.get("train_seconds")]
    commits = dict.fromkeys(
        f"`{str(result['git_commit'])[:7]}`{_DIRTY if result.get('git_dirty') else ''}"
        for result in results
        if result.get("git_commit")
    )
    return [
        f"`{group}`",
        " ".join(str(result["seed"]) for result in results),
        _one(results, "n"),
        _one(results, "evaluation_noise"),
        _mean_text(right),
        f"{100 * low:.2f} to {100 * high:.2f}",
        _mean_text([result["integer_accuracy"] for result in results if "integer_accuracy" in result]),
        _mean_text([result["narrow_accuracy"] for result in results if "narrow_accuracy" in result]),
        _mean_text([r["energy_uj"] for r in results if r.get("energy_uj") is not None], 1.0, "", 3),
        _one(results, "parameters"),
        _one(results, "macs"),
        _mean_text([r["temporal_sparsity"] for r in results if r.get("temporal_sparsity") is not None], digits=1),
        _mean_text([r["weight_sparsity"] for r in results if r.get("weight_sparsity") is not None], digits=1),
        _frame_time(results),
        _one(results, "weight_bytes"),
        _one(results, "packed_bytes"),
        _one(results, "peak_ram_bytes"),
        duration(sum(seconds) / len(seconds)) if seconds else None,
        ", ".join(commits) or None,
    ]


def _frame_time(results: list[dict[str, Any]]) -> str | None:
    """Mean time of a frame by the cycle model of an accelerator, and which."""
    found = [result["accelerator"] for result in results if result.get("accelerator")]
    mean = _mean_text([figures["microseconds"]["mean"] for figures in found], 1.0, "")
    return mean and f"{mean} ({', '.join(dict.fromkeys(figures['machine'] for figures in found))})"


def _commands(results: list[dict[str, Any]]) -> list[str]:
    """The exact commands; one line with a loop where they differ in the seed alone."""
    commands = [str(result.get("command") or "not recorded") for result in results]
    seeds = [result["seed"] for result in results]
    patterns = {
        re.sub(rf"(--seed ){seed}(?= |$)", r"\1$seed", command) for seed, command in zip(seeds, commands, strict=True)
    }
    if len(commands) > 1 and len(patterns) == 1 and "$seed" in (pattern := patterns.pop()):
        return [f"for seed in {' '.join(map(str, seeds))}; do {pattern}; done"]
    return list(dict.fromkeys(commands))


def _sweep(content: dict[str, Any]) -> list[str]:
    header, rows = summary_rows(content)
    axes = [key for key in content["axes"] if key not in REPEATS]
    place = {name: index for index, name in enumerate(header)}
    good = [row for row in content["points"] if row["status"] == "ok"]

    def averaged(row: list[Any], key: str, scale: float, unit: str, digits: int) -> str | None:
        mean, sd = row[place[f"{key}_mean"]], row[place[f"{key}_sd"]]
        if mean is None:
            return None
        return f"{scale * mean:.{digits}f}" + (f" ± {scale * sd:.{digits}f}" if sd is not None else "") + unit

    lines = [
        [
            *("analog" if row[place[key]] is None else row[place[key]] for key in axes),
            f"{row[place['ok']]} of {row[place['points']]}",
            averaged(row, "accuracy", 100, " %", 2),
            averaged(row, "integer_accuracy", 100, " %", 2),
            averaged(row, "energy_uj", 1, "", 3),
            averaged(row, "temporal_sparsity", 100, " %", 1) if "temporal_sparsity_mean" in place else None,
        ]
        for row in rows
    ]
    names = [*(f"`{key}`" for key in axes), "runs", "accuracy", "integer model", "energy, µJ", "zero deltas"]
    shown = [index for index in range(len(names)) if any(line[index] is not None for line in lines)]
    parts = [f"### {content['name']}", content["about"]]
    protocols = dict.fromkeys((row["protocol"], row["split"], row["n"], row["protocol_hash"]) for row in good)
    made = ", ".join(f"`{name}`" for name in dict.fromkeys(row["variant"] for row in good))
    commits = ", ".join(f"`{name[:7]}`" for name in dict.fromkeys(str(row["git_commit"]) for row in good))
    parts.append(
        f"Variant {made}, commit {commits}. Protocol: "
        + "; ".join(f"{name}, {split}, {n:,} clips (`{digest[:12]}`)" for name, split, n, digest in protocols)
    )
    parts.append(table([names[index] for index in shown], [[line[index] for index in shown] for line in lines]))
    failed = [row for row in content["points"] if row["status"] != "ok"]
    if failed:
        parts.append("\n".join(f"* {row['point']}: {row['status']}: {row['error']}" for row in failed))
    parts.append(f"```\n{content['command']}\n```")
    return parts


def _published(published: Published) -> list[str]:
    rows = [
        [
            figure.system,
            None if figure.accuracy is None else f"{figure.accuracy:g} %",
            None if figure.energy_uj is None else f"{figure.energy_uj:g}",
            figure.parameters,
            figure.protocol or None,
            figure.source,
        ]
        for figure in published.figures
    ]
    header = ["system", "accuracy", "energy, µJ", "parameters", "test clips", "source"]
    shown = [index for index in range(len(header)) if any(row[index] is not None for row in rows)]
    for figure in published.figures:
        if not figure.system or not figure.source:
            raise UsageError("published.yaml: each figure needs a system and a source")
    lines = ["## Published figures", published.note.strip()]
    if rows:
        lines.append(table([header[index] for index in shown], [[row[index] for index in shown] for row in rows]))
    if published.nets:
        names = ("network", "accuracy", "operations, M", "weights, k", "coefficients", "width", "blocks")
        cells = [
            [
                name,
                f"{net.accuracy:g} %",
                f"{net.ops:g}",
                f"{net.weights:g}",
                net.n_mfcc,
                f"{net.width_mult:g}",
                net.blocks,
            ]
            for name, net in published.nets.items()
        ]
        lines.append(table(names, cells))
    return lines
