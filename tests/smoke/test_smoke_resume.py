"""A run that is stopped or killed and started again ends with the files of a straight run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_kit import Checkout

pytestmark = pytest.mark.smoke

OPTIONS = (
    "--variant", "mini", "--set", "train.epochs=3", "--set", "train.batch_size=16", "--set", "retrain.epochs=2",
    "--set", "model.hidden=24", "--set", "train.save_minutes=0", "--stop-stage", "4",
)  # fmt: skip
KEPT = ("best.pt", "metrics.csv")


def _start(checkout: Checkout, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        checkout.command(*options), cwd=checkout.root, env=checkout.environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def _wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.02)


def _result(checkout: Checkout, tag: str) -> dict[str, bytes]:
    exp = checkout.root / "exp" / "iscas21_lstm" / tag
    return {f"{stage}/{name}": (exp / stage / name).read_bytes() for stage in ("pretrain", "retrain") for name in KEPT}


def _without_tag(checkout: Checkout, tag: str) -> dict[str, object]:
    import torch

    exp = checkout.root / "exp" / "iscas21_lstm" / tag
    state = torch.load(exp / "retrain" / "best.pt", weights_only=True)
    return {name: tensor.tolist() for name, tensor in state["model"].items()}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_stopped_run_ends_like_a_straight_one(checkout: Checkout, tiny_corpus: Path, how: signal.Signals) -> None:
    """Signals reach the step that trains; the same command then continues to bit-identical weights and metrics."""
    straight = (*OPTIONS, "--corpus", str(tiny_corpus), "--tag", "straight")
    done = checkout.run(*straight)
    assert done.returncode == 0, done.stderr
    tag = f"stopped-{how.name}"
    options = (*OPTIONS, "--corpus", str(tiny_corpus), "--tag", tag)
    process = _start(checkout, *options)
    exp = checkout.root / "exp" / "iscas21_lstm" / tag
    _wait_for(exp / "pretrain" / "last.pt", process)
    time.sleep(0.3)
    os.killpg(process.pid, how)
    output = process.communicate(timeout=60)[0]
    if how is signal.SIGKILL:
        assert process.returncode != 0
    else:
        assert process.returncode in (75, -how), output
    assert not (exp / "retrain" / ".done.json").exists()
    again = checkout.run(*options)
    assert again.returncode == 0, again.stderr
    assert "continues" in again.stderr
    expected, found = _result(checkout, "straight"), _result(checkout, tag)
    assert found["pretrain/metrics.csv"] == expected["pretrain/metrics.csv"]
    assert found["retrain/metrics.csv"] == expected["retrain/metrics.csv"]
    assert _without_tag(checkout, tag) == _without_tag(checkout, "straight")


def test_more_epochs_continue_and_other_settings_do_not(checkout: Checkout, tiny_corpus: Path) -> None:
    """A longer constant schedule goes on from the end; a changed setting keeps the old result as <stage>.prev."""
    options = ("--corpus", str(tiny_corpus), "--tag", "longer", "--variant", "mini", "--stop-stage", "3")
    sets = ("--set", "train.lr=0.004", "--set", "model.hidden=16", "--set", "train.batch_size=32")
    assert checkout.run(*options, *sets, "--set", "train.epochs=1").returncode == 0
    metrics = checkout.root / "exp/iscas21_lstm/longer/pretrain/metrics.csv"
    first = metrics.read_text().splitlines()
    longer = checkout.run(*options, *sets, "--set", "train.epochs=3")
    assert longer.returncode == 0, longer.stderr
    rows = metrics.read_text().splitlines()
    assert rows[: len(first)] == first
    assert len(rows) == len(first) + 2
    changed = checkout.run(*options, *sets, "--set", "train.epochs=3", "--set", "model.cs=0.2")
    assert changed.returncode == 0, changed.stderr
    assert (metrics.parent.with_name("pretrain.prev") / "metrics.csv").read_text().splitlines() == rows


def test_two_processes_stop_and_continue(checkout: Checkout, tiny_corpus: Path) -> None:
    """train.processes=2: a stop signal saves the state once, the same command ends the run."""
    options = (*OPTIONS, "--corpus", str(tiny_corpus), "--tag", "two", "--set", "train.processes=2")
    process = _start(checkout, *options)
    exp = checkout.root / "exp" / "iscas21_lstm" / "two"
    _wait_for(exp / "pretrain" / "last.pt", process)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    again = checkout.run(*options)
    assert again.returncode == 0, again.stderr
    assert "2 processes" in output or "2 processes" in again.stderr
    rows = (exp / "retrain" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + 2  # header, initial weights, two epochs
