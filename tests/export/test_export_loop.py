import copy

import onnx
import pytest
import torch
from score_kit import CLASSES, WIDTH, spotter
from torch import nn

from kestrel.export.loop import with_loops
from kestrel.export.onnx import write_onnx
from kestrel.frontend.post import Post
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.cell import Cell, plain_lstm


@pytest.mark.parametrize("bits", [(4, 6, 8), (3, 5, 6), (None, None, None), (2, None, 4), (8, 8, None)])
@pytest.mark.parametrize("quant_w", [None, 3])
def test_the_loop_equals_the_plain_equations(bits, quant_w):
    torch.manual_seed(0)
    inp, mvm, nm = bits
    net = BlockLSTM(
        input_size=5, classes=4, hidden=7, n_msb=3, quant_inp=inp, quant_actMVM=mvm, quant_actNM=nm, quant_w=quant_w
    )
    lstm, x = net.lstm, 3 * torch.randn(6, 9, 5)
    with torch.no_grad():
        lstm.ranges.mul_(torch.rand_like(lstm.ranges) + 0.5)  # another range for every signal and block
        cell = Cell(lstm.w_ih, lstm.w_hh, lstm.b_ih, lstm.b_hh, lstm.ranges_in_use(), lstm.bits, lstm.device)
        expected = plain_lstm(x, cell)
        got = with_loops(copy.deepcopy(net)).lstm(x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_noise_has_no_place_in_the_loop():
    lstm = with_loops(copy.deepcopy(spotter().net)).lstm
    with pytest.raises(ValueError, match="without noise"):
        lstm(torch.zeros(1, 4, 2 * WIDTH), 0.0, 0.1)


@pytest.mark.parametrize("method", [0, 1, 2])
def test_the_model_does_not_grow_with_the_frames(tmp_path, method):
    sizes = []
    for frames in (5, 60):
        net = BlockLSTM(input_size=WIDTH, classes=len(CLASSES), hidden=8, n_msb=4, method=method)
        write_onnx(KeywordSpotter(Post([], (frames, WIDTH)), net), (frames, WIDTH), tmp_path / "model.onnx", {})
        graph = onnx.load(str(tmp_path / "model.onnx")).graph
        (loop,) = [node for node in graph.node if node.op_type == "Loop"]
        sizes.append((len(graph.node), len(loop.attribute[0].g.node)))
    assert sizes[0] == sizes[1]


def test_other_networks_stay_as_they_are():
    net = nn.Linear(2, 2)
    assert with_loops(net) is net
