import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_kit import CLASSES, FEATURE_SCALE, feature_file, spotter

from kestrel.export import vectors
from kestrel.export.vectors import Vector, write_vectors
from kestrel.lower.graph import IntegerGraph, Program, Scan, State, input_codes
from kestrel.lower.ops import AddRequantise, MatMul, Requantise, SumPool, Window
from kestrel.lower.spotter import lower
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale

CLIPS = [{"folder": "clip0", "utt_id": "a", "class": "yes"}, {"folder": "clip1", "utt_id": "b", "class": "no"}]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features")).rows(np.arange(2))


@pytest.fixture(scope="module")
def written(features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    graph = lower(spotter(), FEATURE_SCALE)
    write_vectors(graph, input_codes(features, graph.tensors["features"]), CLIPS, folder)
    return folder


def parse(path, entry):
    """A text file by the rules of README.md alone."""
    bits = entry["bits"]
    lines = path.read_text().splitlines()
    assert all(len(line) == -(-bits // 4) for line in lines)
    fields = [int(line, 16) for line in lines]
    assert all(field < 1 << bits for field in fields)
    values = np.array([field - (1 << bits) if field >> (bits - 1) else field for field in fields])
    return values.reshape(entry["shape"])


def rounding_shift(x, shift):
    """docs/integer.md."""
    return x if shift == 0 else (x + (1 << (shift - 1)) - 1 + ((x >> shift) & 1)) >> shift


@pytest.mark.parametrize("clip", ["clip0", "clip1"])
def test_every_product_can_be_recomputed_from_the_text_files_alone(written, clip):
    index = json.loads((written / "index.json").read_text())

    def tensor(name):
        return parse(written / clip / index["tensors"][name]["file"], index["tensors"][name])

    def constant(name):
        return parse(written / "constants" / index["constants"][name]["file"], index["constants"][name])

    products = [op for op in index["ops"] if op["type"] == "MatMul"]
    assert len(products) == 6
    peaks = []
    for op in products:
        (x,), (y,) = op["inputs"], op["outputs"]
        acc = tensor(x) @ constant(f"{y}.weight").T
        np.testing.assert_array_equal(tensor(f"{y}.acc"), acc)
        product = acc * constant(f"{y}.multipliers") + constant(f"{y}.offsets")
        rescale = op["rescale"]
        rounded = rounding_shift(product, rescale["shift"]).clip(rescale["low"], rescale["high"])
        np.testing.assert_array_equal(tensor(y), rounded)
        peaks.append(np.abs(rounded).max())
    assert max(peaks) > 7


def test_sums_and_states_follow_from_the_files(written):
    """c' of the first two steps: kept + new with one rounding, and the state of a step is what the one before it made."""
    index, arrays = json.loads((written / "index.json").read_text()), np.load(written / "vectors.npz")
    op = next(op for op in index["ops"] if op["outputs"] == ["block1.c.next"])
    m = arrays["block1.c.next.multipliers"].astype(np.int64)
    total = sum(arrays[name].astype(np.int64) * factor for name, factor in zip(op["inputs"], m, strict=True))
    expected = rounding_shift(total, op["shift"]).clip(op["low"], op["high"])
    np.testing.assert_array_equal(arrays["block1.c.next"], expected)
    np.testing.assert_array_equal(arrays["block1.c.next.acc"], total)
    assert not arrays["block1.c"][:, 0].any() and arrays["block1.c"].any()
    np.testing.assert_array_equal(arrays["block1.c"][:, 1:], arrays["block1.c.next"][:, :-1])


def test_text_and_arrays_hold_the_same(written):
    index, arrays = json.loads((written / "index.json").read_text()), np.load(written / "vectors.npz")
    assert set(arrays) == {*index["tensors"], *index["constants"]}
    for name, entry in index["constants"].items():
        np.testing.assert_array_equal(arrays[name], parse(written / "constants" / entry["file"], entry))
    for name, entry in index["tensors"].items():
        assert arrays[name].dtype.itemsize * 8 == entry["bits"], name
        for row in range(2):
            np.testing.assert_array_equal(arrays[name][row], parse(written / f"clip{row}" / entry["file"], entry))


def test_tensors_outside_the_loop_are_those_of_the_whole_clip(written, features):
    graph, arrays = lower(spotter(), FEATURE_SCALE), np.load(written / "vectors.npz")
    codes = input_codes(features, graph.tensors["features"])
    out = graph.run(codes)
    np.testing.assert_array_equal(arrays["logits"], out["logits"])
    np.testing.assert_array_equal(arrays["features"], codes)
    assert int(arrays["class"][0, 0]) < len(CLASSES)


def test_the_index_lists_every_text_file_with_its_digest(written):
    files = json.loads((written / "index.json").read_text())["files"]
    assert set(files) == {path.relative_to(written).as_posix() for path in written.rglob("*.hex")}
    for path, digest in files.items():
        assert hashlib.sha256((written / path).read_bytes()).hexdigest() == digest


def test_the_readme_example_holds(written):
    """The line of code that it shows stands in the file that it names."""
    text = (written / "README.md").read_text()
    assert '$readmemh("constants/block0.p1.weight.hex", w)' in text and "reg signed [7:0] w [0:383];" in text
    first = (written / "constants" / "block0.p1.weight.hex").read_text().splitlines()[0]
    assert f"`{first}`, is {np.load(written / 'vectors.npz')['block0.p1.weight'][0, 0]})" in text


def test_the_same_model_gives_the_same_bytes(written, features, tmp_path):
    graph = lower(spotter(), FEATURE_SCALE)
    write_vectors(graph, input_codes(features, graph.tensors["features"]), CLIPS, tmp_path)
    for path in (path for path in written.rglob("*") if path.is_file()):
        assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes()


def _scan_graph(width, length=6):
    body = Program()
    body.input("x", Tensor((width,), -8, 7))
    body.input("h", Tensor((width,), -8, 7))
    add = {"multipliers": (1, 1), "shift": 1, "low": -8, "high": 7}
    body.add(AddRequantise(inputs=("x", "h"), outputs=("h next",), **add))
    graph = IntegerGraph()
    graph.input("features", Tensor((length, width), -8, 7))
    state = State("h", "h next", Tensor((width,), -8, 7), Constant.of(np.arange(width) % 5))
    scan = Scan(inputs=("features",), outputs=("h:last",), body=body, steps=("x",), states=(state,), last=("h",))
    graph.output(graph.add(scan))
    return graph


def test_names_become_file_names_and_states_keep_their_start(tmp_path):
    graph = _scan_graph(3)
    codes = np.random.default_rng(0).integers(-8, 8, (1, 6, 3))
    index = write_vectors(graph, codes, CLIPS[:1], tmp_path)
    assert (
        index["steps"] == 4
        and (tmp_path / "clip0" / "h_next.hex").exists()
        and (tmp_path / "clip0" / "h_last.hex").exists()
    )
    arrays = np.load(tmp_path / "vectors.npz")
    assert arrays["h.initial"].tolist() == [0, 1, 2] and arrays["h"][0, 0].tolist() == [0, 1, 2]
    assert arrays["x"].shape == (1, 4, 3) and arrays["h:last"].shape == (1, 3)


def test_sums_of_products_with_multipliers_have_64_bits(tmp_path):
    graph = IntegerGraph()
    x = graph.input("features", Tensor((2,), -(1 << 15), (1 << 15) - 1))
    add = {"multipliers": (1 << 30, -(1 << 30)), "shift": 40, "low": -128, "high": 127}
    y = graph.add(Requantise(inputs=(x,), outputs=("y",), rescale=Rescale((-1,), 0, -(1 << 15), (1 << 15) - 1)))
    graph.add(AddRequantise(inputs=(x, y), outputs=("sum",), **add))
    index = write_vectors(graph, np.array([[-30000, 5]]), CLIPS[:1], tmp_path)
    assert (tmp_path / "clip0" / "sum.acc.hex").read_text() == "ffffc56800000000\n0000000280000000\n"
    assert (tmp_path / "clip0" / "sum.hex").read_text() == "c5\n00\n"
    assert index["tensors"]["sum.acc"]["bits"] == 64
    arrays = np.load(tmp_path / "vectors.npz")
    assert arrays["sum.acc"].dtype == np.int64 and arrays["sum.acc"].tolist() == [[-60000 << 30, 10 << 30]]


def test_large_steps_are_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "LARGEST_TEXT", 500)
    index = write_vectors(_scan_graph(12), np.zeros((1, 6, 12), np.int64), CLIPS[:1], tmp_path)
    assert index["steps"] == 1


def test_names_that_fall_together_get_files_of_their_own():
    stems = vectors._stems(["a b", "a:b", "a_b", "A_b", "c"])
    assert len({stem.lower() for stem in stems.values()}) == 5 and stems["c"] == "c"


@given(st.integers(2, 64), st.data())
def test_hex_is_twos_complement_of_the_stored_bits(bits, draw):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    values = np.array(draw.draw(st.lists(st.integers(low, high), min_size=1, max_size=8)))
    lines = Vector("x", values, bits).lines(values).splitlines()
    for line, value in zip(lines, values, strict=True):
        assert len(line) == -(-bits // 4)
        assert int(line, 16) == int(value) + ((1 << bits) if value < 0 else 0)


def test_odd_binary_and_ternary_weights(tmp_path):
    held = {
        "odd": (Constant(np.array([[-3, -1, 1, 3]]), "odd2"), ["2", "3", "0", "1"]),
        "binary": (Constant(np.array([[-1, 1, 1, -1]]), "binary"), ["1", "0", "0", "1"]),
        "ternary": (Constant(np.array([[-1, 0, 1, 0]]), "ternary"), ["3", "0", "1", "0"]),
    }
    graph = IntegerGraph()
    x = graph.input("features", Tensor((4,), -8, 7))
    for name, (weight, _) in held.items():
        graph.add(MatMul(inputs=(x,), outputs=(name,), weight=weight))
    write_vectors(graph, np.ones((1, 4), np.int64), CLIPS[:1], tmp_path)
    for name, (_, lines) in held.items():
        assert (tmp_path / "constants" / f"{name}.weight.hex").read_text().splitlines() == lines
    arrays = np.load(tmp_path / "vectors.npz")
    assert arrays["odd.weight"].tolist() == [[-3, -1, 1, 3]] and not any(name.endswith(".acc") for name in arrays)


def test_pools_have_accumulators(tmp_path):
    graph = IntegerGraph()
    x = graph.input("features", Tensor((2, 2, 1), -8, 7))
    mean = Rescale.of(1 / 4, (-8, 7))
    graph.add(SumPool(inputs=(x,), outputs=("mean",), window=Window((2, 2)), rescale=mean))
    index = write_vectors(graph, np.array([[[[1], [2]], [[3], [5]]]]), CLIPS[:1], tmp_path)
    assert (tmp_path / "clip0" / "mean.acc.hex").read_text() == "0000000b\n"
    assert (tmp_path / "clip0" / "mean.hex").read_text() == "03\n"
    assert index["steps"] is None and index["ops"][0]["window"]["size"] == [2, 2]
