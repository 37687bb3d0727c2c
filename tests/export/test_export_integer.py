import json

import numpy as np
import pytest
from score_kit import FEATURE_SCALE, IDENTITY, PROVENANCE, analog, feature_file, spotter

from kestrel.export.c_pack import pack_rows
from kestrel.export.integer import constants, packed, write_constants
from kestrel.export.run import export
from kestrel.export.spec import ExportSpec
from kestrel.lower.files import load
from kestrel.lower.graph import IntegerGraph, input_codes
from kestrel.lower.ops import Lookup, MatMul
from kestrel.lower.spotter import lower, predict_codes
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale

ARGUMENTS = {
    "identity": IDENTITY,
    "split": "test",
    "seed": 3,
    "chip": 0,
    "batch_size": 50,
    "provenance": PROVENANCE,
    "feature_scale": FEATURE_SCALE,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exp") / "export"
    settings = ExportSpec(onnx=False, c=False, vectors=0)
    return folder, export(spotter(), data, folder, settings=settings, **ARGUMENTS)


def test_the_files_are_the_model_that_was_scored(exported, data):
    folder, summary = exported
    graph = load(folder / "integer")
    codes = input_codes(data.rows(np.arange(130)), graph.tensors["features"])
    logits = graph.run(codes)["logits"]
    np.testing.assert_array_equal(logits, predict_codes(lower(spotter(), FEATURE_SCALE), data))
    assert summary["integer_accuracy"] == (logits.argmax(axis=1) == data.labels).mean()
    low, high = (100 * bound for bound in summary["integer_ci95"])
    row = f"| {100 * summary['integer_accuracy']:.2f} % | {low:.2f}-{high:.2f} % |"
    assert f"| integer model (integer/), no float {row}" in (folder / "card.md").read_text()


def test_sections_are_those_of_the_file(exported):
    folder, summary = exported
    content, end = (folder / "integer" / "constants.bin").read_bytes(), 0
    for section in summary["integer_sections"]:
        assert section["offset"] == end
        end += section["bytes"]
    assert end == len(content)
    graph = load(folder / "integer")
    by_name = {section["name"]: section for section in summary["integer_sections"]}
    weights = np.concatenate([c.values.reshape(-1) for _, name, c in constants(graph) if name == "weight"])
    place = by_name["weights"]
    stored = np.frombuffer(content, np.int8, place["values"], place["offset"])
    np.testing.assert_array_equal(stored, weights)
    assert f"| weights | {len(weights):,} | 0 | {len(weights):,} |" in (folder / "card.md").read_text()


def test_a_network_without_integer_form_says_so_on_the_card(tmp_path, data):
    summary = export(analog(), data, tmp_path / "export", settings=ExportSpec(onnx=False, c=True), **ARGUMENTS)
    text = (tmp_path / "export" / "card.md").read_text()
    assert "integer_accuracy" not in summary
    assert not (tmp_path / "export" / "integer").exists() and not (tmp_path / "export" / "vectors").exists()
    for title in ("## Integer model", "## C program", "## Test vectors"):
        assert "Left out: " in text.split(title)[1].split("##")[0]
    assert "model.quant_inp" in text.split("## Not included")[1].split("##")[0]
    assert json.loads((tmp_path / "export" / "export.json").read_text()) == summary


def test_shared_constants_are_stored_once_and_few_bits_packed(tmp_path):
    weight = Constant(np.array([[1, -2, 3], [-4, 0, 3]]), "int3")
    table = Constant.of(np.arange(-8, 8))
    graph = IntegerGraph()
    x = graph.input("x", Tensor((3,), -8, 7))
    a = graph.add(Lookup(inputs=(x,), outputs=("a",), table=table, first=-8))
    b = graph.add(Lookup(inputs=(a,), outputs=("b",), table=table, first=-8))
    rescale = Rescale((3, 5), 2, -8, 7, (1, -1))
    graph.add(MatMul(inputs=(b,), outputs=("c",), weight=weight, rescale=rescale))
    found = {section.name: section for section in write_constants(graph, tmp_path / "constants.bin")}
    content = (tmp_path / "constants.bin").read_bytes()
    assert (found["tables"].values, found["tables"].bytes) == (16, 16)
    assert (found["weights"].values, found["weights"].bytes) == (6, 4)  # nine bits a row, from whole bytes on
    numbers = found["multipliers and offsets"]
    assert np.frombuffer(content[numbers.offset :], "<i4").tolist() == [3, 5, 1, -1]
    assert packed(weight) == pack_rows(weight.values, "int3").array.tobytes() and packed(weight) in content
