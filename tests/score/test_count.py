import sys

import pytest
import torch
from torch import nn

from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.network import Network, WeightGroup
from kestrel.score.count import count, thop_check


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        # 63,936 + 864 crossbar values of a cell, 1,296 + 12 of its read-out, 13 + 2 ranges, and one range of the sum
        ({"n_msb": 1}, 63_936 + 864 + 1_296 + 12 + 13 + 2 + 1),
        ({"n_msb": 4}, 4 * (63_936 + 864 + 1_296 + 12 + 13 + 2) + 1),
    ],
)
def test_sizes_of_the_papers_network(settings, parameters):
    counts = count(BlockLSTM(input_size=40, classes=12, hidden=108, **settings), (50, 40), 8)
    blocks = settings["n_msb"]
    assert counts.parameters == parameters
    assert counts.macs == blocks * (50 * 4 * 108 * (40 + 108) + 108 * 12)
    # one byte for each weight and bias at 8 bits, and a float32 scale per block for each of the six groups
    assert counts.weight_bytes == blocks * (63_936 + 864 + 1_296 + 12) + 6 * blocks * 4


@pytest.mark.parametrize("method", [0, 1, 2])
def test_thop_agrees_on_the_block_lstm(method):
    counts = count(BlockLSTM(input_size=7, classes=5, hidden=9, n_msb=2, method=method), (6, 7), 8)
    assert counts.thop_agrees is True
    assert counts.thop.extra > 0 and counts.thop.macs == counts.macs + counts.thop.extra


def test_fewer_bits_take_fewer_bytes():
    sizes = {
        bits: count(BlockLSTM(input_size=8, classes=4, hidden=8, n_msb=2, quant_w=bits), (5, 8), 8).weight_bytes
        for bits in (2, 4, 8)
    }
    # trained bits have one scale a group, so a halving of bits halves all but these
    values = 2 * (8 * 32 + 8 * 32 + 2 * 32 + 8 * 4 + 4)
    assert sizes == {bits: values * bits // 8 + 6 * 4 for bits in sizes}


class _Net(Network):
    """Torch layers in a row, as a Network; `table` holds (name, macs)."""

    def __init__(self, table, *steps):
        super().__init__()
        self.steps, self.table = nn.ModuleList(steps), table

    def forward(self, x):
        for step in self.steps:
            x = step(x)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def layer_table(self, frames):
        return [{"name": name, "parameters": 0, "macs": macs} for name, macs in self.table]

    def weight_groups(self):
        return [WeightGroup(name, value.detach(), None, None) for name, value in self.named_parameters()]


def _by_hand(frames, width):
    """(network, multiply-adds) of layers that thop knows, counted by hand."""
    yield _Net([], nn.Linear(width, 5)), frames * width * 5
    yield _Net([], nn.LSTM(width, 4, batch_first=True)), frames * 4 * 4 * (width + 4)
    yield _Net([], nn.LSTM(width, 4, num_layers=2, bias=False, batch_first=True)), frames * 16 * ((width + 4) + (4 + 4))
    yield _Net([], nn.GRU(width, 4, batch_first=True)), frames * 3 * 4 * (width + 4)
    yield _Net([], nn.RNN(width, 4, batch_first=True)), frames * 4 * (width + 4)
    yield _Net([], nn.Conv1d(frames, 6, 3)), 6 * (width - 2) * frames * 3
    yield _Net([], nn.Conv1d(frames, 2 * frames, 3, groups=frames)), 2 * frames * (width - 2) * 3
    # normalisation, activations and pooling cost nothing in our count, but not in thop's
    norms = (nn.BatchNorm1d(frames), nn.PReLU(), nn.LayerNorm(width), nn.AvgPool1d(2), nn.Softmax(-1))
    yield _Net([], nn.Conv1d(frames, frames, 1), *norms), frames * frames * width


@pytest.mark.parametrize("case", range(8))
def test_what_remains_of_thops_figure_is_the_products(case):
    net, macs = list(_by_hand(6, 8))[case]
    net.table = [("all", macs)]
    check = thop_check(net, 6, 8)
    assert check.compared == macs
    assert check.skipped == []
    assert count(net, (6, 8), 8).thop_agrees is True


def test_a_wrong_count_of_ours_is_seen():
    net = _Net([("linear", 1)], nn.Linear(8, 5))
    assert count(net, (6, 8), 8).thop_agrees is False


class _Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 3))

    def forward(self, x):
        return x @ self.weight


def test_a_layer_that_thop_does_not_support_is_named():
    net = _Net([("own", 144), ("linear", 90)], _Own(), nn.Linear(3, 5))
    counts = count(net, (6, 8), 8)
    assert counts.thop.skipped == ["steps.0 (_Own, 24 parameters)"]
    assert counts.thop.macs == 90
    assert counts.thop_agrees is None


def test_without_thop_the_check_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    check = thop_check(nn.Linear(8, 5), 6, 8)
    assert check.macs is None and check.compared is None and check.note.startswith("not asked")


def test_counting_leaves_the_network_as_it_was():
    net = BlockLSTM(input_size=7, classes=5, hidden=9, n_msb=2)
    net.set_phase("retrain")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count(net, (6, 7), 8)
    plain = _Net([], nn.Linear(8, 5))
    count(plain, (6, 8), 8)
    assert net.phase == "retrain" and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert list(plain.state_dict()) == ["steps.0.weight", "steps.0.bias"] and not plain.steps[0]._forward_hooks
