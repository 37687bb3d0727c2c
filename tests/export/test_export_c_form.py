"""The export form: its folder builds, and its card says what was proven."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import score_kit
import sound_kit
import torch
from cc_kit import QUICK, needs_compiler

from kestrel.errors import KestrelError
from kestrel.export.c_check import Toolchain
from kestrel.export.c_device import DEVICES
from kestrel.export.c_form import FROM_SOUND, c_form
from kestrel.export.form import Work
from kestrel.export.spec import ExportSpec
from kestrel.frontend.features import Frontend
from kestrel.frontend.post import Post
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.answers import answers, lowered, predict_decoded
from kestrel.lower.graph import input_codes
from kestrel.lower.spotter import FEATURES, feature_scale_of
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.evaluate import predict
from kestrel.models.spotter import KeywordSpotter
from kestrel.settings import to_dict
from kestrel.store.hdf5 import AudioFile, FeatureFile

CLIPS = 66


@pytest.fixture(autouse=True)
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toolchain, "host", staticmethod(lambda: QUICK))


pytestmark = needs_compiler


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
    assert part.figures["c"]["sound"] is None and part.figures["c"]["sanitised_inputs"] == 130 + 40
    assert sorted(part.files) == sorted(str(path.relative_to(folder)) for path in (folder / "c").iterdir())
    assert part.missing and "Sound" in part.missing[0]  # the features are not of a real front end
    subprocess.run(["make", "-s", "-C", folder / "c", "CFLAGS=-O1"], check=True)
    assert given.graph is not None and given.integer is not None
    codes = input_codes(given.data.rows(np.arange(130)), given.graph.tensors[FEATURES])
    done = subprocess.run([folder / "c" / "model", "-"], input=codes.tobytes(), capture_output=True, check=True)
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    np.testing.assert_array_equal([[int(word) for word in row[3].split()] for row in rows], given.integer.logits)
    assert [row[2] for row in rows] == [score_kit.CLASSES[i] for i in given.integer.logits.argmax(axis=1)]


def sound_work(folder: Path) -> Work:
    """A network of a real front end, with the sound of its clips."""
    spec = FrontendSpec(name="test", mel_bands=20, f_min=20.0, f_max=4000.0, coefficients=10)
    rng = np.random.default_rng(2)
    loudness = np.geomspace(20, 8000, CLIPS)[rng.permutation(CLIPS), None]
    samples = (loudness * rng.normal(0, 1, (CLIPS, sound_kit.SAMPLES))).clip(-32768, 32767).astype(np.int16)
    features = Frontend(spec)(torch.from_numpy(samples / 32768).float()).numpy()
    labels = rng.integers(0, len(score_kit.CLASSES), CLIPS)
    folder.mkdir()
    rows: list[tuple[str, np.ndarray]] = [("audio", samples), ("features", features)]
    for kind, values in rows:
        with h5py.File(folder / f"{kind}.h5", "w") as file:
            file.attrs["format"], file.attrs["corpus"], file.attrs["split"] = f"kestrel-{kind}-1", "toy", "test"
            file.attrs["classes"], file.attrs["sample_rate"] = json.dumps(score_kit.CLASSES), 16000
            file.attrs["frontend"] = json.dumps(to_dict(spec))
            file.attrs["protocol"] = json.dumps({"name": "toy", "hash": "ab", "clip_samples": sound_kit.SAMPLES})
            file[kind], file["labels"] = values, labels
            for name in ("utt_id", "speaker"):
                file.create_dataset(name, data=[f"c{row}" for row in range(CLIPS)], dtype=h5py.string_dtype())
    data = FeatureFile(folder / "features.h5")
    torch.manual_seed(1)
    net = BlockLSTM(
        input_size=10,
        classes=len(score_kit.CLASSES),
        hidden=8,
        n_msb=2,
        input_range=64.0,
        noise_train=0.0,
        noise_eval=0.0,
    )
    spotter = KeywordSpotter(Post([], (features.shape[1], 10)), net)
    graph, obstacle = lowered(spotter, feature_scale_of(data), 8)
    assert graph is not None, obstacle
    decoded = predict_decoded(spotter, data, 8, 64)
    return Work(
        spotter=spotter,
        data=data,
        logits=decoded,
        decoded=decoded,
        graph=graph,
        obstacle=obstacle,
        integer=answers(graph, data, data.labels, decoded),
        settings=ExportSpec(),
        batch_size=64,
        protocol={"name": "toy", "hash": "ab"},
        next_pass=lambda: lambda done, total: None,
        audio=AudioFile(folder / "audio.h5"),
    )


def test_sound_devices_and_sections_stand_on_the_card(tmp_path: Path) -> None:
    given = sound_work(tmp_path / "data")
    part = c_form(given, tmp_path)
    figures = part.figures["c"]
    sound, (image, *_) = figures["sound"], figures["images"]
    assert sound["bit_identical_clips"] == CLIPS and sound["bit_identical_extreme_inputs"] == 32
    assert 0 < sound["mean_code_difference"] < 20 and sound["largest_code_difference"] < 400
    assert part.accuracies[FROM_SOUND].value == sound["accuracy"] and not part.missing
    points = sound["difference_points"]
    assert f"{points:+.2f} points against the integer model with float features" in part.text
    assert f"{points:+.2f} points against float features" in part.facts["sound to class"]
    assert f"{CLIPS} clips and on 32 extreme and random clips, sanitizers included" in part.text
    assert image["flash_bytes"] == sum(image["flash"].values()) > 10_000
    assert image["ram_bytes"] == sum(image["ram"].values()) > figures["peak_ram_bytes"] + image["ram"]["stack (bound)"]
    assert f"| flash, all | {image['flash_bytes']:,} |" in part.text and "| ram: stack (bound) |" in part.text
    emulated = {run["device"] for run in figures["emulated"]}
    assert emulated == {device.name for device in DEVICES if device.runs}
    for run in figures["emulated"]:
        assert f"| {run['device']} | {run['clips']} | {run['instructions']:,} |" in part.text


def test_audio_of_other_clips_fails_before_anything_is_written(tmp_path: Path) -> None:
    given = sound_work(tmp_path / "data")
    assert given.audio is not None
    given.audio.labels[:] = (given.audio.labels + 1) % 4
    with pytest.raises(KestrelError, match="holds other clips"):
        c_form(given, tmp_path)
    assert not (tmp_path / "c").exists()


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
