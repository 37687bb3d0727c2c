"""A made-up sweep in the files that runs leave: for tests of gathering, pictures and pages, never a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.pipeline.config import Config, load_config, save_text
from kestrel.pipeline.plan import _labels
from kestrel.pipeline.stages import Run, settings_of
from kestrel.pipeline.sweep import Point, Sweep, write_points
from kestrel.settings import build
from kestrel.store.atomic import write_json, write_text

PROTOCOL = {"name": "toy-12", "hash": "ab" * 32}
HEADER = "step,epoch,phase,lr,train_loss,train_accuracy,validation_loss,validation_accuracy"


def config(root: Path, tag: str, seed: int) -> Config:
    """A resolved configuration on features made elsewhere."""
    text = "recipe: iscas21_lstm\nfeat_dir: feats\nprotocol_name: toy-12\nclasses: [a, b]\nmodel: {}\ntrain: {epochs: 2, steps: null}\nretrain: {epochs: 1, steps: null}\n"
    path = root / "config.yaml"
    write_text(path, text)
    made = load_config(path, root)
    made.tag, made.seed = tag, seed
    return made


def metrics(path: Path, steps: int, first: float, last: float, seed: int, rates: list[float]) -> None:
    """A metrics.csv whose error falls from `first` to `last`."""
    draw = np.random.default_rng(seed)
    lines = [HEADER]
    for index in range(1, 61):
        error = last + (first - last) * np.exp(-index / 9) + draw.normal(0, 0.004)
        rate = rates[min(len(rates) - 1, (index - 1) * len(rates) // 60)]
        lines.append(
            f"{steps * index // 60},{index},x,{rate},{3 * error:.4f},{1 - error * 0.93:.4f},{3 * error:.4f},{1 - error:.4f}"
        )
    write_text(path, "\n".join(lines) + "\n")


def finish(root: Path, exp: Path, seed: int, accuracy: float, energy: float | None, steps: int = 20200) -> None:
    """The folders of a finished run: settings, markers, metrics and a result."""
    made = config(root, exp.name, seed)
    write_text(exp / "config.yaml", save_text(made))
    run = Run(root, exp, made)
    before = {"feature train": "f"}
    for stage, length, error in (("pretrain", steps, 0.85), ("retrain", steps // 2, 1.6 * (1 - accuracy))):
        rates = [0.002, 0.0005, 0.00008] if stage == "pretrain" else [0.00008]
        metrics(exp / stage / "metrics.csv", length, error, 1 - accuracy, seed, rates)
        marker = {"id": f"{stage}-{seed}", "settings": json.loads(json.dumps(settings_of(run, stage)))}
        write_json(exp / stage / ".done.json", {**marker, "inputs": before})
        before = {**before, stage: f"{stage}-{seed}"}
    result(exp, seed, accuracy, energy)
    marker = {"id": "s", "settings": json.loads(json.dumps(settings_of(run, "score")))}
    write_json(exp / "score" / ".done.json", {**marker, "inputs": {"retrain": f"retrain-{seed}"}})


def result(exp: Path, seed: int, accuracy: float, energy: float | None = None, **changes: Any) -> dict[str, Any]:
    """A score/result.json."""
    content = {
        "recipe": "iscas21_lstm",
        "variant": "base",
        "tag": exp.name,
        "seed": seed,
        "protocol": PROTOCOL,
        "split": "test",
        "n": 3048,
        "accuracy": accuracy,
        "ci95": [round(accuracy - 0.01, 6), round(accuracy + 0.01, 6)],
        "parameters": 264493,
        "macs": 12792384,
        "weight_bytes": 264528,
        "integer_accuracy": accuracy + 0.002,
        "evaluation_noise": 0.1,
        **(
            {}
            if energy is None
            else {
                "energy_uj": energy,
                "energy": {
                    "model": "toy",
                    "components": {"ADC": 0.9 * energy, "DAC": 0.06 * energy, "cells": 0.04 * energy},
                },
            }
        ),
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "train_seconds": 1000.0 + seed,
        "command": f"./run.sh --recipe iscas21_lstm --corpus gsc_v2 --variant base --seed {seed}",
        **changes,
    }
    write_json(exp / "score" / "result.json", content)
    return content


def sweep_folder(root: Path, sweep: Sweep, points: list[Point] | None = None) -> Path:
    """The folder of a sweep with its points.json, and no result yet."""
    folder = root / "exp" / "iscas21_lstm" / "sweeps" / sweep.name
    made = config(root, "x", 0)
    description = {
        "recipe": "iscas21_lstm",
        "about": "A made-up sweep.",
        "command": "./run.sh --sweep toy.yaml",
        "labels": _labels(sweep, made),
    }
    write_points(folder, sweep, points or sweep.points(), description)
    return folder


def toy_sweep(name: str, grid: dict[str, list[Any]], **more: Any) -> Sweep:
    """A sweep without a file."""
    made: Sweep = build(Sweep, {"name": name, "grid": grid, **more}, name)
    return made
