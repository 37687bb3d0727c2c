"""Sweeps: the points of a grid, runs that fail in between, and the table of results."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import ROOT, Checkout
from sweep_kit import finish, sweep_folder, toy_sweep

from kestrel.errors import KestrelError, UsageError
from kestrel.pipeline.config import Options, resolve
from kestrel.pipeline.gather import NUMBERS, PROVENANCE, gather
from kestrel.pipeline.plan import _plan_sweep, parse
from kestrel.pipeline.sweep import about, load_sweep
from kestrel.settings import load_yaml
from kestrel.store.atomic import read_json, write_json

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
    assert (points[4].set, points[4].grid) == (["train.epochs=2"], ["model.hidden=16"])
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
    assert points[0].grid == ["train.lr=[0.1, 0.2]", "model.quant_w=null", 'protocol.words=["yes", "no"]']


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
        ("grid: {seed: [1]}\nscore: {seed: [1]}", "score.seed: a setting of scoring"),
        ("grid: {seed: [1]}\nscore: {model.noise_eval: []}", "with at least one value"),
        ("grid: {seed: [1]}\nx: model.hidden", "x: model.hidden is none of the axes seed"),
        ("grid: {seed: [1]}\nlabels: {model.hidden: units}", "labels: model.hidden is none of the axes seed"),
        (
            "grid: {seed: [1]}\nreference: {source: s, lines: [{x: [1, 2], accuracy: [3]}]}",
            "reference: 2 values of x for 1 of accuracy",
        ),
        ("grid: {seed: [1]}\nreference: {source: s, lines: [{x: [1], accuracy: [300]}]}", "300.0 is out of bounds"),
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


def failed_log(exp: Path, text: str) -> None:
    (exp / "log").mkdir(parents=True)
    (exp / "log" / "pretrain.log").write_text(f"2024-01-01 00:00:00 ERROR error: first\n2024-01-02 00:00:00 {text}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the recipes, and no runs."""
    for name in ("recipes", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def finished(root: Path) -> Path:
    """A sweep of six points: two with a result, one that failed, one refused, one not run, one of other settings."""
    sweep = toy_sweep("sizes", {"model.hidden": [8, 16], "seed": [0, 1, 2]})
    points = sweep.points()
    points[2].error = "model.hidden: 99999 is out of bounds (1..4096)"
    folder = sweep_folder(root, sweep, points)
    finish(root, folder / "hidden=8,seed=0", 0, 0.5, 6.0)
    finish(root, folder / "hidden=16,seed=2", 2, 0.75, 12.0)
    failed_log(folder / "hidden=8,seed=1", "ERROR error: no space, left")
    finish(root, folder / "hidden=16,seed=0", 0, 0.9, 12.0)
    stale = folder / "hidden=16,seed=0" / "config.yaml"  # the settings of the point were changed since it was scored
    stale.write_text(stale.read_text().replace("hidden: 108", "hidden: 9"))
    return folder


def test_gather_keeps_failed_and_missing_points(root: Path, finished: Path) -> None:
    found = gather(root, finished)
    assert (found.table, found.points, found.failed) == (finished / "results.csv", 6, 4)
    rows = table(found.table)
    assert list(rows[0]) == ["point", "status", "model.hidden", "seed", *NUMBERS, *PROVENANCE, "error"]
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "not run", "not run", "ok"]
    first, last = rows[0], rows[5]
    assert (first["model.hidden"], first["seed"], first["accuracy"], first["protocol"]) == ("8", "0", "0.5", "toy-12")
    assert (last["ci95_low"], last["weight_bytes"], last["energy_uj"]) == ("0.74", "264528", "12.0")
    assert rows[1]["error"] == "no space, left" and rows[1]["accuracy"] == ""
    assert rows[2]["error"] == "model.hidden: 99999 is out of bounds (1..4096)"
    assert [rows[number]["error"] for number in (3, 4)] == ["not run"] * 2
    kept = read_json(finished / "sweep.json")
    assert [row["error"] for row in kept["points"]] == [row["error"] or None for row in rows]


def test_a_point_started_anew_has_no_result(root: Path, finished: Path) -> None:
    exp = finished / "hidden=8,seed=0"
    (exp / "pretrain" / ".done.json").unlink()
    write_json(exp / "pretrain" / ".started.json", {})
    failed_log(exp, "ERROR error: the loss is not finite")
    gather(root, finished)
    row = table(finished / "results.csv")[0]
    assert (row["status"], row["accuracy"], row["error"]) == ("failed", "", "the loss is not finite")


def test_the_summary_is_mean_and_deviation_over_seeds(root: Path) -> None:
    folder = sweep_folder(root, toy_sweep("sizes", {"model.hidden": [8, 16], "seed": [0, 1, 2]}))
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        finish(root, folder / f"hidden=8,seed={seed}", seed, accuracy, 6.0 + seed)
    finish(root, folder / "hidden=16,seed=0", 0, 0.8, None)
    gather(root, folder)
    first, second = table(folder / "summary.csv")
    assert (first["points"], first["ok"]) == ("3", "3") and (second["points"], second["ok"]) == ("3", "1")
    assert (first["accuracy_mean"], first["accuracy_sd"], first["energy_uj_mean"]) == ("0.6", "0.1", "7.0")
    assert (first["accuracy_min"], first["accuracy_max"]) == ("0.5", "0.7")
    assert (second["accuracy_mean"], second["accuracy_sd"], second["energy_uj_mean"]) == ("0.8", "", "")


def test_gathering_twice_gives_the_same_bytes(root: Path, finished: Path) -> None:
    found = gather(root, finished)
    names = ["results.csv", "summary.csv", "sweep.json", *(path.name for path in found.pictures)]
    assert {"accuracy.png", "energy.png", "energy_bars.png", "strips.png", "error.png"} <= set(names)
    before = [(finished / name).read_bytes() for name in names]
    gather(root, finished)
    assert [(finished / name).read_bytes() for name in names] == before


def test_sweeps_on_the_same_clips_share_a_picture_of_strips(root: Path, finished: Path) -> None:
    assert not (finished.parent / "ablation.png").exists()
    gather(root, finished)
    other = sweep_folder(root, toy_sweep("bits", {"model.quant_inp": [3, None], "seed": [0]}))
    for name in ("quant_inp=3,seed=0", "quant_inp=None,seed=0"):
        finish(root, other / name, 0, 0.6, 5.0)
    assert finished.parent / "ablation.png" in gather(root, other).pictures


def test_a_point_that_only_scores_tells_why_its_training_failed(root: Path) -> None:
    sweep = toy_sweep("noise", {"seed": [0]}, score={"model.noise_eval": [0.0, 0.1]})
    folder = sweep_folder(root, sweep)
    failed_log(folder / "seed=0", "ERROR error: the loss is not finite")
    failed_log(folder / "seed=0,noise_eval=0.0", "ERROR error: --checkpoint x does not exist")
    assert gather(root, folder).failed == 2
    assert [row["error"] for row in table(folder / "results.csv")] == ["the loss is not finite"] * 2


def test_gather_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(KestrelError, match=r"cannot read .*points\.json"):
        gather(tmp_path, tmp_path)


def test_the_gather_script_tells_by_its_exit_code(checkout: Checkout) -> None:
    folder = sweep_folder(checkout.root, toy_sweep("gathered", {"seed": [0, 1]}))

    def call() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "steps/gather.py", "exp/iscas21_lstm/sweeps/gathered"]
        environment = checkout.environment(PYTHONPATH=str(checkout.root))
        return subprocess.run(command, cwd=checkout.root, env=environment, capture_output=True, text=True, check=False)

    finish(checkout.root, folder / "seed=0", 0, 0.5, None)
    done = call()
    assert done.returncode == 1
    assert done.stdout.startswith("1 of 2 points have a result: exp/iscas21_lstm/sweeps/gathered/results.csv\n")
    assert done.stderr.count("\n") == 1 and "error: 1 of 2 points failed or were not run" in done.stderr
    finish(checkout.root, folder / "seed=1", 1, 0.5, None)
    assert call().returncode == 0
    (checkout.root / "config.yaml").unlink()


# ------------------------------------------------------------------------------------------------- the command line


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path / "a.yaml", GRID)).narrowed(
        {"seed": 1, "corpus": "x"}, ["train.epochs=9", "model.hidden=4"]
    )
    points = sweep.points()
    assert [point.name for point in points] == ["hidden=4,seed=1"]
    assert points[0].options == {"variant": "mini", "seed": 1} and points[0].set == []
    assert points[0].grid == ["model.hidden=4"]


def test_points_that_only_score_follow_their_training(tmp_path: Path) -> None:
    text = "grid: {seed: [0, 1]}\nscore: {model.noise_eval: [0.0, 0.2]}"
    sweep = load_sweep(write(tmp_path / "n.yaml", text))
    assert [(point.name, point.trained) for point in sweep.points()][:3] == [
        ("seed=0", None), ("seed=0,noise_eval=0.0", "seed=0"), ("seed=0,noise_eval=0.2", "seed=0"),
    ]  # fmt: skip
    assert sweep.x_axis == "model.noise_eval"


def test_a_checkpoint_is_scored_at_each_point_and_nothing_is_trained(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"weights")
    text = "options: {recipe: spartus, variant: delta}\ngrid:\n  seed: [0, 1]\nscore:\n  model.thh: [0.1, 0.2, 0.3]\n"
    (tmp_path / "s.yaml").write_text(text)
    arguments = ["--sweep", str(tmp_path / "s.yaml"), "--seed", "0", "--checkpoint", str(tmp_path / "best.pt")]
    swept = _plan_sweep(ROOT, arguments, parse(arguments), 0, tmp_path)
    assert [planned.run.config.tag for planned in swept.planned] == [f"seed=0,thh={value}" for value in (0.1, 0.2, 0.3)]
    for planned in swept.planned:
        assert planned.stages == ["score"]
        assert planned.run.config.checkpoint == str(tmp_path / "best.pt")
    assert "--checkpoint $CHECKPOINT" in swept.description["command"]
    (tmp_path / "s.yaml").write_text("grid:\n  seed: [0, 1]\n")
    with pytest.raises(UsageError, match="serves sweeps over score settings"):
        _plan_sweep(ROOT, arguments, parse(arguments), 0, tmp_path)


def test_a_sweep_of_a_recipe_belongs_to_it() -> None:
    for path in sorted((ROOT / "recipes").glob("*/sweeps/*.yaml")):
        sweep = load_sweep(path)
        assert sweep.options["recipe"] == path.parent.parent.name
        assert len(about(path)) > 40
        # three seeds, unless all points go on from one trained checkpoint
        assert sweep.axes.get("seed") == [0, 1, 2] or "retrain.start=" in path.read_text()
        for point in sweep.points():  # every point is a valid configuration, and published rows lie on its axis
            options = Options(**{**point.options, "corpus": "gsc_v2", "set": [*point.set, *point.grid]})
            assert resolve(ROOT, options, ROOT).seed == point.options.get("seed", 0)
        for line in sweep.reference.lines if sweep.reference else []:
            assert set(line.x) <= set(sweep.axes[sweep.x_axis]) and set(line.where) <= set(sweep.axes)


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
    assert done.stderr.count("error: ") == 2 and "nonesuch" in done.stderr
    again = checkout.run(*options, cwd=tmp_path)
    assert "2 of 3 runs of the sweep are up to date" in again.stderr
    assert names[0] not in again.stderr and again.returncode == 1
    found = gather(checkout.root, folder)
    assert (found.points, found.failed) == (3, 3)
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


def test_points_that_cannot_run_are_recorded_and_the_others_go_on(
    checkout: Checkout, tiny_corpus: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "bits.yaml", "grid: {model.quant_inp: [3, 99], seed: [0]}\nstop_stage: 0\n")
    options = ["--sweep", str(path), "--corpus", str(tiny_corpus), "--variant", "mini", "--tag", "some-bits"]
    dry = checkout.run(*options, "--dry-run")
    assert dry.returncode == 0 and "cannot run: model.quant_inp: 99 is out of bounds (2..16)" in dry.stdout
    for jobs in ("1", "2"):
        done = checkout.run(*options, "--jobs", jobs)
        assert done.returncode == 1 and "points of the sweep failed (1 could not start)" in done.stderr
        assert "point quant_inp=99,seed=0 cannot run: model.quant_inp: 99 is out of bounds (2..16)" in done.stderr
    assert "1 of 1 runs of the sweep are up to date" in done.stderr
    folder = checkout.root / "exp" / "iscas21_lstm" / "sweeps" / "some-bits"
    assert (folder / "quant_inp=3,seed=0" / "config.yaml").exists()
    content = read_json(folder / "points.json")
    assert content["points"][0]["error"] is None and "99" in content["points"][1]["error"]
    assert content["command"] == "./run.sh --sweep $SWEEP --variant mini --corpus $CORPUS --tag some-bits"
