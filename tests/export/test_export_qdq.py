from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from score_kit import CLASSES, FRAMES, WIDTH, analog, feature_file, spotter
from torch import nn

from kestrel.errors import KestrelError
from kestrel.export import qdq
from kestrel.export.onnx import _quiet, compare
from kestrel.export.qdq import Rewritten, rewrite, write_qdq
from kestrel.export.spec import ExportSpec
from kestrel.frontend.post import Post
from kestrel.lower.answers import predict_decoded
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.inventory import weight_codes
from kestrel.models.spotter import KeywordSpotter
from kestrel.quant.packing import WeightCodes
from kestrel.quant.quantiser import clip_quantise


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features"))


def work(model, data, bits=8):
    return SimpleNamespace(spotter=model, data=data, settings=ExportSpec(weight_bits=bits), batch_size=64)


def net(**settings):
    torch.manual_seed(2)
    model = BlockLSTM(input_size=WIDTH, classes=len(CLASSES), hidden=6, input_range=4.0, **settings)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("ranges"):
                values.mul_(torch.rand_like(values) + 0.5)
    post = Post([{"normalise": "channel"}], (FRAMES, WIDTH))
    post.fit([torch.randn(50, FRAMES, WIDTH) + 3])
    return KeywordSpotter(post, model)


def kinds(graph):
    found = [node.op_type for node in graph.node]
    return found + [kind for body in qdq._bodies(graph) for kind in kinds(body)]


@pytest.mark.parametrize("method", [0, 1, 2])
@pytest.mark.parametrize("quant_w", [None, 3])
def test_qdq_answers_as_pytorch_does_with_the_same_codes(tmp_path, data, method, quant_w):
    model = net(n_msb=4, method=method, quant_w=quant_w, quant_inp=4, quant_actMVM=6, quant_actNM=8)
    done = write_qdq(work(model, data), tmp_path / "q.onnx", {"classes": CLASSES})
    agreement = compare(tmp_path / "q.onnx", predict_decoded(model, data, 8, 64), data, 64)
    assert agreement.n == 130 and agreement.other_answers == 0 and agreement.largest_difference < 1e-4
    assert done == Rewritten(quantisers=14 + 2 + (method == 1), weights=6)
    graph = onnx.load(str(tmp_path / "q.onnx")).graph
    assert "Round" not in kinds(graph)
    assert kinds(graph).count("QuantizeLinear") == done.quantisers
    assert kinds(graph).count("DequantizeLinear") == done.quantisers + 6


@pytest.mark.parametrize(("largest", "held"), [(127, True), (255, False)])
def test_weights_that_int8_does_not_hold_stay_float(largest, held):
    """Odd codes of 8 bits reach 255."""
    codes = WeightCodes(np.array([[-127, 1, 3], [5, 7, largest]], np.int16), np.array([0.5], np.float32), 8, "odd8")
    nodes = [onnx.helper.make_node("Gemm", ["x", "w"], ["y"])]
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, n]) for name, n in (("x", 2), ("y", 3))
    )
    graph = onnx.helper.make_graph(nodes, "one", [x], [y], [numpy_helper.from_array(codes.decode(), "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    done = rewrite(model, {"w": codes})
    assert (done.weights, done.float_weights) == (int(held), int(not held))
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()  # no optimiser, which would also quantise x
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = np.array([[1.0, -2.0]], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": values})[0], values @ codes.decode())


def test_weights_are_int8_and_scales_those_of_codes_and_ranges(tmp_path, data):
    model = spotter()
    write_qdq(work(model, data), tmp_path / "q.onnx", {})
    graph = onnx.load(str(tmp_path / "q.onnx")).graph
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    for name, group in weight_codes(model.net, 8).items():
        stored = arrays[f"{name}.codes"]
        assert stored.dtype == np.int8
        np.testing.assert_array_equal(stored.reshape(-1), group.codes.reshape(-1))
        np.testing.assert_array_equal(arrays[f"{name}.scale"], group.scale)
    floats = [array for array in arrays.values() if array.dtype == np.float32]
    assert max(array.size for array in floats) < 20  # no weights in float
    (loop,) = qdq._bodies(graph)
    scales = {
        tuple(numpy_helper.to_array(node.attribute[0].t).tolist())
        for node in loop.node
        if node.op_type == "Constant" and node.output[0].endswith("quantiser.scale")
    }
    bits = {"a1": 4, "a11": 4, "a12": 6, "a13": 6}
    ranges = dict(zip(_rows(), model.net.lstm.ranges.detach().numpy(), strict=True))
    expected = {tuple((values / 2 ** (bits.get(name, 8) - 1)).tolist()) for name, values in ranges.items()}
    expected.add(tuple((ranges["a11"] / 2**7).tolist()))  # h has 8 bits, as a crossbar input 4
    assert scales == expected


def _rows():
    from kestrel.nn.cell import RANGES

    return list(RANGES)


def test_what_int8_cannot_hold_stays_float_and_still_agrees(tmp_path, data):
    model = net(n_msb=2, quant_inp=4, quant_actMVM=10, quant_actNM=12)
    done = write_qdq(work(model, data, bits=10), tmp_path / "q.onnx", {})
    assert done.quantisers == 3 and done.float_roundings == 14 and done.weights == 0 and done.float_weights == 6
    agreement = compare(tmp_path / "q.onnx", predict_decoded(model, data, 10, 64), data, 64)
    assert agreement.other_answers == 0


def test_an_analog_signal_has_no_nodes(tmp_path, data):
    done = write_qdq(work(analog(), data), tmp_path / "q.onnx", {})
    assert done == Rewritten(quantisers=14, weights=6)  # all but the three crossbar inputs
    reference = predict_decoded(analog(), data, 8, 64)
    assert compare(tmp_path / "q.onnx", reference, data, 64).other_answers == 0


def test_the_bytes_are_reproducible(tmp_path, data):
    for name in ("a", "b"):
        write_qdq(work(spotter(), data), tmp_path / name, {"classes": CLASSES})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert b".py" not in (tmp_path / "a").read_bytes()


def test_a_wrong_scale_is_found(tmp_path, data):
    model = spotter()
    write_qdq(work(model, data), tmp_path / "q.onnx", {})
    onnx_model = onnx.load(str(tmp_path / "q.onnx"))
    (scale,) = [entry for entry in onnx_model.graph.initializer if entry.name == "lstm.w_hh.scale"]
    scale.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(scale), scale.name))
    (tmp_path / "q.onnx").write_bytes(onnx_model.SerializeToString())
    with pytest.raises(KestrelError, match="otherwise than PyTorch"):
        compare(tmp_path / "q.onnx", predict_decoded(model, data, 8, 64), data, 64)


class _Plain(nn.Module):
    """A quantiser, and a rounding that is none."""

    def __init__(self):
        super().__init__()
        self.limit = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return clip_quantise(x, 5, self.limit) + torch.round(x * 3)


def test_only_quantisers_are_rewritten(tmp_path):
    x = torch.linspace(-4, 4, 101).reshape(1, -1)
    with _quiet():
        torch.onnx.export(_Plain(), (x,), str(tmp_path / "p.onnx"), input_names=["x"], opset_version=17, dynamo=False)
    model = onnx.load(str(tmp_path / "p.onnx"))
    assert rewrite(model, {}) == Rewritten(quantisers=1, float_roundings=1)
    assert kinds(model.graph).count("Round") == 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, _Plain()(x).detach().numpy(), atol=1e-6)
