"""What each stage would do, from hand-made results: run, skip, resume, extend, refuse, or wait for an earlier stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kestrel.errors import KestrelError, UsageError
from kestrel.pipeline.config import Options, resolve
from kestrel.pipeline.stages import (
    SPLITS,
    STAGES,
    Run,
    begin,
    done_file,
    finish,
    listing_id,
    outdated_inputs,
    result_id,
    started_file,
    status,
)
from kestrel.store.atomic import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
NAMES = [stage.name for stage in STAGES]
OUTPUTS = {
    "download": ["roots.json"],
    "prepare": ["train.csv", "validation.csv", "test.csv", "protocol.json", "rejected.csv"],
    "feature": ["train.h5", "validation.h5", "test.h5"],
    "pretrain": ["best.pt", "metrics.csv", "last.pt"],
    "retrain": ["best.pt", "metrics.csv", "last.pt"],
    "score": ["result.json"],
    "export": ["card.md"],
}
Open = Callable[..., Run]


@pytest.fixture
def open_run(tmp_path: Path) -> Open:
    """open_run(*sets, **options): a run in a root of its own."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("conf", "recipes"):
        (root / name).symlink_to(ROOT / name)

    def make(*sets: str, force: bool = False, **options: Any) -> Run:
        config = resolve(root, Options(set=list(sets), **{"tag": "t", **options}), root)
        return Run(root, root / "exp" / config.recipe / config.tag, config, 1, force)

    return make


def write(run: Run, stage: str, content: str = "") -> None:
    """Write what a stage leaves; `content` makes it another result."""
    for name in OUTPUTS[stage]:
        path = run.out(stage) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{stage} {name} {content}")
    if stage == "feature":
        for name in (*SPLITS, "noise"):
            run.packs.mkdir(parents=True, exist_ok=True)
            (run.packs / f"{name}.h5").touch()
        write_json(done_file(run.packs), {"inputs": {}})


def do(run: Run, *stages: str, content: str = "") -> None:
    """Go through stages as the step scripts do."""
    for stage in stages or NAMES:
        state = status(run, stage)
        assert state.action in ("run", "resume", "extend"), f"{stage}: {state.action}, {state.reason}"
        begin(run, stage, state)
        write(run, stage, content)
        finish(run, stage, state, OUTPUTS[stage], 1.0, ("last.pt",))


def start(run: Run, stage: str) -> None:
    """A stage that was killed in the middle."""
    begin(run, stage, status(run, stage))
    (run.out(stage) / "best.pt").write_text("half trained")


def actions(run: Run) -> dict[str, str]:
    return {stage: status(run, stage).action for stage in NAMES}


def to_do(run: Run) -> list[str]:
    """Stages that a dry run would run."""
    expected: set[str] = set()
    for stage in NAMES:
        if status(run, stage, frozenset(expected)).action in ("run", "resume", "extend"):
            expected.add(stage)
    return [stage for stage in NAMES if stage in expected]


# -------------------------------------------------------------------------------------------------------- first runs


def test_a_fresh_run(open_run: Open) -> None:
    run = open_run()
    assert status(run, "download").action == "run"
    for stage, before in (("prepare", "0 download"), ("feature", "1 prepare"), ("pretrain", "2 feature")):
        state = status(run, stage)
        assert state.action == "blocked"
        assert f"stage {NAMES.index(stage)} needs the result of stage {before}" in state.reason
        assert f"run ./run.sh with --stage {before[0]}" in state.reason
    assert to_do(run) == NAMES
    assert status(run, "feature", frozenset({"download", "prepare"})).reason == "after stage 1 prepare"


def test_each_stage_names_the_one_it_waits_for(open_run: Open) -> None:
    run = open_run()
    do(run, "download", "prepare", "feature")
    assert "stage 4 needs the result of stage 3 pretrain: run" in status(run, "retrain").reason
    assert "stage 5 needs the result of stage 3 pretrain: run" in status(run, "score").reason
    start(run, "pretrain")
    assert "stage 3 pretrain (it was started and is not finished)" in status(run, "retrain").reason


def test_everything_done_is_skipped(open_run: Open) -> None:
    do(open_run())
    assert set(actions(open_run()).values()) == {"skip"}
    assert to_do(open_run()) == []


def test_score_takes_the_retrained_or_the_pretrained_network(open_run: Open) -> None:
    run = open_run()
    do(run, "download", "prepare", "feature", "pretrain", "score")
    assert run.checkpoint() == ("pretrain", run.exp / "pretrain" / "best.pt")
    assert status(run, "score").action == "skip"
    assert status(run, "score", frozenset({"retrain"})).action == "run", "a dry run knows that it will be retrained"
    start(run, "retrain")
    assert run.checkpoint()[0] == "retrain"
    assert "stage 4 retrain (it was started and is not finished)" in status(run, "score").reason
    do(run, "retrain")
    assert status(run, "score").reason == "its input changed (retrain)"


def test_a_recipe_without_retraining(open_run: Open) -> None:
    run = open_run("retrain=null")
    do(run, "download", "prepare", "feature", "pretrain")
    state = status(run, "retrain")
    assert (state.action, state.reason) == ("absent", "recipe iscas21_lstm has no such stage")
    assert run.checkpoint()[0] == "pretrain"
    do(run, "score", "export")


# --------------------------------------------------------------------------------------------------- changed settings


@pytest.mark.parametrize(
    ("setting", "again"),
    [
        ("train.workers=3", []),
        ("train.threads=1", []),
        ("train.device=cpu", []),
        ("train.save_minutes=1", []),
        ("train.eval_batch_size=7", ["score", "export"]),
        ("export.weight_bits=4", ["score", "export"]),
        ("score.chip=1", ["score", "export"]),
        ("score.split=validation", ["score", "export"]),
        ("retrain.lr=0.5", ["retrain", "score", "export"]),
        ("retrain.epochs=1", ["retrain", "score", "export"]),
        ("train.lr=0.5", ["pretrain", "retrain", "score", "export"]),
        ("train.batch_size=7", ["pretrain", "retrain", "score", "export"]),
        ("train.epochs=1", ["pretrain", "retrain", "score", "export"]),
        ("train.label_smoothing=0.1", ["pretrain", "retrain", "score", "export"]),
        ("model.hidden=7", ["pretrain", "retrain", "score", "export"]),
        ("augment.noise_volume=0.5", ["pretrain", "retrain", "score", "export"]),
        ("feature.post=[{normalise: channel}]", ["pretrain", "retrain", "score", "export"]),
        ("frontend.coefficients=20", ["feature", "pretrain", "retrain", "score", "export"]),
        ("protocol.silence_percentage=20", NAMES[1:]),
        ("corpus.speakers=7", NAMES),
    ],
)
def test_a_changed_setting_reruns_just_what_depends_on_it(open_run: Open, setting: str, again: list[str]) -> None:
    do(open_run())
    assert to_do(open_run(setting)) == again
    assert to_do(open_run()) == [], "asking changes nothing"


def test_the_reason_names_the_setting_and_both_values(open_run: Open) -> None:
    do(open_run())
    state = status(open_run("model.hidden=7"), "pretrain")
    assert (state.action, state.reason) == ("run", "settings changed: model.hidden 108 -> 7")


def test_rules_changed_under_the_same_name(open_run: Open) -> None:
    do(open_run("protocol.name=own"))
    changed = open_run("protocol.name=own", "protocol.words=yes,no")
    assert to_do(changed) == NAMES[1:]
    assert status(changed, "prepare").reason.startswith("settings changed: ")


def test_a_new_result_reruns_what_follows_and_an_equal_one_does_not(open_run: Open) -> None:
    run = open_run()
    do(run)
    do(open_run(force=True), "pretrain", content="other")
    assert status(run, "retrain").reason == "its input changed (pretrain)"
    assert to_do(run) == ["retrain", "score", "export"]
    do(open_run(force=True), "pretrain")
    assert to_do(run) == []


def test_volatile_outputs_do_not_count(open_run: Open) -> None:
    run = open_run()
    do(run)
    before = result_id(run.out("pretrain"))
    state = status(run, "pretrain")
    (run.out("pretrain") / "last.pt").write_text("saved at another time")
    finish(run, "pretrain", state, OUTPUTS["pretrain"], 2.0, ("last.pt",))
    assert result_id(run.out("pretrain")) == before


def test_lost_and_changed_outputs_are_made_again(open_run: Open) -> None:
    run = open_run()
    do(run)
    (run.out("pretrain") / "best.pt").unlink()
    assert (status(run, "pretrain").action, status(run, "pretrain").reason) == ("run", "best.pt is missing")
    (run.out("score") / "result.json").write_text("edited by hand")
    assert status(run, "score").reason == "result.json was changed"
    (run.packs / "noise.h5").unlink()
    assert (status(run, "feature").action, status(run, "feature").reason) == (
        "run",
        "packed audio is missing (noise.h5)",
    )


def test_a_damaged_marker_is_named(open_run: Open) -> None:
    run = open_run()
    do(run)
    done_file(run.out("retrain")).write_text("{")
    with pytest.raises(KestrelError, match=r"retrain/\.done\.json is damaged .*; remove it and run its stage again"):
        status(run, "retrain")


def test_force_runs_whatever_is_there(open_run: Open) -> None:
    do(open_run())
    assert set(actions(open_run(force=True)).values()) == {"run"}
    empty = open_run(force=True, tag="empty", feat_dir=None, variant="base", corpus="gsc_v1")
    assert status(empty, "prepare").action == "blocked", "not without its input"


# -------------------------------------------------------------------------------------------------------- training


def test_an_unfinished_stage_continues(open_run: Open) -> None:
    run = open_run()
    do(run, "download", "prepare", "feature")
    start(run, "pretrain")
    state = status(run, "pretrain")
    assert (state.action, state.reason) == ("resume", "continues where it stopped")
    assert status(open_run("train.workers=2", "train.device=cpu"), "pretrain").action == "resume"
    begin(run, "pretrain", state)
    assert (run.out("pretrain") / "best.pt").read_text() == "half trained"
    do(run, "pretrain")
    assert not started_file(run.out("pretrain")).exists()
    assert status(run, "pretrain").action == "skip"


def test_an_unfinished_stage_with_other_settings_is_refused(open_run: Open) -> None:
    run = open_run()
    do(run, "download", "prepare", "feature")
    start(run, "pretrain")
    changed = status(open_run("model.hidden=7"), "pretrain")
    assert changed.action == "refused"
    assert "model.hidden 108 -> 7" in changed.reason and "--force" in changed.reason
    do(open_run(force=True), "feature", content="other")
    assert "its input changed" in status(run, "pretrain").reason
    forced = open_run("model.hidden=7", force=True)
    state = status(forced, "pretrain")
    begin(forced, "pretrain", state)
    assert sorted(path.name for path in forced.out("pretrain").iterdir()) == [".started.json"]
    assert not (run.exp / "pretrain.prev").exists(), "an unfinished folder is not kept"


@pytest.mark.parametrize(
    ("sets", "length", "action"),
    [
        (["train.lr=0.1"], "train.epochs=30", "extend"),
        (["train.lr=0.1"], "train.epochs=10", "run"),
        (["train.lr=0.1,0.2"], "train.epochs=30", "run"),
        (["train.lr=0.1,0.2", "train.lr_steps=50"], "train.epochs=30", "extend"),
        (["train.lr=0.1", "train.schedule=cosine"], "train.epochs=30", "run"),
        (["train.lr=0.1"], "train.steps=100000", "run"),
    ],
)
def test_more_epochs_continue_where_the_schedule_allows(
    open_run: Open, sets: list[str], length: str, action: str
) -> None:
    do(open_run(*sets, "train.epochs=20"))
    state = status(open_run(*sets, length), "pretrain")
    assert state.action == action
    if action == "extend":
        assert state.reason == "longer: train.epochs 20 -> 30"
        run = open_run(*sets, length)
        begin(run, "pretrain", state)
        assert (run.out("pretrain") / "best.pt").exists() and started_file(run.out("pretrain")).exists()
        assert not done_file(run.out("pretrain")).exists()
        assert status(run, "pretrain").action == "resume", "killed while it went on"
    elif length == "train.epochs=30":
        assert "schedule depends on the length" in state.reason


def test_an_unfinished_stage_continues_with_another_length(open_run: Open) -> None:
    run = open_run("train.lr=0.1", "train.epochs=20")
    do(run, "download", "prepare", "feature")
    start(run, "pretrain")
    state = status(open_run("train.lr=0.1", "train.epochs=5"), "pretrain")
    assert (state.action, state.reason) == ("resume", "continues with another length: train.epochs 20 -> 5")
    refused = status(open_run("train.lr=0.1", "train.epochs=5", "train.batch_size=3"), "pretrain")
    assert refused.action == "refused"


# ----------------------------------------------------------------------------------------------------------- folders


def test_a_finished_folder_is_kept_once(open_run: Open) -> None:
    do(open_run(), content="first")
    do(open_run("model.hidden=7"), "pretrain", "retrain", "score", "export", content="second")
    run = open_run("model.hidden=8")
    for stage in ("pretrain", "retrain", "score", "export"):
        name = OUTPUTS[stage][0]
        assert (run.exp / f"{stage}.prev" / name).read_text().endswith("first")
        assert (run.exp / stage / name).read_text().endswith("second")
    do(run, "pretrain", content="third")
    assert (run.exp / "pretrain.prev" / "best.pt").read_text().endswith("second")
    assert not (run.exp / "pretrain.prev.prev").exists()


def test_a_killed_rerun_leaves_the_previous_result(open_run: Open) -> None:
    do(open_run(), content="first")
    changed = open_run("model.hidden=7")
    start(changed, "pretrain")
    assert (changed.exp / "pretrain.prev" / "best.pt").read_text().endswith("first")
    assert status(changed, "pretrain").action == "resume"
    assert status(open_run(), "pretrain").action == "refused"


def test_the_marker_holds_hashes_and_settings(open_run: Open) -> None:
    run = open_run()
    do(run, "download", "prepare")
    marker = read_json(done_file(run.manifests))
    assert set(marker) == {"stage", "id", "settings", "inputs", "outputs", "seconds"}
    assert marker["inputs"] == {"download": result_id(run.raw)}
    assert marker["outputs"]["train.csv"]["bytes"] == (run.manifests / "train.csv").stat().st_size
    assert json.dumps(marker["settings"])
    with pytest.raises(KestrelError, match="wrote nothing"):
        finish(run, "feature", status(run, "feature"), [], 1.0)


# ------------------------------------------------------------------------------------------------------ outside inputs


def test_a_changed_corpus_folder_is_noticed(open_run: Open, tmp_path: Path) -> None:
    words = tmp_path / "words"
    for name in ("yes/a.wav", "no/b.wav"):
        (words / name).parent.mkdir(parents=True, exist_ok=True)
        (words / name).write_text(name)
    run = open_run(corpus=str(words), variant="mini")
    do(run)
    assert to_do(run) == []
    (words / "yes" / "c.wav").write_text("new")
    assert status(run, "download").reason == "its input changed (dir)"
    do(run, "download")
    assert to_do(run) == NAMES[1:]
    for path in words.rglob("*.wav"):
        path.unlink()
    for path in [*words.iterdir(), words]:
        path.rmdir()
    assert status(run, "download").reason == f"corpus.dir does not exist: {words}"


def test_a_listing_sees_names_sizes_and_times(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    os.utime(tmp_path / "a" / "x", (1000, 1000))
    first = listing_id(tmp_path)
    assert listing_id(tmp_path) == first
    os.utime(tmp_path / "a" / "x", (1001, 1001))
    second = listing_id(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({first, second, listing_id(tmp_path)}) == 3


def test_a_listing_stands_odd_folders(tmp_path: Path) -> None:
    """Links to nothing (as git-annex makes them) and links in a circle."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lost.wav").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name} outside"
    outside.mkdir()
    (outside / "x.wav").write_text("1")
    (tmp_path / "linked").symlink_to(outside)
    before = listing_id(tmp_path)
    assert listing_id(tmp_path) == before
    (outside / "y.wav").write_text("1")
    assert listing_id(tmp_path) != before
    with pytest.raises(KestrelError, match="cannot list .*: No such file"):
        listing_id(tmp_path / "nowhere")


def test_given_feature_files(open_run: Open, tmp_path: Path) -> None:
    import h5py

    folder = tmp_path / "feats"
    folder.mkdir()
    for split in SPLITS:
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file.attrs.update({"format": "kestrel-features-1", "classes": '["yes", "no"]'})
    run = open_run(feat_dir=str(folder), variant="mini")
    for stage in NAMES[:3]:
        state = status(run, stage)
        assert state.action == "absent" and str(folder) in state.reason
    assert not run.exp.exists(), "asking leaves nothing"
    do(run, *NAMES[3:])
    assert to_do(run) == []
    with h5py.File(folder / "test.h5", "a") as file:
        file["more"] = 1
    assert to_do(run) == ["score", "export"], "training does not read the test split"
    (folder / "validation.h5").unlink()
    assert status(run, "pretrain").reason == f"{folder} has no validation.h5"


def test_a_checkpoint_of_the_users_own(open_run: Open, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_text("weights")
    run = open_run(checkpoint=str(path))
    do(run, "download", "prepare", "feature", "score")
    assert run.checkpoint() == ("checkpoint", path)
    assert status(run, "score").action == "skip"
    path.write_text("other weights")
    assert status(run, "score").reason == "its input changed (checkpoint)"
    path.unlink()
    assert status(run, "score").reason == f"--checkpoint {path} does not exist"


# -------------------------------------------------------------------------------------------------------- stale inputs


def test_a_stage_alone_says_that_what_it_takes_is_out_of_date(open_run: Open) -> None:
    do(open_run())
    assert outdated_inputs(open_run(), "export") == []
    lines = outdated_inputs(open_run("train.lr=0.5"), "score")
    assert len(lines) == 1
    assert lines[0].startswith("taking stage 3 pretrain as it is, but settings changed: train.lr ")
    assert "--stage 3" in lines[0]
    assert outdated_inputs(open_run("score.chip=2", force=True), "score") == []


def test_retraining_may_start_elsewhere(open_run: Open, tmp_path: Path) -> None:
    """Stage 3 falls away, and the content of the checkpoint decides whether stage 4 is up to date, not its place."""
    here, there = tmp_path / "here.pt", tmp_path / "there.pt"
    here.write_bytes(b"weights")
    run = open_run(f"retrain.start={here}", recipe="spartus")
    do(run, "download", "prepare", "feature")
    assert (actions(run)["pretrain"], actions(run)["retrain"]) == ("absent", "run")
    do(run, "retrain")
    assert actions(run)["retrain"] == "skip"
    there.write_bytes(b"weights")
    moved = open_run(f"retrain.start={there}", recipe="spartus")
    assert actions(moved)["retrain"] == "skip"
    there.write_bytes(b"others")
    assert actions(moved)["retrain"] == "run"
    there.unlink()
    assert "retrain.start does not exist" in status(moved, "retrain").reason
    with pytest.raises(UsageError, match=r"retrain\.start: .* no such file"):
        open_run(f"retrain.start={there}", recipe="spartus")
