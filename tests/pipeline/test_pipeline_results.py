"""Kept results and the pages made from them."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import ROOT
from sweep_kit import finish, result, sweep_folder, toy_sweep

from kestrel import recipe as recipes
from kestrel.errors import KestrelError
from kestrel.pipeline.gather import gather
from kestrel.pipeline.results import keep, kept_name, results_text, write_results
from kestrel.store.atomic import read_json, write_json


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one recipe and no results."""
    folder = tmp_path / "recipes" / "iscas21_lstm"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").symlink_to(ROOT / "recipes" / "iscas21_lstm" / "recipe.yaml")
    return tmp_path


def kept(root: Path, seed: int, accuracy: float, **changes: object) -> Path:
    exp = root / "exp" / "iscas21_lstm" / f"{changes.get('tag', f'base-toy-12-seed{seed}')}"
    result(exp, seed, accuracy, **changes)
    write_json(exp / "score" / ".done.json", {})
    return keep(root, exp)


def page(root: Path) -> str:
    return (root / "recipes" / "iscas21_lstm" / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", recipes.names(ROOT))
def test_the_committed_page_is_what_its_result_files_give(recipe: str) -> None:
    path = ROOT / "recipes" / recipe / "RESULTS.md"
    assert path.exists(), "run steps/results.py"
    assert path.read_text(encoding="utf-8") == results_text(ROOT, recipe), "run steps/results.py"


def test_figures_of_the_readme_stand_on_the_pages() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Results so far")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    assert len(rows) > len(recipes.names(ROOT))
    for name, seeds, trained, integer, *_ in rows[1:]:
        lines = (ROOT / "recipes" / name.split(",")[0] / "RESULTS.md").read_text(encoding="utf-8").splitlines()
        found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
        assert any(str(len(cells[1].split())) == seeds and trained in cells and integer in cells for cells in found), (
            f"{name}: {trained} and {integer} of {seeds} seeds are on no row of its page"
        )


def test_seeds_of_a_variant_are_one_row(root: Path) -> None:
    for seed, accuracy in enumerate((0.88, 0.90, 0.89)):
        kept(root, seed, accuracy, energy_uj=25.0 + seed)
    row = next(line for line in page(root).splitlines() if line.startswith("| `base`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["0 1 2", "3,048", "0.1", "89.00 ± 1.00 %"]
    # Wilson at 0.89 of 3,048 clips, worked out apart: one test set, however many seeds
    z, n, p = 1.959963984540054, 3048, 0.89
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    bounds = [100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert cells[5] == f"{bounds[0]:.2f} to {bounds[1]:.2f}"
    assert cells[6:8] == ["89.20 ± 1.00 %", "26.000 ± 1.000"]
    assert (
        "for seed in 0 1 2; do ./run.sh --recipe iscas21_lstm --corpus gsc_v2 --variant base --seed $seed; done"
        in page(root)
    )


def test_other_protocols_splits_and_tags_are_never_merged(root: Path) -> None:
    kept(root, 0, 0.88)
    kept(root, 1, 0.90, protocol={"name": "toy-12", "hash": "cd" * 32}, tag="base-toy-12-seed1")
    kept(root, 0, 0.70, tag="one-block")
    text = page(root)
    assert text.count("## toy-12, test") == 2
    assert "| `one-block` | 0 |" in text and text.count("| `base` |") == 2
    assert "±" not in "".join(line for line in text.splitlines() if line.startswith("| `"))


def test_names_of_kept_results(root: Path) -> None:
    assert kept(root, 2, 0.5).name == "base-toy-12-seed2.json"
    assert kept(root, 2, 0.5, tag="five-bits").name == "five-bits-toy-12-seed2.json"
    assert kept(root, 2, 0.5, tag="five-bits-seed2").name == "five-bits-toy-12-seed2.json"
    for path in (ROOT / "recipes").glob("*/results/*.json"):
        assert kept_name(read_json(path)) == path.name


def test_packed_bytes_come_from_the_export_of_the_same_checkpoint(root: Path) -> None:
    assert "packed" not in page_of(root, None).lower()
    assert "packed" not in page_of(root, "another").lower()
    text = page_of(root, "ab")
    header, row = (line for line in text.splitlines() if line.startswith(("| variant", "| `base`")))
    cells = dict(zip(header.split("|"), row.split("|"), strict=True))
    assert cells[" packed, bytes "] == " 48,712 " and cells[" bytes "] != " 48,712 "
    assert "*Packed* are all weights again" in text


def page_of(root: Path, exported: str | None) -> str:
    """The page with one result of checkpoint `ab`, and an export of the checkpoint `exported`."""
    exp = root / "exp" / "iscas21_lstm" / "base-toy-12-seed0"
    if exported is not None:
        write_json(exp / "export" / "export.json", {"checkpoint_sha256": exported, "packed_bytes": 48712})
        write_json(exp / "export" / ".done.json", {})
    kept(root, 0, 0.88, checkpoint_sha256="ab")
    return page(root)


def test_uncommitted_changes_are_said_and_shown(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kestrel"), "propagate", True)
    kept(root, 0, 0.5)
    assert not caplog.records and "`0123456` |" in page(root)
    kept(root, 1, 0.5, git_dirty=True)
    assert "uncommitted changes" in caplog.text
    assert "`0123456`, `0123456`\\* |" in page(root)


def test_what_cannot_be_kept(root: Path) -> None:
    exp = root / "exp" / "iscas21_lstm" / "x"
    result(exp, 0, 0.5)
    with pytest.raises(KestrelError, match="no finished score to keep"):
        keep(root, exp)
    assert not (root / "recipes" / "iscas21_lstm" / "results").exists()
    folder = root / "recipes" / "iscas21_lstm" / "results"
    write_json(folder / "a.json", {"recipe": "iscas21_lstm"})
    with pytest.raises(KestrelError, match=r"a\.json has no entry variant"):
        results_text(root, "iscas21_lstm")
    write_json(folder / "a.json", result(exp, 0, 0.5, recipe="other"))
    with pytest.raises(KestrelError, match="result of recipe other"):
        results_text(root, "iscas21_lstm")


def test_published_figures_stand_in_a_table_of_their_own(root: Path) -> None:
    kept(root, 0, 0.88)
    path = root / "recipes" / "iscas21_lstm" / "published.yaml"
    path.write_text("note: other clips\nfigures:\n  - {system: theirs, accuracy: 90, source: a paper}\n")
    write_results(root, "iscas21_lstm")
    ours, theirs = page(root).split("## Published figures")
    assert "theirs" not in ours and "| theirs | 90 % | a paper |" in theirs and "other clips" in theirs
    path.write_text("figures:\n  - {system: theirs, accuracy: 90}\n")
    with pytest.raises(KestrelError, match="needs a system and a source"):
        results_text(root, "iscas21_lstm")


def test_a_sweep_is_kept_with_its_failed_points(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("kestrel"), "propagate", True)
    sweep = toy_sweep("sizes", {"model.hidden": [8, 16], "seed": [0, 1]})
    folder = sweep_folder(root, sweep)
    gather(root, folder)
    with pytest.raises(KestrelError, match="no point has a result to keep"):
        keep(root, folder)
    for seed, accuracy in enumerate((0.5, 0.6)):
        finish(root, folder / f"hidden=8,seed={seed}", seed, accuracy, 6.0)
    gather(root, folder)
    path = keep(root, folder)
    assert path == root / "recipes" / "iscas21_lstm" / "results" / "sweeps" / "sizes.json"
    assert "2 of 4 points without a result" in caplog.text
    assert path.with_suffix(".csv").read_text() == (folder / "summary.csv").read_text()
    assert path.with_name("sizes-accuracy.png").read_bytes() == (folder / "accuracy.png").read_bytes()
    text = page(root)
    assert "![sizes-accuracy](results/sweeps/sizes-accuracy.png)" in text
    assert "| 8 | 2 of 2 | 55.00 ± 7.07 % |" in text and "| 16 | 0 of 2 | - |" in text
    assert "* hidden=16,seed=0: not run: not run" in text and "./run.sh --sweep toy.yaml" in text


def scores(folder: Path, right: list[int]) -> Path:
    path = folder / "score" / "scores.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["utt_id", "position", "correct"])
        writer.writerows([f"yes/{row}", row, value] for row, value in enumerate(right))
    return folder


def test_two_models_are_compared_on_the_same_clips(tmp_path: Path) -> None:
    a, b = scores(tmp_path / "a", [1, 0, 1, 0] * 50), scores(tmp_path / "b", [1, 1, 1, 0] * 50)
    command = [sys.executable, str(ROOT / "steps" / "results.py"), "--compare", str(a), "--with", str(b)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("+25.00 points (95 % paired interval +18.98 to +31.02; 200 clips")
    done = subprocess.run(command[:4], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--with" in done.stderr
