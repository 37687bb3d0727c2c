"""Sound through the C program: features and logits against Python, clip at once and block by block."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import sound_kit
from cc_kit import GCC, QUICK, needs_compiler

from kestrel.errors import KestrelError
from kestrel.export.c_check import Programs, Toolchain, logits_of
from kestrel.export.c_files import write_c
from kestrel.export.c_model import generate
from kestrel.export.c_sound import check_clips, prove_extremes, prove_sound, sound_extremes
from kestrel.lower.graph import input_codes
from kestrel.store.hdf5 import AudioFile, FeatureFile

pytestmark = needs_compiler
CHECKED = Toolchain(GCC, "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all", ("VECTORS=",))
CLIPS = 70


def write(path: Path, name: str, kind: str, values: np.ndarray, labels: np.ndarray, first: str = "a") -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["format"], file.attrs["corpus"], file.attrs["split"] = f"kestrel-{kind}-1", "toy", "test"
        file.attrs["classes"], file.attrs["sample_rate"] = json.dumps(["yes", "no", "up", "down"]), 16000
        file.attrs["frontend"] = json.dumps({"name": "toy"})
        file.attrs["protocol"] = json.dumps({"name": "toy", "hash": "ab", "clip_samples": sound_kit.SAMPLES})
        file[name], file["labels"] = values, labels
        ids = [first, *(f"clip{row}" for row in range(1, len(values)))]
        file.create_dataset("utt_id", data=ids, dtype=h5py.string_dtype())
        file.create_dataset("speaker", data=["s"] * len(ids), dtype=h5py.string_dtype())
    return path


def test_all_clips_are_compared_and_the_figures_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    graph, front_end, wav = sound_kit.sound_model("frames", shift=2, middle=True)
    rng = np.random.default_rng(1)
    samples = rng.normal(0, 3000, (CLIPS, sound_kit.SAMPLES)).clip(-32768, 32767).astype(np.int16)
    labels = rng.integers(0, 4, CLIPS)
    scale = graph.tensors["features"].scale
    assert scale is not None
    real = front_end.dequantise(front_end(samples)) + rng.normal(
        0, 20 * scale, (CLIPS, *graph.tensors["features"].shape)
    )
    write(tmp_path / "audio.h5", "audio", "audio", samples, labels)
    write(tmp_path / "test.h5", "features", "features", real.astype(np.float32), labels)
    seen: list[int] = []
    with AudioFile(tmp_path / "audio.h5") as audio, FeatureFile(tmp_path / "test.h5") as data:
        float_codes = input_codes(data.rows(np.arange(CLIPS)), graph.tensors["features"])
        answers = logits_of(graph, float_codes)
        model = sound_kit.python(graph, front_end, wav)
        with Programs(generate(graph, (), wav), graph, QUICK) as programs:
            found = prove_sound(programs, model, graph, audio, data, answers, seen.append)
    assert found.clips == CLIPS and seen[-1] == CLIPS
    made = np.rint(front_end(samples).astype(float) / 4).astype(np.int64)  # half to even
    difference = np.abs(made - float_codes)
    assert found.largest == difference.max() > 1
    assert found.mean == pytest.approx(difference.mean())
    heard, reference = logits_of(graph, made).argmax(1), answers.argmax(1)
    assert found.right.correct == (heard == labels).sum()
    assert found.points == pytest.approx(100 * ((heard == labels).mean() - (reference == labels).mean()))
    assert found.others == (heard != reference).sum() > 0
    assert found.step == scale


def test_other_clips_are_refused(tmp_path: Path) -> None:
    samples, labels = np.zeros((3, sound_kit.SAMPLES), np.int16), np.array([0, 1, 2])
    features = FeatureFile(write(tmp_path / "test.h5", "features", "features", np.zeros((3, 4, 5), np.float32), labels))
    with AudioFile(write(tmp_path / "same.h5", "audio", "audio", samples, labels)) as audio:
        check_clips(audio, features, sound_kit.SAMPLES)
    cases = {
        "ids": write(tmp_path / "ids.h5", "audio", "audio", samples, labels, first="b"),
        "labels": write(tmp_path / "labels.h5", "audio", "audio", samples, labels[::-1]),
        "fewer": write(tmp_path / "fewer.h5", "audio", "audio", samples[:2], labels[:2]),
        "length": write(tmp_path / "length.h5", "audio", "audio", samples[:, 1:], labels),
    }
    for path in cases.values():
        with (
            AudioFile(path) as audio,
            pytest.raises(KestrelError, match="holds other clips than .* run stage 2") as caught,
        ):
            check_clips(audio, features, sound_kit.SAMPLES)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", sound_kit.KINDS)
def test_extreme_sound_gives_the_bits_of_python_block_by_block_too(kind: str, tmp_path: Path) -> None:
    graph, front_end, wav = sound_kit.sound_model(kind)
    model, expected = generate(graph, (), wav), sound_kit.python(graph, front_end, wav)
    assert model.streaming == ("frames" in kind)
    wild = sound_extremes(sound_kit.SAMPLES)[:20]
    assert len(np.unique(wild, axis=0)) == len(wild)
    write_c(model, tmp_path)
    (tmp_path / "main.c").write_text(
        """#include <stdio.h>
#include "kestrel_frontend.h"
#include "model.h"
#include "sound.h"
static int16_t clip[KESTREL_MODEL_CLIP_SAMPLES], features[KESTREL_MODEL_FEATURES];
static int32_t logits[KESTREL_MODEL_LOGITS];
static void show(void) {
    for (int i = 0; i < KESTREL_MODEL_LOGITS; i++) {
        printf("%d ", (int)logits[i]);
    }
}
int main(void) {
    while (fread(clip, sizeof clip, 1, stdin) == 1) {
        kestrel_sound_start();
        for (int32_t at = 0; at < KESTREL_MODEL_CLIP_SAMPLES; at += KFE_HOP) {
            const int32_t left = KESTREL_MODEL_CLIP_SAMPLES - at;
            kestrel_sound_push(clip + at, left < KFE_HOP ? left : KFE_HOP);
        }
        kestrel_sound_finish(logits);
        show();
        kestrel_sound_features(clip, features);
        kestrel_model_run(features, logits);
        show();
    }
    return 0;
}
"""
    )
    (tmp_path / "wav.c").write_text("typedef int nothing;\n")
    program = CHECKED.build(tmp_path, "model")
    done = subprocess.run([program], input=wild.astype("<i2").tobytes(), capture_output=True, check=True)
    found = np.array([int(word) for word in done.stdout.split()]).reshape(len(wild), 2, -1)
    wanted = expected.batch(wild).logits
    assert len(np.unique(wanted)) > 40
    for way in range(2):
        np.testing.assert_array_equal(found[:, way], wanted)


def test_a_damaged_front_end_is_named_with_its_place() -> None:
    graph, front_end, wav = sound_kit.sound_model("clip")
    line = "rescale(features, KESTREL_MODEL_FEATURES);\n}"

    def change(folder: Path) -> None:
        text = (folder / "sound.c").read_text()
        assert line in text
        (folder / "sound.c").write_text(text.replace(line, f"features[23] ^= samples[5] != 0;\n    {line}"))

    model = sound_kit.python(graph, front_end, wav)
    with (
        Programs(generate(graph, (), wav), graph, QUICK, change) as programs,
        pytest.raises(
            KestrelError, match=r"front end in C differs .* in input \d+: .*features\[2, 3\]: expected"
        ) as caught,
    ):
        prove_extremes(programs, model, sound_kit.SAMPLES)
    assert "\n" not in str(caught.value)
