"""Sweeps: the points of a grid, runs that fail in between, and the table of results."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import Checkout

from kestrel.errors import KestrelError, UsageError
from kestrel.pipeline.sweep import RESULT_COLUMNS, gather, load_sweep
from kestrel.settings import load_yaml
from kestrel.store.atomic import write_json

GRID = """
name: sizes
options: {corpus: mini, variant: mini}
set: {train.epochs: 2}
grid:
  model.hidden: [8, 16]
  seed: [0, 1, 2]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------- files


def test_every_combination_is_a_point_in_the_order_of_the_file(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path / "a.yaml", GRID))
    points = sweep.points()
    assert [point.name for point in points] == [f"hidden={h},seed={s}" for h in (8, 16) for s in (0, 1, 2)]
    assert points[4].options == {"corpus": "mini", "variant": "mini", "seed": 1}
    assert points[4].set == ["train.epochs=2", "model.hidden=16"]
    assert points[4].values == {"model.hidden": 16, "seed": 1}
    assert (sweep.name, sweep.stop_stage) == ("sizes", 5)


def test_the_name_defaults_to_that_of_the_file(tmp_path: Path) -> None:
    assert load_sweep(write(tmp_path / "noise.yaml", "grid: {model.noise_train: [0.0, 1e-1]}")).name == "noise"


def test_values_of_any_kind_make_plain_folder_names(tmp_path: Path) -> None:
    text = "grid: {train.lr: [[0.1, 0.2], 1e-3], model.quant_w: [null, 4], protocol.words: [[yes, 'no']]}"
    points = load_sweep(write(tmp_path / "a.yaml", text)).points()
    assert len({point.name for point in points}) == 4
    for point in points:
        assert not set(point.name) & set("/ []'\"\t")
    assert points[0].set == ["train.lr=[0.1, 0.2]", "model.quant_w=null", 'protocol.words=["yes", "no"]']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("set: {model.hidden: 3}", "grid needs at least one setting"),
        ("grid: {}", "grid needs at least one setting"),
        ("grid: {model.hidden: []}", "grid needs at least one setting"),
        ("grid: {model.hidden: 3}", ""),
        ("grid: {model.hidden: [3, 3]}", "two points of the grid have the same name"),
        ("grid: {train.epochs: [1, 2], retrain.epochs: [1, 2]}", ""),
        ("gird: {model.hidden: [3]}", "did you mean 'bad.yaml.grid'?"),
        ("name: ../x\ngrid: {seed: [1]}", "name '../x': letters"),
        ("options: {model.hidden: 3}\ngrid: {seed: [1]}", "options.model.hidden is none of"),
        ("options: {sead: 3}\ngrid: {model.hidden: [1]}", "options.sead is none of"),
        ("options: {seed: a}\ngrid: {model.hidden: [1]}", "seed: expected a whole number, not 'a'"),
        ("grid: {seed: [1, 1.5]}", "seed: expected a whole number, not 1.5"),
        ("grid: {corpus: [mini, 3]}", "corpus: expected a name, not 3"),
        ("stop_stage: 9\ngrid: {seed: [1]}", "stop_stage: 9 is out of bounds"),
        ("grid: [", "not valid YAML"),
    ],
)
def test_bad_sweep_files(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", text)
    if message:
        with pytest.raises(UsageError) as caught:
            load_sweep(path)
        assert message in str(caught.value) and "\n" not in str(caught.value) and "bad.yaml" in str(caught.value)
    else:
        names = [point.name for point in load_sweep(path).points()]
        assert len(set(names)) == len(names) > 0


# ------------------------------------------------------------------------------------------------------------- gather


def result(folder: Path, accuracy: float) -> None:
    """The score folder of a finished point."""
    content = {
        "accuracy": accuracy,
        "ci95": [accuracy - 0.1, accuracy + 0.1],
        "n": 66,
        "parameters": 1234,
        "macs": 5678,
        "weight_bytes": 910,
        "protocol": {"name": "mini-12", "hash": "abc"},
    }
    write_json(folder / "score" / "result.json", content)
    write_json(folder / "score" / ".done.json", {})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A sweep of six points: two with a result, two that failed, one that was never started, one not yet scored."""
    folder = tmp_path / "sizes"
    load_sweep(write(tmp_path / "a.yaml", GRID)).write_points(folder)
    result(folder / "hidden=8,seed=0", 0.5)
    result(folder / "hidden=16,seed=2", 0.75)
    for name, lines in (
        (
            "hidden=8,seed=1",
            "2024-01-01 00:00:00 ERROR error: first\n2024-01-02 00:00:00 ERROR error: no space, left\n",
        ),
        ("hidden=8,seed=2", "2024-01-01 00:00:00 INFO fine\n"),
    ):
        (folder / name / "log").mkdir(parents=True)
        (folder / name / "log" / "pretrain.log").write_text(lines)
    write_json(folder / "hidden=16,seed=0" / "score" / "result.json", {"accuracy": 0.9})  # without its marker
    return folder


def test_gather_keeps_failed_and_missing_points(finished: Path) -> None:
    path, points, missing = gather(finished)
    assert (path, points, missing) == (finished / "results.csv", 6, 4)
    rows = table(path)
    assert list(rows[0]) == ["point", "status", "model.hidden", "seed", *RESULT_COLUMNS, "error"]
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "failed", "failed", "ok"]
    first, last = rows[0], rows[5]
    assert (first["model.hidden"], first["seed"], first["accuracy"], first["protocol"]) == ("8", "0", "0.5", "mini-12")
    assert (last["ci95_low"], last["ci95_high"], last["weight_bytes"]) == ("0.65", "0.85", "910")
    assert rows[1]["error"] == "error: no space, left"
    assert [rows[number]["error"] for number in (2, 3, 4)] == ["not run"] * 3
    assert rows[1]["accuracy"] == ""


def test_gathering_twice_gives_the_same_bytes(finished: Path) -> None:
    first = gather(finished)[0].read_bytes()
    assert gather(finished)[0].read_bytes() == first


def test_gather_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(KestrelError, match=r"cannot read .*points\.json"):
        gather(tmp_path)


def test_the_gather_script_tells_by_its_exit_code(checkout: Checkout, finished: Path) -> None:
    place = checkout.root / "exp" / "iscas21_lstm" / "sweeps" / "gathered"
    place.parent.mkdir(parents=True, exist_ok=True)
    finished.rename(place)

    def call() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "steps/gather.py", "exp/iscas21_lstm/sweeps/gathered"]
        environment = checkout.environment(PYTHONPATH=str(checkout.root))
        return subprocess.run(command, cwd=checkout.root, env=environment, capture_output=True, text=True, check=False)

    done = call()
    assert done.returncode == 1
    assert done.stdout == "2 of 6 points have a result: exp/iscas21_lstm/sweeps/gathered/results.csv\n"
    for row in table(place / "results.csv"):
        result(place / row["point"], 0.5)
    assert call().returncode == 0


# ---------------------------------------------------------------------------------------------------------- through run.sh


def test_a_failing_point_does_not_stop_the_others(checkout: Checkout, tiny_corpus: Path, tmp_path: Path) -> None:
    text = "grid:\n  protocol.words: [[yes, 'no'], [nonesuch], [up, down]]\nstop_stage: 1\noptions: {variant: mini}\n"
    path = write(tmp_path / "some words.yaml", text)
    options = ["--sweep", path.name, "--corpus", str(tiny_corpus), "--nproc", "1"]
    dry = checkout.run(*options, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0
    assert dry.stdout.count("stage 1 prepare   run: after stage 0 download") == 3
    assert "stage 2" not in dry.stdout
    done = checkout.run(*options, cwd=tmp_path)
    assert done.returncode == 1
    folder = checkout.root / "exp" / "iscas21_lstm" / "sweeps" / "some words"
    names = ["words=-yes-no-", "words=-nonesuch-", "words=-up-down-"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "points.json"])
    assert done.stderr.count("stage 1 prepare: done") == 2
    assert done.stderr.count("error: ") == 1 and "nonesuch" in done.stderr
    again = checkout.run(*options, cwd=tmp_path)
    assert again.stderr.count("stage 1 prepare: up to date") == 2
    assert gather(folder)[1:] == (3, 3)
    errors = [row["error"] for row in table(folder / "results.csv")]
    assert (errors[0], errors[2]) == ("not run", "not run") and "nonesuch" in errors[1]
    # A point can be run again by itself, in its own place.
    replay = subprocess.run(
        [str(folder / names[2] / "command.sh"), "--stop-stage", "1"],
        cwd=tmp_path,
        env=checkout.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert replay.returncode == 0 and replay.stderr.count("up to date") == 2, replay.stderr
    assert replay.stderr.splitlines()[0] == f"exp/iscas21_lstm/sweeps/some words/{names[2]}"
    assert load_yaml(folder / names[2] / "config.yaml")["tag"] == names[2]


def test_a_bad_point_is_an_error_before_anything_runs(checkout: Checkout, tmp_path: Path) -> None:
    path = write(tmp_path / "typo.yaml", "grid: {model.hiden: [8, 16]}")
    before = checkout.files()
    done = checkout.run("--sweep", str(path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "did you mean 'model.hidden'?" in done.stderr
    assert checkout.files() == before
