import csv
import json

import numpy as np
import pytest
from matplotlib import image
from score_kit import (
    CLASSES,
    FEATURE_SCALE,
    IDENTITY,
    PROVENANCE,
    analog,
    feature_file,
    metrics_csv,
    spotter,
    untrained,
)

from kestrel.errors import KestrelError
from kestrel.models.evaluate import predict
from kestrel.score.run import score

ARGUMENTS = {
    "identity": IDENTITY,
    "split": "test",
    "seed": 3,
    "chip": 0,
    "batch_size": 50,
    "provenance": PROVENANCE,
    "feature_scale": FEATURE_SCALE,
}
REQUIRED = {
    *("recipe", "variant", "tag", "seed", "protocol", "split", "n", "accuracy", "ci95", "per_class", "parameters"),
    *(
        "macs",
        "weight_bytes",
        "peak_ram_bytes",
        "config_hash",
        "checkpoint_sha256",
        "git_commit",
        "git_dirty",
        "torch",
        "device",
    ),
    *("train_seconds", "command"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def scored(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exp")
    stages = [("pretrain", metrics_csv(folder / "pretrain.csv")), ("retrain", metrics_csv(folder / "re.csv", 5, 0.7))]
    result = score(spotter(), data, folder / "score", metrics_csv=stages, **ARGUMENTS)
    return folder / "score", result


def test_result_has_every_required_key_and_is_what_was_returned(scored):
    folder, result = scored
    assert json.loads((folder / "result.json").read_text()) == result
    assert set(result) >= REQUIRED
    assert result["protocol"] == {"name": "toy-4", "hash": "ab" * 32}
    assert result["n"] == 130 and 0.5 < result["ci95"][0] <= result["accuracy"] <= result["ci95"][1] <= 1
    assert {path.name for path in folder.iterdir()} == {
        "result.json",
        "scores.csv",
        "confusion.png",
        "curves.png",
        "report.md",
    }


def test_scores_repeat_the_accuracy_and_the_classes(scored, data):
    folder, result = scored
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["utt_id", "position", "label", "predicted", "correct", *(f"score_{n}" for n in CLASSES)]
    assert [row["utt_id"] for row in rows] == data.utt_ids
    assert [int(row["position"]) for row in rows] == list(range(130))
    assert [CLASSES.index(row["label"]) for row in rows] == data.labels.tolist()
    assert sum(int(row["correct"]) for row in rows) / 130 == result["accuracy"]
    scores = np.array([[float(row[f"score_{name}"]) for name in CLASSES] for row in rows])
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=3e-6)
    assert [CLASSES[best] for best in scores.argmax(axis=1)] == [row["predicted"] for row in rows]
    assert all(len(row["score_yes"]) == len("0.123456") for row in rows)
    right = {name: sum(int(row["correct"]) for row in rows if row["label"] == name) for name in CLASSES}
    assert {name: figures["correct"] for name, figures in result["per_class"].items()} == right


def test_curves_show_both_stages(scored):
    width = image.imread(scored[0] / "curves.png").shape[1]
    assert width > 1000  # one stage is 768 pixels wide


def test_accuracy_is_that_of_the_network_alone(scored, data):
    logits = predict(spotter(), data, 7)
    assert scored[1]["accuracy"] == (logits.argmax(axis=1) == data.labels).mean()


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_scoring_twice_gives_identical_files(tmp_path, data, noise):
    stages = [("pretrain", metrics_csv(tmp_path / "metrics.csv"))]
    for name in ("a", "b"):
        score(spotter(noise_eval=noise), data, tmp_path / name, metrics_csv=stages, **ARGUMENTS)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_another_chip_draws_other_noise(tmp_path, data):
    texts = []
    for chip in (0, 1):
        score(spotter(noise_eval=0.2), data, tmp_path / "score", **{**ARGUMENTS, "chip": chip})
        texts.append((tmp_path / "score" / "scores.csv").read_text())
    assert texts[0] != texts[1]


def test_report_shows_all_of_it(scored):
    folder, result = scored
    text = (folder / "report.md").read_text()
    correct = sum(figures["correct"] for figures in result["per_class"].values())
    low, high = result["ci95"]
    for part in (
        f"{100 * result['accuracy']:.2f} % ({correct} of 130 clips)",
        f"{100 * low:.2f} % to {100 * high:.2f} %",
        "`toy-4`, 4 classes, corpus `toy`, front end `toy`",
        "ab" * 32,
        "| clip_samples | 16000 |",
        "| unknown_percentage | none |",
        "| speaker is in the test set | 7 |",
        "* evaluation silence = noise windows fixed by hash",
        "| all | 1,002 | 30 |",
        "![confusion matrix](confusion.png)",
        "![curves](curves.png)",
        "| lstm.w_hh |",
        f"{result['macs']:,} at input 4 x 12",
        "Both agree.",
        f"{result['weight_bytes']:,} bytes",
        PROVENANCE["command"],
        PROVENANCE["checkpoint_sha256"],
        "of 130" if correct == 130 else "was heard as",
    ):
        assert part in text, part
    assert "/home" not in text
    for name, figures in result["per_class"].items():
        assert f"| {name} | {figures['n']} | {figures['correct']} |" in text


def test_without_training_metrics_there_are_no_curves(tmp_path, data):
    score(spotter(), data, tmp_path / "score", **ARGUMENTS)
    assert not (tmp_path / "score" / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "score" / "report.md").read_text()


def test_a_perfect_score_has_no_confusions(tmp_path):
    easy = feature_file(tmp_path, 40, noise=0.1)
    result = score(spotter(), easy, tmp_path / "score", **ARGUMENTS)
    assert result["accuracy"] == 1 and result["ci95"][1] == 1 and result["ci95"][0] < 0.95
    assert "Every answer is right." in (tmp_path / "score" / "report.md").read_text()


def test_further_entries_and_unknown_provenance(tmp_path, data):
    arguments = {**ARGUMENTS, "provenance": {"command": "./run.sh"}}
    result = score(spotter(), data, tmp_path / "score", extra={"energy_uj": 0.5}, **arguments)
    assert result["energy_uj"] == 0.5 and result["git_commit"] is None
    assert "not a git checkout" in (tmp_path / "score" / "report.md").read_text()


def test_bits_of_analog_weights_change_the_bytes(tmp_path, data):
    sizes = [score(spotter(), data, tmp_path / "s", analog_bits=bits, **ARGUMENTS)["weight_bytes"] for bits in (4, 8)]
    assert sizes[0] < 0.6 * sizes[1]


def _no_traces(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["test.h5"]


def test_other_classes_are_refused(tmp_path):
    data = feature_file(tmp_path, classes=["yes", "no", "stop", "silence"])
    with pytest.raises(KestrelError, match="features of its own protocol"):
        score(spotter(), data, tmp_path / "score", **ARGUMENTS)
    _no_traces(tmp_path)


def test_a_network_with_other_outputs_is_refused(tmp_path):
    data, model = feature_file(tmp_path), untrained(classes=3)
    model.post.load_state_dict(spotter().post.state_dict())
    with pytest.raises(KestrelError, match="3 outputs for 4 classes"):
        score(model, data, tmp_path / "score", **ARGUMENTS)
    _no_traces(tmp_path)


def test_a_failure_while_writing_leaves_the_old_folder(tmp_path):
    data = feature_file(tmp_path)
    score(spotter(), data, tmp_path / "score", **ARGUMENTS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "score").iterdir()}
    with pytest.raises(KestrelError, match="cannot read"):
        score(spotter(), data, tmp_path / "score", metrics_csv=[("pretrain", tmp_path / "absent.csv")], **ARGUMENTS)
    assert {path.name: path.read_bytes() for path in (tmp_path / "score").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["score", "test.h5"]


def test_progress_reaches_the_number_of_clips(tmp_path, data):
    seen = []
    score(spotter(), data, tmp_path / "score", progress=lambda done, total: seen.append((done, total)), **ARGUMENTS)
    assert seen[-1] == (390, 390) and seen == sorted(seen) and {total for _, total in seen} == {390}


def test_progress_without_an_integer_model(tmp_path, data):
    seen = []
    score(analog(), data, tmp_path / "score", progress=lambda done, total: seen.append((done, total)), **ARGUMENTS)
    assert seen == [(50, 130), (100, 130), (130, 130)]
