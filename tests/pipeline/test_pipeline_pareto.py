"""The Pareto table of a sweep, with published networks beside its own."""

from __future__ import annotations

import csv
from pathlib import Path

from run_kit import ROOT

from kestrel.pipeline.gather import _pareto
from kestrel.pipeline.published import Published, read_published


def _row(beta: int, seed: int, macs: int, accuracy: float) -> dict:
    values = {"model.search.grad_reg_loss_beta": beta, "seed": seed}
    common = {"variant": "base", "protocol": "p", "split": "test", "n": 100, "status": "ok", "point": f"{beta}"}
    return {**common, "values": values, "macs": macs, "weight_bytes": macs // 50, "accuracy": accuracy}


def _content(rows: list[dict]) -> dict:
    return {"recipe": "proxylessnas_kws", "name": "beta", "points": rows}


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [
        _row(0, 0, 9_000_000, 0.95),
        _row(0, 1, 9_200_000, 0.96),
        _row(4, 0, 3_000_000, 0.94),
        _row(8, 0, 5_000_000, 0.93),
    ]
    assert _pareto(ROOT, tmp_path, _content(rows)) == [tmp_path / "pareto.png"]
    assert (tmp_path / "pareto.png").stat().st_size > 0
    table = list(csv.DictReader((tmp_path / "pareto.csv").open()))
    ours = [row for row in table if row["kind"] == "here"]
    assert [row["network"] for row in ours] == [f"grad_reg_loss_beta = {beta}" for beta in (0, 4, 8)]
    assert ours[0]["runs"] == "2" and ours[0]["macs"] == "9100000" and float(ours[0]["accuracy"]) == 0.955
    assert [row["best_at_macs"] for row in ours] == ["true", "true", "false"]
    assert len(table) - len(ours) == 36


def test_networks_of_one_size_make_no_figure(tmp_path: Path) -> None:
    assert _pareto(ROOT, tmp_path, _content([_row(0, 0, 5, 0.9), _row(4, 0, 5, 0.8)])) == []
    assert not list(tmp_path.iterdir())


def test_recipes_without_published_figures() -> None:
    assert read_published(ROOT, "none") == Published()
    assert len(read_published(ROOT, "proxylessnas_kws").nets) == 36
