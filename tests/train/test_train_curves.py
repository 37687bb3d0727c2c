"""metrics.csv and curves.png."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from kestrel.train.curves import draw_curves, marks
from kestrel.train.history import Running, columns, write_metrics


def history() -> list[dict]:
    """A pretraining with a learning-rate drop, then a retraining that begins with a validation."""
    rows: list[dict] = []
    for step in range(0, 1700, 100):
        phase, lr = ("pretrain", 0.002 if step <= 500 else 0.0005) if step < 1000 else ("retrain", 0.0005)
        row = {"step": step, "epoch": step / 370, "phase": phase, "lr": lr}
        if step not in (0, 1000):
            row |= {"train_loss": 2.5 / (1 + step / 100), "train_accuracy": 1 - 0.9 / (1 + step / 150)}
            row |= {"penalty_cosine": 0.4 / (1 + step)}
        accuracy = 1 - 0.9 / (1 + step / 200) - (0.2 if step == 1000 else 0)
        rows.append(row | {"validation_loss": 2.6 / (1 + step / 120), "validation_accuracy": accuracy})
    return rows


def test_means_are_over_clips() -> None:
    running = Running()
    assert running.row() == {}
    running.add(30, 15, 60.0, {"cosine": 0.5})
    running.add(10, 10, 10.0, {"cosine": 0.1})
    expected = {"train_loss": 70 / 40, "train_accuracy": 25 / 40, "penalty_cosine": (30 * 0.5 + 10 * 0.1) / 40}
    assert running.row() == pytest.approx(expected)
    assert Running(running.state()).row() == running.row()


def test_metrics_file(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", history()[:2])
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,phase,lr,train_loss,train_accuracy,penalty_cosine,validation_loss,validation_accuracy",
        "0,0,pretrain,0.002,,,,2.6,0.1",
        "100,0.27027,pretrain,0.002,1.25,0.46,0.0039604,1.41818,0.4",
    ]
    assert columns([]) == ["step", "epoch", "phase", "lr", "train_loss", "train_accuracy", *columns([])[-2:]]


def test_marks_stand_where_rate_and_phase_change() -> None:
    assert marks(history()) == [(500, "lr 0.0005"), (900, "retrain")]
    cosine = [{"step": step, "phase": "pretrain", "lr": 0.1 / (step + 1)} for step in range(20)]
    assert marks(cosine) == []


def test_the_picture_is_reproducible_and_shows_both_curves(tmp_path: Path) -> None:
    draw_curves(tmp_path / "a.png", history(), "r t pretrain")
    draw_curves(tmp_path / "b.png", history(), "r t pretrain")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    kinds, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kinds.append(data[place + 4 : place + 8])
        place += 12 + length
    assert set(kinds) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no text, no time
    pixels = imread(tmp_path / "a.png")[..., :3]
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    half = pixels.shape[0] // 2
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        near = np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02
        assert near[:half].sum() > 200 and near[half:].sum() > 200


def test_odd_histories_are_drawn(tmp_path: Path) -> None:
    draw_curves(tmp_path / "none.png", [], "t")
    assert not (tmp_path / "none.png").exists()
    for number, rows in enumerate((history()[:1], history()[:2], [history()[3] | {"train_loss": float("nan")}])):
        draw_curves(tmp_path / f"{number}.png", rows, "t")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
