"""The score from sound: fixed-point front end, integer model, class."""

import json

import numpy as np
import pytest
from score_kit import CLASSES, FEATURE_SCALE, IDENTITY, PROTOCOL, PROVENANCE, analog, feature_file, spotter

from kestrel.errors import KestrelError
from kestrel.frontend.extract import extract
from kestrel.frontend.fixed import FixedFrontend
from kestrel.frontend.make import make_frontend
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.sound import SoundAnswers, sound_answers
from kestrel.lower.spotter import FEATURES, feature_scale_of, lower, predict_codes
from kestrel.models.evaluate import Accuracy
from kestrel.score.report import _from_sound
from kestrel.score.run import score
from kestrel.store.hdf5 import AudioFile, AudioWriter, FeatureFile

SPEC = {"name": "toy", "n_fft": 64, "window": 64, "hop": 32, "mel_bands": 6, "center": False}
CLIPS, SAMPLES = 150, 288  # 8 frames
ARGUMENTS = {
    "identity": IDENTITY,
    "split": "test",
    "seed": 3,
    "chip": 0,
    "batch_size": 50,
    "provenance": PROVENANCE,
    "feature_scale": FEATURE_SCALE,
}


def write_audio(path, labels, samples=SAMPLES, sample_rate=16000, seed=0):
    """Noise of all loudnesses."""
    draw = np.random.default_rng(seed)
    audio = draw.normal(0, 1, (len(labels), samples)) * np.geomspace(1, 30000, len(labels))[:, None]
    names = [f"clip{row}" for row in range(len(labels))]
    writer = AudioWriter(
        path,
        labels=labels,
        utt_ids=names,
        speakers=names,
        clip_samples=samples,
        sample_rate=sample_rate,
        classes=CLASSES,
        corpus="toy",
        protocol=PROTOCOL,
        split="test",
    )
    with writer:
        writer.append(audio.clip(-32768, 32767).astype(np.int16))
    return AudioFile(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Packed audio and its float and fixed-point features; labels are the integer model's answers, some of them changed."""
    folder = tmp_path_factory.mktemp("sound")
    unlabelled = write_audio(folder / "raw.h5", np.zeros(CLIPS, np.int64))
    extract(unlabelled, make_frontend(FrontendSpec(**SPEC)), folder / "raw" / "test.h5")
    labels = predict_codes(lower(spotter(), FEATURE_SCALE), FeatureFile(folder / "raw" / "test.h5")).argmax(axis=1)
    labels[::7] = (labels[::7] + 1) % len(CLASSES)
    audio = write_audio(folder / "audio.h5", labels)
    found = {}
    for arithmetic in ("float", "fixed"):
        spec = FrontendSpec(**SPEC, arithmetic=arithmetic)
        extract(audio, make_frontend(spec), folder / arithmetic / "test.h5")
        found[arithmetic] = FeatureFile(folder / arithmetic / "test.h5")
    return audio, found["float"], found["fixed"]


@pytest.fixture(scope="module")
def scored(sound, tmp_path_factory):
    audio, data, _ = sound
    folder = tmp_path_factory.mktemp("exp") / "score"
    return folder, score(spotter(), data, folder, audio=audio, **ARGUMENTS)


def test_every_clip_goes_from_sound_to_class_in_integers(sound, scored):
    audio, data, _ = sound
    folder, result = scored
    graph, front_end = lower(spotter(), FEATURE_SCALE), FixedFrontend(FrontendSpec(**SPEC))
    rows = np.arange(CLIPS)
    made = front_end(audio.rows(rows)).astype(np.int64)
    ratio = round(FEATURE_SCALE / front_end.scale)
    assert ratio == 1 / (front_end.scale / FEATURE_SCALE)
    codes = np.clip(np.rint(made / ratio), -32768, 32767).astype(np.int16)
    right = graph.run(codes)["logits"].argmax(axis=1) == data.labels
    assert result["fixed_frontend_accuracy"] == right.mean() and 0.5 < right.mean() < 1
    float_codes = np.rint(data.rows(rows).astype(np.float64) / FEATURE_SCALE)
    difference = np.abs(codes - float_codes)
    compared = result["fixed_frontend"]
    assert compared["n"] == CLIPS and compared["code_step"] == FEATURE_SCALE
    assert compared["max_code_difference"] == difference.max() > 0
    assert compared["mean_code_difference"] == pytest.approx(difference.mean(), abs=1e-6) and difference.mean() < 3
    points = 100 * (result["fixed_frontend_accuracy"] - result["integer_accuracy"])
    assert compared["difference_points"] == pytest.approx(points, abs=1e-4)
    low, high = result["fixed_frontend_ci95"]
    assert low < right.mean() < high
    assert json.loads((folder / "result.json").read_text()) == result


def test_the_report_has_one_line_about_it(scored):
    folder, result = scored
    section = (folder / "report.md").read_text().split("## Integer model")[1].split("## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("From sound to class")]
    assert f"{100 * result['fixed_frontend_accuracy']:.2f} %" in line
    assert f"at most {result['fixed_frontend']['max_code_difference']}" in line


def test_fixed_point_features_are_one_figure(sound, tmp_path):
    audio, data, fixed = sound
    front_end = FixedFrontend(FrontendSpec(**SPEC))
    assert feature_scale_of(fixed) == front_end.scale != feature_scale_of(data)
    for given in (audio, None):
        result = score(
            spotter(), fixed, tmp_path / "score", audio=given, **{**ARGUMENTS, "feature_scale": feature_scale_of(fixed)}
        )
        assert result["fixed_frontend_accuracy"] == result["integer_accuracy"]
        assert "nothing" in result["fixed_frontend"]["compared_with"] and result["fixed_frontend"]["n"] == CLIPS
        assert "max_code_difference" not in result["fixed_frontend"]
        text = (tmp_path / "score" / "report.md").read_text()
        assert "trained on the features of the fixed-point front end" in text
    # The model takes the front end's codes as they are.
    codes, rows = [], np.arange(CLIPS)
    graph = lower(spotter(), front_end.scale)
    run, graph.run = graph.run, lambda given: codes.append(given) or run(given)
    predict_codes(graph, fixed)
    assert np.array_equal(np.concatenate(codes), front_end(audio.rows(rows)))


def test_features_made_elsewhere_have_no_sound(tmp_path):
    result = score(spotter(), feature_file(tmp_path / "features"), tmp_path / "score", **ARGUMENTS)
    assert "packed audio" in result["fixed_frontend_obstacle"] and "fixed_frontend_accuracy" not in result
    text = (tmp_path / "score" / "report.md").read_text()
    assert "Not run from sound with the fixed-point front end: the features come without packed audio" in text


def test_without_an_integer_model_there_is_no_sound_either(sound, tmp_path):
    audio, data, _ = sound
    result = score(analog(), data, tmp_path / "score", audio=audio, **ARGUMENTS)
    assert result["fixed_frontend_obstacle"] == "the network was not scored in integers"


def test_other_audio_and_other_front_ends_are_refused(sound, tmp_path):
    audio, data, _ = sound
    graph = lower(spotter(), FEATURE_SCALE)
    logits = predict_codes(graph, data)
    for words, given in (
        ("other clips", write_audio(tmp_path / "few.h5", data.labels[:-1])),
        ("other clips", write_audio(tmp_path / "labels.h5", (data.labels + 1) % len(CLASSES))),
        ("samples per second", write_audio(tmp_path / "rate.h5", data.labels, sample_rate=8000)),
        ("makes features", write_audio(tmp_path / "long.h5", data.labels, samples=2 * SAMPLES)),
        ("too short", write_audio(tmp_path / "short.h5", data.labels, samples=60)),
    ):
        with pytest.raises(KestrelError, match=words) as caught:
            sound_answers(graph, data, logits, given)
        assert "\n" not in str(caught.value)
    extract(audio, make_frontend(FrontendSpec(**SPEC, power=1.5)), tmp_path / "test.h5")
    odd = FeatureFile(tmp_path / "test.h5")
    with pytest.raises(KestrelError, match="power 1.5 has no fixed-point form"):
        sound_answers(graph, odd, logits, audio)
    foreign = feature_file(tmp_path / "foreign", CLIPS)
    foreign.frontend = {"name": "theirs", "secret": 1}
    with pytest.raises(KestrelError, match="secret"):
        sound_answers(graph, foreign, logits, audio)


def test_a_large_difference_is_said():
    class Shown:
        sound = SoundAnswers(Accuracy(40, 50), 45, -2.0, 7, 0.25, 0.125)

    text = _from_sound(Shown)
    assert "-2.00 points" in text and "more than 0.3 points; one clip is 2.00 points" in text
    assert "at most 7 and by 0.250 codes" in text
    Shown.sound = SoundAnswers(Accuracy(42, 50), 50, 0.0, 1, 0.01, 0.125)
    assert "more than" not in _from_sound(Shown)


def test_progress_covers_the_pass_over_the_sound(sound, tmp_path):
    audio, data, _ = sound
    calls = []
    score(spotter(), data, tmp_path / "score", audio=audio, progress=lambda *n: calls.append(n), **ARGUMENTS)
    assert calls[-1] == (4 * CLIPS, 4 * CLIPS)
    assert lower(spotter(), FEATURE_SCALE).tensors[FEATURES].shape == (8, 6)
