"""The command line: options, help, dry runs, errors, replay, and runs that meet each other or are killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from run_kit import Checkout

from kestrel.errors import UsageError
from kestrel.pipeline.plan import _parser, parse, uncommitted
from kestrel.pipeline.stages import STAGES
from kestrel.settings import load_yaml
from kestrel.store.lock import lock

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = (
    "--recipe --corpus --protocol --variant --tag --seed --stage --stop-stage --set --feat-dir --sweep --checkpoint "
    "--pretrained --backend --nproc --force --dry-run --jobs --keep --keep-pretrained --profile --help"
).split()


def exp(checkout: Checkout, tag: str) -> Path:
    return checkout.root / "exp" / "iscas21_lstm" / tag


@pytest.fixture(scope="module")
def prepared(checkout: Checkout, tiny_corpus: Path) -> str:
    """The tag of a run on the tiny corpus whose stages 0 and 1 are done."""
    done = checkout.run("--corpus", str(tiny_corpus), "--variant", "mini", "--tag", "prepared", "--stop-stage", "1")
    assert done.returncode == 0, done.stderr
    return "prepared"


# ------------------------------------------------------------------------------------------------------------ options


def test_options_are_those_of_the_design() -> None:
    assert {option for action in _parser()._actions for option in action.option_strings} == {*OPTIONS, "-h"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stagee", "3"], "unknown option '--stagee'; did you mean '--stage'?"),
        (["--stop_stage", "3"], "did you mean '--stop-stage'?"),
        (["--stag", "3"], "unknown option '--stag'"),
        (["-x"], "unknown option '-x'"),
        (["--recipee=x"], "unknown option '--recipee'; did you mean '--recipe'?"),
        (["stage", "3"], "unexpected argument 'stage'; did you mean --stage?"),
        (["7"], "unexpected argument '7'"),
        (["--stage"], "--stage: expected one argument"),
        (["--stage", "x"], "invalid int value: 'x'"),
        (["--stage", "7"], "--stage 7: stages are 0..6"),
        (["--stop-stage", "-1"], "--stop-stage -1: stages are 0..6"),
        (["--nproc", "0"], "--nproc 0: at least 1"),
        (["--backend", "slrum"], "unknown backend 'slrum'; did you mean 'slurm'?"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert message in str(caught.value)


def test_values_may_look_like_options_after_an_equals_sign() -> None:
    values = parse(["--set=a.b=--x", "--set", "c.d=-1", "--seed", "3"])
    assert (values.set, values.seed) == (["a.b=--x", "c.d=-1"], 3)


def test_help_lists_options_stages_and_current_values(checkout: Checkout) -> None:
    page = checkout.run("--help")
    assert page.returncode == 0 and page.stderr == ""
    for stage in STAGES:
        assert f"  {stage.number}  {stage.name:<10} {stage.does}" in page.stdout
    for option in OPTIONS:
        assert re.search(rf"^  (-h, )?{option}\b", page.stdout, re.MULTILINE), option
    for shown in (
        "[iscas21_lstm]",
        "[mini]",
        "[local]",
        "variant mini; current value",
        "  model.hidden=108  units of each block",
    ):
        assert shown in page.stdout
    for name in ("gsc_v2", "gsc_v2-35-list", "logmel"):
        assert name in page.stdout
    other = checkout.run("-h", "--variant", "base", "--set", "model.hidden=33", "--seed", "5")
    for shown in ("model.hidden=33", "train.steps=20200", "[5]", "variant base"):
        assert shown in other.stdout


def test_the_help_of_every_setting_has_a_text(checkout: Checkout) -> None:
    rows = [line for line in checkout.run("--help").stdout.splitlines() if re.match(r"  \w+\.\w+=", line)]
    assert len(rows) > 60
    assert [row for row in rows if not re.fullmatch(r"  \S+=.*  \S.* \[.+\]", row)] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stagee", "3"], "did you mean '--stage'?"),
        (["--set", "model.hiden=3"], "did you mean 'model.hidden'?"),
        (["--corpus", "gsc_v3"], "unknown corpus 'gsc_v3'"),
        (["--stage", "4", "--stop-stage", "2"], "--stop-stage 2 comes before --stage 4"),
        (["--sweep", "none.yaml"], "cannot read "),
        (["--feat-dir", "none"], "train.h5 does not exist"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(checkout: Checkout, arguments: list[str], message: str) -> None:
    before = checkout.files()
    done = checkout.run(*arguments)
    assert done.returncode == (1 if arguments[0] == "--feat-dir" else 2)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("  error: ") and message in lines[0]
    assert checkout.files() == before


# ---------------------------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_says_what_and_why_and_leaves_nothing(checkout: Checkout, prepared: str, tiny_corpus: Path) -> None:
    before = checkout.files()
    options = ["--corpus", str(tiny_corpus), "--variant", "mini", "--tag", prepared]
    done = checkout.run(*options, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"exp/iscas21_lstm/{prepared}:",
        "  stage 0 download  skip: up to date",
        "  stage 1 prepare   skip: up to date",
        "  stage 2 feature   run: not yet run",
        "  stage 3 pretrain  run: after stage 2 feature",
        "  stage 4 retrain   run: after stage 2 feature",
        "  stage 5 score     run: after stage 4 retrain",
        "  stage 6 export    run: after stage 4 retrain",
    ]
    alone = checkout.run(*options, "--stage", "3", "--dry-run").stdout.splitlines()
    assert alone[1:] == [
        "  stage 3 pretrain  stop: stage 3 needs the result of stage 2 feature: run ./run.sh with --stage 2"
    ]
    forced = checkout.run(*options, "--stop-stage", "0", "--force", "--dry-run").stdout.splitlines()
    assert forced[1:] == ["  stage 0 download  run: --force"]
    fresh = checkout.run("--tag", "never", "--dry-run")
    assert "stage 0 download  run: not yet run" in fresh.stdout
    assert checkout.files() == before


def test_a_second_start_is_fast(checkout: Checkout) -> None:
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        assert checkout.run("--dry-run").returncode == 0
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 2


# ------------------------------------------------------------------------------------------------------------ real runs


def test_kept_results_are_no_uncommitted_changes(tmp_path: Path) -> None:
    assert uncommitted(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert uncommitted(tmp_path) is False
    for name in ("RESULTS.md", "results/a.json", "results/sweeps/b.png"):
        path = tmp_path / "recipes" / "spartus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("kept")
    assert uncommitted(tmp_path) is False
    (tmp_path / "recipes" / "spartus" / "recipe.yaml").write_text("changed")
    assert uncommitted(tmp_path) is True


def test_a_run_leaves_what_the_design_says(checkout: Checkout, prepared: str, tiny_corpus: Path) -> None:
    folder = exp(checkout, prepared)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "command.sh", "env.json", "log"}
    assert {path.name for path in (folder / "log").iterdir()} == {"download.log", "prepare.log"}
    config = load_yaml(folder / "config.yaml")
    assert (config["recipe"], config["variant"], config["tag"]) == ("iscas21_lstm", "mini", prepared)
    assert config["corpus"]["dir"] == str(tiny_corpus)
    environment = json.loads((folder / "env.json").read_text())
    assert environment["command"].startswith("./run.sh --recipe iscas21_lstm --corpus $CORPUS --variant mini --seed 0")
    assert str(tiny_corpus) not in (folder / "env.json").read_text(), "paths outside the repository stay out"
    assert set(environment) >= {"git_commit", "git_dirty", "python", "platform", "host", "versions"}
    data = checkout.root / "data" / "tiny_corpus"
    assert {path.name for path in (data / "tiny_corpus-12").iterdir()} == {
        *(".done.json", "protocol.json", "rejected.csv", "train.csv", "validation.csv", "test.csv"),
    }
    assert not any(path.name.startswith((".tmp-", ".lock")) for path in checkout.root.rglob("*"))


def test_a_second_run_is_up_to_date(checkout: Checkout, prepared: str, tiny_corpus: Path) -> None:
    done = checkout.run("--corpus", str(tiny_corpus), "--variant", "mini", "--tag", prepared, "--stop-stage", "1")
    assert done.returncode == 0
    assert "stage 0 download: up to date" in done.stderr and "stage 1 prepare: up to date" in done.stderr
    assert "accuracy" not in done.stdout and "time        download" in done.stdout


def test_a_run_from_another_folder_with_relative_paths(checkout: Checkout, tiny_corpus: Path) -> None:
    relative = os.path.relpath(checkout.root / "run.sh", tiny_corpus.parent)
    done = subprocess.run(
        [relative, "--corpus", tiny_corpus.name, "--variant", "mini", "--tag", "elsewhere", "--stop-stage", "0"],
        cwd=tiny_corpus.parent,
        env=checkout.environment(CDPATH=str(checkout.root.parent)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert load_yaml(exp(checkout, "elsewhere") / "config.yaml")["corpus"]["dir"] == str(tiny_corpus)
    roots = json.loads((checkout.root / "data" / "tiny_corpus" / "raw" / "roots.json").read_text())
    assert roots == {"main": str(tiny_corpus), "test": None}


def test_command_sh_replays_the_run(checkout: Checkout, tiny_corpus: Path, tmp_path: Path) -> None:
    options = ["--corpus", tiny_corpus.name, "--variant", "mini", "--tag", "replay", "--seed", "7"]
    sets = ["model.hidden=9", "feature.post=[{normalise: channel}]", f"corpus.test_dir={tiny_corpus.name}/"]
    for text in sets:
        options += ["--set", text]
    first = checkout.run(*options, "--stop-stage", "0", cwd=tiny_corpus.parent)
    assert first.returncode == 0, first.stderr
    folder = exp(checkout, "replay")
    before = (folder / "config.yaml").read_text()
    script = folder / "command.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    again = subprocess.run(
        [str(script), "--dry-run"],
        cwd=tmp_path,
        env=checkout.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[:2] == ["exp/iscas21_lstm/replay:", "  stage 0 download  skip: up to date"]
    real = subprocess.run(
        [str(script), "--stop-stage", "0"],
        cwd=tmp_path,
        env=checkout.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert real.returncode == 0 and "stage 0 download: up to date" in real.stderr
    assert (folder / "config.yaml").read_text() == before
    environment = json.loads((folder / "env.json").read_text())
    words = environment["command"].split()
    assert "corpus.test_dir=$TEST" in words and "$CORPUS" in words
    assert shlex.split(environment["command"])[-4:-2] == ["--set", "feature.post=[{normalise: channel}]"]


def test_exp_may_be_a_link_to_another_disk(own_checkout: Checkout, tiny_corpus: Path, tmp_path: Path) -> None:
    for name in ("exp", "data"):
        (own_checkout.root / name).rmdir()
        (tmp_path / f"large disk {name}").mkdir()
        (own_checkout.root / name).symlink_to(tmp_path / f"large disk {name}")
    options = ["--corpus", str(tiny_corpus), "--variant", "mini", "--tag", "linked", "--nproc", "1"]
    done = own_checkout.run(*options, "--stop-stage", "1", "--profile")
    assert done.returncode == 0, done.stderr
    assert "exp/iscas21_lstm/linked/log/" in done.stdout
    assert (tmp_path / "large disk exp" / "iscas21_lstm" / "linked" / "log" / "prepare.profile.txt").exists()
    replay = own_checkout.root / "exp" / "iscas21_lstm" / "linked" / "command.sh"
    again = subprocess.run(
        [str(replay), "--stop-stage", "1"], env=own_checkout.environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and "stage 1 prepare: up to date" in again.stderr


def test_a_stage_without_its_input_names_the_stage_to_run(checkout: Checkout, tiny_corpus: Path) -> None:
    done = checkout.run("--corpus", str(tiny_corpus), "--protocol", "mini-12", "--stage", "1")
    assert done.returncode == 2 and "protocol mini-12 belongs to corpus mini" in done.stderr
    done = checkout.run("--variant", "base", "--corpus", "gsc_v1", "--stage", "3", "--tag", "early")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "exp/iscas21_lstm/early",
        "  error: stage 3 needs the result of stage 2 feature: run ./run.sh with --stage 2",
    ]


def test_a_corpus_that_is_none(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = checkout.run("--corpus", str(tmp_path / "empty"), "--tag", "empty")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3 and "is not in GSC layout" in done.stderr
    assert not (checkout.root / "data" / "empty" / "raw" / ".done.json").exists()


# --------------------------------------------------------------------------------------------- meeting and being killed


def read_until(stream: IO[str], text: str) -> str:
    """Lines of a process until one has `text`."""
    seen = ""
    for line in stream:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def start(checkout: Checkout, *arguments: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        checkout.command(*arguments),
        cwd=checkout.root,
        env=checkout.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # the summary
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    guard = threading.Timer(60, child.kill)
    guard.daemon = True
    guard.start()
    return child


Waiting = tuple[Checkout, list[str], "subprocess.Popen[str]"]


@pytest.fixture
def waiting(own_checkout: Checkout, tiny_corpus: Path) -> Iterator[Waiting]:
    """A run that stands still in stage 0, since another process holds the lock of its data folder."""
    options = ["--corpus", str(tiny_corpus), "--variant", "mini", "--tag", "waits", "--stop-stage", "0"]
    data = own_checkout.root / "data" / "tiny_corpus"
    with lock(data, "somebody else", wait=False):
        child = start(own_checkout, *options)
        assert child.stderr is not None
        seen = read_until(child.stderr, "waiting for")
        assert f"waiting for somebody else (process {os.getpid()} on" in seen and "data/tiny_corpus" in seen
        yield own_checkout, options, child
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(30)
        child.stderr.close()


def test_the_same_command_while_one_runs_names_the_holder(waiting: Waiting) -> None:
    checkout, options, _ = waiting
    second = checkout.run(*options)
    assert second.returncode == 1
    assert len(second.stderr.splitlines()) == 1
    assert "waits is in use by stage 0 download of iscas21_lstm/waits (process " in second.stderr
    assert checkout.run(*options, "--dry-run").returncode == 0, "looking is allowed"


def test_a_run_goes_on_when_the_shared_folder_is_free(waiting: Waiting) -> None:
    checkout, _, child = waiting
    (checkout.root / "data" / "tiny_corpus" / ".lock").unlink()
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 0, rest
    assert "stage 0 download: done" in rest


def test_kill_reaches_the_stage_and_frees_its_locks(waiting: Waiting) -> None:
    """`kill PID` of run.sh alone ends the stage too, not only the shell around it."""
    checkout, _, child = waiting
    os.kill(child.pid, signal.SIGTERM)
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert rest.strip() == "stopped by SIGTERM"
    assert not (exp(checkout, "waits") / ".lock").exists()


def test_ctrl_c_ends_the_run_in_one_line(waiting: Waiting) -> None:
    checkout, _, child = waiting
    os.killpg(child.pid, signal.SIGINT)  # as the terminal does
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 130
    assert rest.strip() == "interrupted"
    assert not (exp(checkout, "waits") / ".lock").exists()


def test_a_killed_run_does_not_block_the_next(waiting: Waiting) -> None:
    checkout, options, child = waiting
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert (exp(checkout, "waits") / ".lock").exists()
    (checkout.root / "data" / "tiny_corpus" / ".lock").unlink()
    done = checkout.run(*options)
    assert done.returncode == 0, done.stderr
    assert "stage 0 download: done" in done.stderr


def test_a_changed_configuration_between_runs(own_checkout: Checkout, tiny_corpus: Path) -> None:
    """What a run leaves in the folder of another with the same tag is noticed, stage by stage."""
    options = ["--corpus", str(tiny_corpus), "--variant", "mini", "--tag", "one", "--stop-stage", "1", "--nproc", "1"]
    assert own_checkout.run(*options).returncode == 0
    changed = own_checkout.run(*options, "--set", "protocol.words=yes,no")
    assert changed.returncode == 0
    assert "stage 0 download: up to date" in changed.stderr and "stage 1 prepare: done" in changed.stderr
    assert own_checkout.run(*options).stderr.count("up to date") == 2, "both protocols are kept"
    named = [*options, "--set", "protocol.name=tiny_corpus-12", "--set", "protocol.words=yes,no"]
    third = own_checkout.run(*named)
    assert "(settings changed: protocol.words " in third.stderr


# A stage that stands in for training: on a signal it saves its state and asks to be run again.
STANDING = """
import sys, time
from kestrel.errors import RunAgain
from kestrel.pipeline.step import main
from kestrel.train.signals import StopFlag

def work(run, status):
    with StopFlag() as stop:
        print("standing", file=sys.stderr, flush=True)
        while not stop:
            time.sleep(0.02)
    raise RunAgain(f"stopped by {stop.signal}, the state is saved")

main("download", work)
"""


@pytest.mark.parametrize(
    ("sent", "group"), [("SIGTERM", False), ("SIGUSR1", False), ("SIGTERM", True), ("SIGUSR1", True), ("SIGINT", True)]
)
def test_a_stopped_training_saves_and_gives_75(
    own_checkout: Checkout, tiny_corpus: Path, sent: str, group: bool
) -> None:
    """Signals to run.sh alone (kill, a batch system) and to all its processes (Ctrl-C, timeout)."""
    (own_checkout.root / "steps" / "download.py").write_text(STANDING)
    child = start(own_checkout, "--corpus", str(tiny_corpus), "--variant", "mini", "--tag", "stops")
    assert child.stderr is not None
    read_until(child.stderr, "standing")
    (os.killpg if group else os.kill)(child.pid, getattr(signal, sent))
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 75
    assert rest.splitlines() == [f"  stopped by {sent}, the state is saved; the same command continues"]
    assert not (exp(own_checkout, "stops") / ".lock").exists()


# A process of a stage that is sent a second signal at each point after the first, to the end of Python.
ASKED_TWICE = """
import atexit, os, signal, sys
sys.path.insert(0, {root!r})
from kestrel.errors import RunAgain
from kestrel.pipeline.step import handle_stop_signals, leave
from kestrel.train.signals import StopFlag

def again():
    os.kill(os.getpid(), signal.SIGTERM)

class Last:
    def __del__(self, kill=os.kill, who=os.getpid()):
        kill(who, 15)

atexit.register(again)
handle_stop_signals()
try:
    with StopFlag() as stop:
        again()
    again()
    sys.kept_to_the_end = Last()
    raise RunAgain("the state is saved")
except BaseException as error:
    leave(error)
"""


def test_a_second_signal_never_changes_the_exit_code() -> None:
    """Between the end of training and the end of the process, the finalisation of Python included."""
    done = subprocess.run([sys.executable, "-c", ASKED_TWICE.format(root=str(ROOT))], capture_output=True, check=False)
    assert done.returncode == 75, done.stderr


# ------------------------------------------------------------------------------------------------------- environment


def test_an_environment_that_is_none(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.run("--help", KESTREL_PYTHON="no-such-python")
    assert (done.returncode, done.stderr) == (1, "error: KESTREL_PYTHON=no-such-python: no such program\n")
    bare = tmp_path / "bare python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    done = checkout.run("--help", KESTREL_PYTHON=str(bare))
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*bare python lacks torch .*: .* -m pip install .*\n", done.stderr)
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = checkout.run("--help", KESTREL_PYTHON=str(old))
    assert (done.returncode, done.stderr) == (1, f"error: {old} is not Python 3.11 or newer\n")
