"""The training loop: what it computes, selects, writes and refuses."""

from __future__ import annotations

import csv
import errno
import logging
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from train_kit import FILES, contents, make_job, make_splits, make_spotter, quick_draw, run, write_features

from kestrel.errors import KestrelError, RunAgain, UsageError
from kestrel.store import checkpoint
from kestrel.store.atomic import disk_error
from kestrel.store.hdf5 import FeatureFile
from kestrel.train import keeper, loop
from kestrel.train.data import Split
from kestrel.train.loop import train
from kestrel.train.signals import StopFlag
from kestrel.train.validation import evaluate

CPU = torch.device("cpu")
TRAIN_CLIPS = 73  # five batches of 16, the last one short


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    write_features(path / "train.h5", TRAIN_CLIPS, seed=1)
    write_features(path / "validation.h5", 41, seed=2)
    return path


@pytest.fixture
def quick_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the points instead of drawing them, where a test trains many times."""
    monkeypatch.setattr(loop, "draw_curves", quick_draw)


def rows_of(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def stop_at(steps: set[int], stop: StopFlag):
    """A progress callback that asks for a stop once at each of `steps`."""

    def progress(done: int, total: int, text: str) -> None:
        if done in steps:
            steps.remove(done)
            stop.set("test")

    return progress


# --------------------------------------------------------------------------------------------------------- what it does


def test_learns_and_leaves_its_files(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kestrel")
    seen: list[tuple[int, int]] = []
    result = run(folder, make_job(tmp_path), progress=lambda done, total, text: seen.append((done, total)))
    assert result.best_accuracy > 0.6
    assert result.steps == 15 and seen == [(step, 15) for step in range(1, 16)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "time.json"])
    rows = rows_of(tmp_path)
    assert list(rows[0]) == [
        "step", "epoch", "phase", "lr", "train_loss", "train_accuracy", "penalty_size",
        "validation_loss", "validation_accuracy",
    ]  # fmt: skip
    assert [(row["step"], row["epoch"], row["phase"]) for row in rows] == [
        ("5", "1", "pretrain"), ("10", "2", "pretrain"), ("15", "3", "pretrain"),
    ]  # fmt: skip
    assert [row["lr"] for row in rows] == ["0.02", "0.005", "0.005"]
    lines = [record.message for record in caplog.records if "validation" in record.message]
    assert len(lines) == 3 and "clips/s" in lines[0] and "ETA" in lines[0] and "(best)" in lines[0]
    best = checkpoint.load(result.best)
    assert best["identity"]["config_hash"] == "0" * 64
    assert best["metrics"]["validation_accuracy"] == result.best_accuracy
    assert f"{result.best_accuracy:.6g}" == max((row["validation_accuracy"] for row in rows), key=float)
    assert not {"seconds", "time"} & set(best["metrics"])


def test_agrees_with_a_naive_loop(folder: Path, tmp_path: Path) -> None:
    """Adam with weight decay, label smoothing, penalty, clipping and projection, written out once more."""
    options = {"noise": 0.0, "drop": 0.0}
    phase = {"epochs": 2, "lr": [0.02, 0.01], "lr_steps": [4], "weight_decay": 0.01, "grad_clip": 0.7}
    job = make_job(tmp_path, phase={**phase, "label_smoothing": 0.1})
    trained = make_spotter(**options)
    run(folder, job, spotter=trained)

    naive = make_spotter(**options)
    optimizer = torch.optim.Adam(naive.parameters(), lr=0.02, weight_decay=0.01)
    file, step, losses = FeatureFile(folder / "train.h5"), 0, []
    training, _ = make_splits(folder, job)
    for epoch in range(2):
        order = training.order(epoch)
        total = 0.0
        for start in range(0, TRAIN_CLIPS, 16):
            index = order[start : start + 16]
            optimizer.param_groups[0]["lr"] = 0.02 if step < 4 else 0.01
            logits = naive(torch.from_numpy(file.rows(index)))
            log_p = logits.log_softmax(1)
            target = torch.full_like(log_p, 0.1 / 3)
            target[torch.arange(len(index)), torch.from_numpy(file.labels[index])] += 0.9
            loss = -(target * log_p).sum(1).mean()
            total += loss.item() * len(index)
            optimizer.zero_grad()
            (loss + 1e-3 * naive.net.first.weight.square().sum()).backward()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in naive.parameters()))
            for parameter in naive.parameters():
                parameter.grad *= min(1.0, 0.7 / norm)
            optimizer.step()
            with torch.no_grad():
                naive.net.second.weight.clamp_(-0.5, 0.5)
            step += 1
        losses.append(total / TRAIN_CLIPS)
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert [float(row["train_loss"]) for row in rows_of(tmp_path)] == pytest.approx(losses, rel=1e-4)


def test_accuracies_are_over_clips_not_batches(folder: Path, tmp_path: Path) -> None:
    spotter = make_spotter(noise=0.0, drop=0.0, norm=False)
    run(folder, make_job(tmp_path, phase={"epochs": 1, "lr": [0.0], "optimizer": "sgd"}), spotter=spotter)
    expected = {}
    for name in ("train", "validation"):
        file = FeatureFile(folder / f"{name}.h5")
        logits = spotter(torch.from_numpy(file.rows(np.arange(len(file))))).detach()
        labels = torch.from_numpy(file.labels)
        expected[f"{name}_accuracy"] = float((logits.argmax(1) == labels).double().mean())
        expected[f"{name}_loss"] = float(torch.nn.functional.cross_entropy(logits, labels))
    (row,) = rows_of(tmp_path)
    for key, value in expected.items():
        assert float(row[key]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop", "adabound"])
def test_optimisers_learn(folder: Path, tmp_path: Path, optimizer: str) -> None:
    phase = {"optimizer": optimizer, "lr": [0.02], "momentum": 0.5, "schedule": "plateau"}
    result = run(folder, make_job(tmp_path, phase=phase))
    assert result.best_accuracy > 0.55


def test_validations_come_when_asked_and_at_the_end(folder: Path, tmp_path: Path) -> None:
    run(folder, make_job(tmp_path, phase={"steps": 11, "validate_every": 4}))
    assert [row["step"] for row in rows_of(tmp_path)] == ["4", "8", "11"]


def test_validation_does_not_change_training(folder: Path, tmp_path: Path, quick_curves: None) -> None:
    often, seldom = make_spotter(), make_spotter()
    run(folder, make_job(tmp_path / "a", phase={"validate_every": 1}), spotter=often)
    run(folder, make_job(tmp_path / "b", phase={"validate_every": 100}), spotter=seldom)
    for one, other in zip(often.parameters(), seldom.parameters(), strict=True):
        assert torch.equal(one, other)


def test_validation_noise_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    spotter = make_spotter(noise=0.3)
    _, held_out = make_splits(folder, make_job(tmp_path))
    first, second = (evaluate(spotter, held_out, 3, CPU) for _ in range(2))
    other = evaluate(spotter, held_out, 4, CPU)
    assert first == second and first is not None and other is not None
    assert first.loss_sum != other.loss_sum


def test_training_is_the_same_for_any_number_of_workers(folder: Path, tmp_path: Path, quick_curves: None) -> None:
    for workers in (0, 2):
        run(folder, make_job(tmp_path / str(workers), phase={"epochs": 2}, shared={"workers": workers}))
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_zero_steps_validate_the_initial_weights(folder: Path, tmp_path: Path) -> None:
    result = run(folder, make_job(tmp_path, phase={"epochs": 0}))
    assert result.steps == 0
    assert [row["step"] for row in rows_of(tmp_path)] == ["0"]


# ------------------------------------------------------------------------------------------------------------ selection


def test_accuracy_decides_then_lower_loss() -> None:
    ordered = [
        keeper.NOTHING,
        keeper.standing(0, 9.0),
        keeper.standing(7, 3.0),
        keeper.standing(7, 2.0),
        keeper.standing(8, 5.0),
    ]
    assert ordered == sorted(ordered)
    assert not keeper.standing(7, 2.0) > keeper.standing(7, 2.0)


def test_retraining_never_ends_worse_than_it_began(folder: Path, tmp_path: Path) -> None:
    start = run(folder, make_job(tmp_path / "pretrain", phase={"epochs": 6, "lr": [0.02]}))
    spotter = make_spotter()
    spotter.load_state_dict(checkpoint.load(start.best)["model"])
    _, held_out = make_splits(folder, make_job(tmp_path))
    before = evaluate(spotter, held_out, 3, CPU)
    assert before is not None
    wreck = make_job(tmp_path / "retrain", "retrain", phase={"epochs": 2, "lr": [5.0]})
    result = run(folder, wreck, spotter=spotter)
    best = checkpoint.load(result.best)
    assert best["metrics"]["step"] == 0
    assert result.best_accuracy == before.accuracy
    for name, value in checkpoint.load(start.best)["model"].items():
        assert torch.equal(best["model"][name], value)
    rows = rows_of(tmp_path / "retrain")
    assert rows[0]["step"] == "0" and rows[0]["train_loss"] == ""
    assert min(float(row["validation_accuracy"]) for row in rows) < before.accuracy


def test_a_better_best_on_disk_is_not_replaced(folder: Path, tmp_path: Path, quick_curves: None) -> None:
    """As after a kill between best.pt and last.pt on a device whose second try comes out differently."""
    run(folder, make_job(tmp_path))
    best = checkpoint.load(tmp_path / "best.pt")
    best["metrics"]["validation_correct"] = 41
    best["metrics"]["validation_accuracy"] = 1.0
    (tmp_path / "last.pt").unlink()
    checkpoint.save(tmp_path / "best.pt", best)
    kept = (tmp_path / "best.pt").read_bytes()
    assert run(folder, make_job(tmp_path)).best_accuracy == 1.0
    assert (tmp_path / "best.pt").read_bytes() == kept


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("stage", "phase", "steps"),
    [
        ("pretrain", {"validate_every": 4}, range(1, 16)),
        ("retrain", {"optimizer": "sgd", "schedule": "cosine", "lr": [0.05], "grad_clip": 1.0}, (1, 5, 9, 15)),
        ("retrain", {"optimizer": "adamw", "weight_decay": 0.01}, (2, 10, 14)),
    ],
)
def test_stopped_at_any_batch_ends_as_a_straight_run(
    folder: Path, tmp_path: Path, quick_curves: None, stage: str, phase: dict, steps: Iterable[int]
) -> None:
    run(folder, make_job(tmp_path / "straight", stage, phase))
    expected = contents(tmp_path / "straight")
    for step in steps:
        job, stop = make_job(tmp_path / str(step), stage, phase), StopFlag()
        with pytest.raises(RunAgain, match=f"step {step} of 15"):
            run(folder, job, stop=stop, progress=stop_at({step}, stop))
        torch.rand(step)  # what other code draws in between does not matter
        run(folder, job, spotter=make_spotter(seed=77))
        assert contents(job.out_dir) == expected


def test_stopped_again_and_again(folder: Path, tmp_path: Path, quick_curves: None) -> None:
    run(folder, make_job(tmp_path / "straight", "retrain"))
    job = make_job(tmp_path / "stopped", "retrain")
    for step in range(16):  # stops before the initial validation, then after each batch
        stop = StopFlag()
        if step == 0:
            stop.set("test")
        with pytest.raises(RunAgain):
            run(folder, job, stop=stop, progress=stop_at({step}, stop))
    run(folder, job)
    assert contents(job.out_dir) == contents(tmp_path / "straight")
    run(folder, job)  # finished: nothing changes
    assert contents(job.out_dir) == contents(tmp_path / "straight")


@pytest.mark.parametrize("evaluation", range(11))
def test_stopped_during_a_validation(folder: Path, tmp_path: Path, quick_curves: None, evaluation: int) -> None:
    """Validation is left at once and done again on the next start (four validations of three batches each)."""
    run(folder, make_job(tmp_path / "straight", "retrain"))
    job, stop, spotter = make_job(tmp_path / "stopped", "retrain"), StopFlag(), make_spotter()
    left = [evaluation]

    def hook(*_: object) -> None:
        if not spotter.training:
            if left[0] == 0:
                stop.set("test")
            left[0] -= 1

    spotter.register_forward_hook(hook)
    with pytest.raises(RunAgain):
        run(folder, job, spotter=spotter, stop=stop)
    run(folder, job)
    assert contents(job.out_dir) == contents(tmp_path / "straight")


def test_another_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    stop = StopFlag()
    with pytest.raises(RunAgain):
        run(folder, make_job(tmp_path), stop=stop, progress=stop_at({3}, stop))
    job = make_job(tmp_path)
    job.identity = {**job.identity, "config_hash": "1" * 64}
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(KestrelError, match="another configuration.*--force") as caught:
        run(folder, job)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(KestrelError, match="batches of 16, this is"):
        run(folder, make_job(tmp_path, shared={"batch_size": 8}))
    (tmp_path / "last.pt").write_bytes(before[:1000])
    with pytest.raises(KestrelError, match=r"last\.pt is cut short or damaged"):
        run(folder, make_job(tmp_path))


def test_more_epochs_go_on_where_the_schedule_allows(folder: Path, tmp_path: Path, quick_curves: None) -> None:
    constant = {"lr": [0.02]}
    run(folder, make_job(tmp_path / "long", phase={**constant, "epochs": 4}))
    run(folder, make_job(tmp_path / "short", phase={**constant, "epochs": 2}))
    run(folder, make_job(tmp_path / "short", phase={**constant, "epochs": 4}))
    assert contents(tmp_path / "short")["best.pt"] == contents(tmp_path / "long")["best.pt"]
    assert contents(tmp_path / "short")["metrics.csv"] == contents(tmp_path / "long")["metrics.csv"]
    with pytest.raises(KestrelError, match="past the end"):
        run(folder, make_job(tmp_path / "short", phase={**constant, "epochs": 1}))
    plateau = {"lr": [0.05, 0.001], "schedule": "plateau", "plateau_patience": 0, "plateau_factor": 0.3}
    run(folder, make_job(tmp_path / "plateau", phase={**plateau, "epochs": 6}))
    for epochs in (2, 5, 6):  # what it has behind it decides its rates
        run(folder, make_job(tmp_path / "falling", phase={**plateau, "epochs": epochs}))
    assert contents(tmp_path / "plateau")["metrics.csv"] == contents(tmp_path / "falling")["metrics.csv"]
    assert len({row.split(",")[3] for row in (tmp_path / "plateau" / "metrics.csv").read_text().split()}) > 2
    cosine = {"lr": [0.02], "schedule": "cosine"}
    run(folder, make_job(tmp_path / "cosine", phase={**cosine, "epochs": 2}))
    with pytest.raises(KestrelError, match="learning rates depend on it"):
        run(folder, make_job(tmp_path / "cosine", phase={**cosine, "epochs": 4}))


def test_seconds_of_all_starts_add_up(folder: Path, tmp_path: Path) -> None:
    stop = StopFlag()
    with pytest.raises(RunAgain):
        run(folder, make_job(tmp_path), stop=stop, progress=stop_at({4}, stop))
    first = keeper.read_json(tmp_path / "time.json")
    run(folder, make_job(tmp_path))
    second = keeper.read_json(tmp_path / "time.json")
    assert (first["starts"], second["starts"]) == (1, 2)
    assert 0 < first["train_seconds"] < second["train_seconds"]


# --------------------------------------------------------------------------------------------------------- what goes wrong


def test_a_clip_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    write_features(tmp_path / "train.h5", TRAIN_CLIPS, seed=1, poison=20)
    write_features(tmp_path / "validation.h5", 41, seed=2)
    bad = FeatureFile(tmp_path / "train.h5").utt_ids[20]
    with pytest.raises(KestrelError, match="not finite at step") as caught:
        run(tmp_path, make_job(tmp_path / "out"))
    assert bad in str(caught.value) and "\n" not in str(caught.value)
    aside = checkpoint.load(tmp_path / "out" / "nonfinite.pt")
    assert 20 in aside["rows"] and torch.isfinite(aside["model"]["net.first.weight"]).all()
    assert checkpoint.load(tmp_path / "out" / "last.pt")["step"] == 0  # the state before it was kept


def test_a_validation_clip_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    write_features(tmp_path / "train.h5", TRAIN_CLIPS, seed=1)
    write_features(tmp_path / "validation.h5", 41, seed=2, poison=30)
    bad = FeatureFile(tmp_path / "validation.h5").utt_ids[30]
    with pytest.raises(KestrelError, match=rf"validation\.h5: features of clip 30 \({bad}\) are not finite"):
        run(tmp_path, make_job(tmp_path / "out"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_names_the_batch(folder: Path, tmp_path: Path, what: str) -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(context, x: Tensor) -> Tensor:
            return x * (math.inf if what == "loss" else 1.0)

        @staticmethod
        def backward(context, gradient: Tensor) -> Tensor:
            return gradient * math.nan

    spotter, calls = make_spotter(), [0]

    def hook(module: object, inputs: object, logits: Tensor) -> Tensor | None:
        calls[0] += spotter.training
        return Breaks.apply(logits) if calls[0] == 3 and spotter.training else None

    spotter.register_forward_hook(hook)
    with pytest.raises(KestrelError, match=rf"the {what} is not finite at step 3 \(epoch 1, batch 3\)") as caught:
        run(folder, make_job(tmp_path), spotter=spotter)
    training, _ = make_splits(folder, make_job(tmp_path))
    named = training.utt_ids(training.order(0)[32:48])
    assert (
        named[0] in str(caught.value) and "and 11 more clips" in str(caught.value) and "train.lr" in str(caught.value)
    )
    assert all(torch.isfinite(p).all() for p in spotter.parameters())


def test_a_validation_loss_that_is_not_finite_stops(folder: Path, tmp_path: Path) -> None:
    spotter = make_spotter()
    spotter.register_forward_hook(lambda module, inputs, logits: None if spotter.training else logits * math.inf)
    with pytest.raises(KestrelError, match="validation loss is not finite at step 5"):
        run(folder, make_job(tmp_path), spotter=spotter)


def fail_saves(monkeypatch: pytest.MonkeyPatch, failing: range) -> list[int]:
    """Make the saves with these numbers (from 0) fail as a full disk does."""
    count, real = [0], checkpoint.save

    def save(path: Path, content: dict) -> None:
        count[0] += 1
        if count[0] - 1 in failing:
            raise disk_error(path, OSError(errno.ENOSPC, "No space left on device"))
        real(path, content)

    monkeypatch.setattr(checkpoint, "save", save)
    return count


def test_training_goes_on_while_the_disk_is_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(folder, make_job(tmp_path / "straight", phase={"validate_every": 2}))
    count = fail_saves(monkeypatch, range(1, 6))
    run(folder, make_job(tmp_path / "full", phase={"validate_every": 2}))
    assert count[0] > 6
    assert "no space left" in caplog.text and "training goes on" in caplog.text
    assert contents(tmp_path / "full") == contents(tmp_path / "straight")


def test_a_best_model_is_not_lost_to_a_full_disk_and_a_kill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.pt must not get ahead of a best.pt that could not be written."""
    run(folder, make_job(tmp_path / "straight"))
    stop, out = StopFlag(), tmp_path / "full"
    with monkeypatch.context() as patch:
        fail_saves(patch, range(1, 1000))
        with pytest.raises(KestrelError, match="no space left"):
            run(folder, make_job(out), stop=stop, progress=stop_at({7}, stop))
    assert checkpoint.load(out / "last.pt")["step"] == 0
    run(folder, make_job(out))
    assert contents(out) == contents(tmp_path / "straight")


def test_a_disk_full_to_the_end_or_from_the_start_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_saves(patch, range(1, 1000))
        with pytest.raises(KestrelError, match="no space left"):
            run(folder, make_job(tmp_path / "end"))
    assert "validation_accuracy" in (tmp_path / "end" / "metrics.csv").read_text()
    with monkeypatch.context() as patch:
        fail_saves(patch, range(1))
        steps: list[int] = []
        with pytest.raises(KestrelError, match="no space left"):
            run(folder, make_job(tmp_path / "start"), progress=lambda done, total, text: steps.append(done))
        assert not steps


def test_a_folder_that_cannot_be_made_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KestrelError, match="cannot write .*out: Not a directory"):
        run(folder, make_job(tmp_path / "file" / "out"))


def test_settings_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exactly one of retrain.epochs and retrain.steps"):
        run(folder, make_job(tmp_path, "retrain", phase={"steps": 3, "epochs": 3}))
    with pytest.raises(UsageError, match="train.lr_steps"):
        run(folder, make_job(tmp_path, phase={"lr_steps": [1, 2, 3]}))
    if not torch.cuda.is_available():
        with pytest.raises(KestrelError, match=r"train\.device"):
            run(folder, make_job(tmp_path, shared={"device": "cuda"}))
    job = make_job(tmp_path)
    training, _ = make_splits(folder, job)
    other = Split(FeatureFile(folder / "validation.h5"), batch_size=4)
    other.classes = ["yes", "no", "up"]
    with pytest.raises(KestrelError, match="different classes"):
        train(job, make_spotter(), training, other)
