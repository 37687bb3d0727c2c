import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from score_kit import CLASSES, FRAMES, WIDTH, feature_file, spotter

from kestrel.errors import KestrelError
from kestrel.export.onnx import Agreement, compare, write_onnx
from kestrel.models.evaluate import predict
from kestrel.models.inventory import noise_off

NOTES = {"classes": CLASSES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(spotter(), (FRAMES, WIDTH), path, NOTES)
    return path


@pytest.mark.parametrize("batch_size", [1, 50, 1000])
def test_any_number_of_clips_gives_pytorchs_answers(model_file, data, batch_size):
    agreement = compare(model_file, predict(spotter(), data, 64), data, batch_size)
    assert agreement.n == 130 and agreement.other_answers == 0
    assert agreement.largest_difference < 1e-4


def test_device_noise_is_not_in_the_model(tmp_path, data):
    noisy = spotter(noise_eval=0.3)
    write_onnx(noisy, (FRAMES, WIDTH), tmp_path / "model.onnx", NOTES)
    assert noisy.net.noise_eval == 0.3
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node}
    assert not {kind for kind in kinds if kind.startswith("Random")}
    with noise_off(noisy.net):
        reference = predict(noisy, data, 64)
    assert compare(tmp_path / "model.onnx", reference, data, 64).other_answers == 0


def test_the_model_names_its_input_output_and_classes(model_file):
    model = onnx.load(str(model_file))
    (features,), (logits,) = model.graph.input, model.graph.output
    shape = features.type.tensor_type.shape.dim
    assert (features.name, logits.name) == ("features", "logits")
    assert shape[0].dim_param == "clips" and [shape[1].dim_value, shape[2].dim_value] == [FRAMES, WIDTH]
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["classes"]) == CLASSES


def test_the_bytes_are_reproducible_and_name_no_path(model_file, tmp_path):
    other = tmp_path / "another" / "name.onnx"
    other.parent.mkdir()
    write_onnx(spotter(), (FRAMES, WIDTH), other, NOTES)
    content = other.read_bytes()
    assert content == model_file.read_bytes()
    for trace in (b".py", b"site-packages", str(tmp_path).encode(), str(Path(__file__).parents[2]).encode()):
        assert trace not in content


def test_export_leaves_the_spotter_as_it_was(tmp_path):
    model = spotter()
    model.net.set_phase("retrain")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_onnx(model, (FRAMES, WIDTH), tmp_path / "model.onnx", NOTES)
    assert model.net.phase == "retrain" and model.net.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_answers_otherwise_fails_in_one_line(model_file, data):
    reference = predict(spotter(), data, 64)
    swapped = reference[:, ::-1].copy()
    with pytest.raises(KestrelError, match=r"answers \d+ of 130 clips otherwise .*export.onnx=false") as raised:
        compare(model_file, swapped, data, 64)
    assert "\n" not in str(raised.value)


def test_half_a_per_cent_of_other_answers_is_the_limit(model_file, tmp_path):
    data = feature_file(tmp_path, 400)
    reference = predict(spotter(), data, 100)
    for row in (0, 1):  # 2 of 400 = 0.5 %
        reference[row] = np.roll(reference[row], 1)
    agreement = compare(model_file, reference, data, 100)
    assert agreement == Agreement(400, agreement.largest_difference, 2) and agreement.largest_difference > 0.1
    reference[2] = np.roll(reference[2], 1)
    with pytest.raises(KestrelError, match="answers 3 of 400"):
        compare(model_file, reference, data, 100)


def test_a_network_without_onnx_form_fails_in_one_line(tmp_path):
    class Histogram(torch.nn.Module):
        def forward(self, x):
            return torch.histc(x, 4).expand(len(x), 4)

    model = spotter()
    model.net.forward = Histogram().forward
    with pytest.raises(KestrelError, match=r"no ONNX form .*export.onnx=false") as raised:
        write_onnx(model, (FRAMES, WIDTH), tmp_path / "model.onnx", NOTES)
    assert "\n" not in str(raised.value)
