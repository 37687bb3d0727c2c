"""The export form: its folder builds, and its card says what was proven."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import score_kit

from kestrel.errors import KestrelError
from kestrel.export.c_form import c_form
from kestrel.export.form import Work
from kestrel.export.spec import ExportSpec
from kestrel.lower.answers import answers, lowered, predict_decoded
from kestrel.lower.graph import input_codes
from kestrel.lower.spotter import FEATURES
from kestrel.models.evaluate import predict

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("make") is None, reason="needs gcc and make: apt-get install gcc make"
)


def work(folder: Path, seen: list[tuple[int, int]]) -> Work:
    spotter, data = score_kit.spotter(), score_kit.feature_file(folder)
    graph, obstacle = lowered(spotter, 2.0**-12, 8)
    assert graph is not None
    decoded = predict_decoded(spotter, data, 8, 64)

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    return Work(
        spotter=spotter,
        data=data,
        logits=predict(spotter, data, 64),
        decoded=decoded,
        graph=graph,
        obstacle=obstacle,
        integer=answers(graph, data, data.labels, decoded),
        settings=ExportSpec(),
        batch_size=64,
        protocol={"name": "toy-4", "hash": "ab"},
        next_pass=lambda: progress,
    )


def test_the_folder_builds_and_answers_as_the_integer_model(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    given = work(tmp_path / "data", seen)
    folder = tmp_path / "export"
    folder.mkdir()
    part = c_form(given, folder)
    assert seen[-1] == (130, 130)
    assert part.figures["c"]["bit_identical_clips"] == 130
    assert "bit-identical" in part.text and "130 clips" in part.text
    assert sorted(part.files) == sorted(str(path.relative_to(folder)) for path in (folder / "c").iterdir())
    assert part.missing and "Sound" in part.missing[0]  # the features are not of a real front end
    subprocess.run(["make", "-s", "-C", folder / "c", "CFLAGS=-O1"], check=True)
    assert given.graph is not None and given.integer is not None
    codes = input_codes(given.data.rows(np.arange(130)), given.graph.tensors[FEATURES])
    done = subprocess.run([folder / "c" / "model", "-"], input=codes.tobytes(), capture_output=True, check=True)
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    np.testing.assert_array_equal([[int(word) for word in row[3].split()] for row in rows], given.integer.logits)
    assert [row[2] for row in rows] == [score_kit.CLASSES[i] for i in given.integer.logits.argmax(axis=1)]


def test_a_difference_fails_before_anything_is_written(tmp_path: Path) -> None:
    given = work(tmp_path / "data", [])
    assert given.integer is not None
    logits = given.integer.logits.copy()
    logits[77, 2] += 1
    wrong = dataclasses.replace(given, integer=dataclasses.replace(given.integer, logits=logits))
    with pytest.raises(KestrelError, match="differs from the integer model"):
        c_form(wrong, tmp_path)
    assert not (tmp_path / "c").exists()


def test_a_network_without_integers_is_left_out(tmp_path: Path) -> None:
    given = dataclasses.replace(work(tmp_path / "data", []), graph=None, integer=None, obstacle="set model.bits")
    part = c_form(given, tmp_path)
    assert "set model.bits" in part.text and part.missing and not part.files
