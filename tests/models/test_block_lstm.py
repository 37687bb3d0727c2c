"""The block LSTM network: methods against naive readings, phases, penalties, sizes, bounds, export."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from kestrel.errors import KestrelError, UsageError
from kestrel.models.block_lstm import BlockLSTM, class_order
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.cell import ROW
from kestrel.quant.quantiser import clip_quantise


def network(seed: int = 0, **settings) -> BlockLSTM:
    torch.manual_seed(seed)
    return BlockLSTM(**{"input_size": 10, "classes": 12, "hidden": 9, "input_range": 4.0, **settings})


def features(batch: int = 7, frames: int = 6, width: int = 10) -> torch.Tensor:
    return torch.randn(batch, frames, width, generator=torch.Generator().manual_seed(1)) * 2


# ---- sizes ----


@pytest.mark.parametrize(("blocks", "published"), [(1, 66125), (3, 198373), (4, 264497), (6, 396745)])
def test_parameters_at_the_paper_s_size(blocks: int, published: int) -> None:
    """Published totals of method 1 at 108 units, less one range (the unused a2) per block."""
    net = BlockLSTM(input_size=40, classes=12, n_msb=blocks)
    total = sum(parameter.numel() for parameter in net.parameters())
    assert total == published - blocks
    table = net.layer_table(50)
    assert sum(row["parameters"] for row in table) == total
    assert net.macs(50) == blocks * (50 * 432 * (40 + 108) + 108 * 12) == sum(row["macs"] for row in table)


# ---- methods ----


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6, 12])
def test_twelve_classes_in_equal_shares_go_block_by_block(blocks: int) -> None:
    share = 12 // blocks
    assert class_order(12, blocks) == [(c // share, c % share) for c in range(12)]


def test_twelve_classes_in_unequal_shares() -> None:
    assert [group for group, _ in class_order(12, 5)] == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [group for group, _ in class_order(12, 8)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 7, 5, 6]


@pytest.mark.parametrize("classes", [1, 2, 3, 8, 12, 35])
def test_every_class_has_its_own_output(classes: int) -> None:
    for groups in range(1, classes + 1):
        order = class_order(classes, groups)
        assert len(set(order)) == len(order) == classes
        assert {group for group, _ in order} == set(range(groups))
        assert max(output for _, output in order) < -(-classes // groups)


@pytest.mark.parametrize(("blocks", "classes"), [(1, 12), (5, 12), (8, 12), (12, 12), (3, 2 + 1), (2, 3)])
def test_method_0_concatenates(blocks: int, classes: int) -> None:
    net, x = network(method=0, n_msb=blocks, classes=classes), features()
    net.set_phase("eval")
    scores = net.readout(net.lstm(x))
    expected = torch.stack([scores[group, :, output] for group, output in class_order(classes, blocks)], dim=1)
    assert torch.equal(net(x), expected)
    assert "cosine" not in net.penalty()


def test_method_1_sums_and_quantises() -> None:
    net, x = network(n_msb=3), features()
    net.set_phase("eval")
    scores = net.readout(net.lstm(x))
    assert scores.shape == (3, 7, 12)
    expected = clip_quantise(scores[0] + scores[1] + scores[2], 8, torch.tensor([48.0]))
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize(("blocks", "gain", "classes"), [(4, 2, 12), (6, 3, 12), (6, 2, 5), (4, 4, 12), (3, 1, 12)])
def test_method_2_sums_inside_groups(blocks: int, gain: int, classes: int) -> None:
    net, x = network(method=2, n_msb=blocks, gain_blocks=gain, classes=classes), features()
    net.set_phase("eval")
    groups = blocks // gain
    scores = net.readout(net.lstm(x))
    columns = []
    for group, output in class_order(classes, groups):
        columns.append(sum(scores[group + copy * groups, :, output] for copy in range(gain)))
    torch.testing.assert_close(net(x), torch.stack(columns, dim=1))


# ---- penalties ----


def block_vectors(net: BlockLSTM) -> list[torch.Tensor]:
    parts = [net.lstm.w_ih, net.lstm.w_hh, net.lstm.b_ih, net.lstm.b_hh, net.readout.weight, net.readout.bias]
    return [torch.cat([part[k].flatten() for part in parts]) for k in range(net.blocks)]


def test_cosine_penalty_of_method_1() -> None:
    net = network(n_msb=3, cs=0.7)
    vectors = block_vectors(net)
    total = sum(nn.functional.cosine_similarity(a, b, dim=0, eps=1e-6) for a in vectors for b in vectors)
    torch.testing.assert_close(net.penalty()["cosine"], 0.7 * ((total - 3) / 9).abs())


def test_cosine_penalty_of_method_2() -> None:
    net = network(method=2, cs=0.7)
    w = block_vectors(net)
    cosine = nn.functional.cosine_similarity
    expected = 0.7 * ((cosine(w[0], w[2], dim=0) + cosine(w[1], w[3], dim=0)) / 2).abs()
    torch.testing.assert_close(net.penalty()["cosine"], expected)


def test_cosine_penalty_sees_equal_blocks() -> None:
    net = network(n_msb=2, cs=1.0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.shape[0] == 2 and parameter.dim() > 1 and parameter.shape[1] != 2:
                parameter[1] = parameter[0]
    assert net.penalty()["cosine"].item() == pytest.approx(0.5, abs=1e-5)  # (4 - 2) / 4


@pytest.mark.parametrize("settings", [{"n_msb": 1}, {"method": 0}, {"method": 2, "gain_blocks": 1}, {"cs": 0.0}])
def test_no_cosine_penalty(settings: dict) -> None:
    assert "cosine" not in network(**settings).penalty()


def test_range_penalty() -> None:
    """The norm of 13 ranges of each cell and 2 of each read-out; not squared; the range of the sum is left out."""
    net = network(n_msb=4, l2=0.3, input_range=128.0)
    squares = 128.0**2 + 5 * 1 + 1 + 6 * 16 + 16 + 16**2  # a1; a3-a6, a8; a10; a7, a9, a11-a14; read-out
    torch.testing.assert_close(net.penalty()["range_l2"], torch.tensor(0.3 * (4 * squares) ** 0.5 / 64))
    net.penalty()["range_l2"].backward()
    assert net.lstm.ranges.grad.min() > 0
    assert net.sum_range.grad is None
    assert "range_l2" not in network(pact_a=False).penalty()
    assert "range_l2" not in network(l2=0.0).penalty()


# ---- phases and randomness ----


def test_phases() -> None:
    net, x = network(noise_train=0.1), features()
    net.set_phase("pretrain")
    assert net.training
    assert not torch.equal(net(x), net(x))  # DropConnect
    net.drop_p = 0.0
    assert torch.equal(net(x), net(x))  # no noise
    net.set_phase("retrain")
    assert net.training
    assert not torch.equal(net.lstm(x, 0, 0.1), net.lstm(x, 0, 0.1))
    net.noise_train = 0.0
    assert torch.equal(net(x), net(x))
    net.set_phase("eval")
    assert not net.training
    assert torch.equal(net(x), net(x))
    with pytest.raises(UsageError, match="unknown phase 'evaluate'"):
        net.set_phase("evaluate")


def test_evaluation_noise_follows_the_seed() -> None:
    net, x = network(noise_eval=0.5, quant_actMVM=None, quant_actNM=None), features()
    net.set_phase("eval")
    torch.manual_seed(3)
    first, second = net(x), net(x)
    torch.manual_seed(3)
    assert torch.equal(net(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_native", ["0", "1"])
def test_training_is_reproducible(monkeypatch, use_native: str) -> None:
    monkeypatch.setenv("KESTREL_NATIVE", use_native)

    def trained() -> dict[str, torch.Tensor]:
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for phase in ("pretrain", "retrain"):
            net.set_phase(phase)
            for _ in range(3):
                loss = net(features()).square().mean() + sum(net.penalty().values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                net.project()
        return net.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- chips ----

DEVIATIONS = {"noise_program": 0.2, "adc_offset": 1.0, "adc_gain": 0.05, "adc_inl": 1.0}


@pytest.mark.parametrize(
    "settings", [DEVIATIONS, {"noise_program": 0.2}, {"adc_inl": 2.0, "adc_draw": "fixed"}], ids=str
)
def test_evaluation_keeps_one_chip(settings: dict) -> None:
    net, x = network(**settings), features()
    net.set_phase("eval")
    torch.manual_seed(3)
    first = net(x)
    assert torch.equal(net(x), first)  # no read noise: the chip alone deviates
    assert torch.equal(net(x[2:4]), first[2:4])  # the same for every batch
    net.set_phase("eval")
    other = net(x)
    assert torch.equal(first, other) == (settings.get("adc_draw") == "fixed")
    net.set_phase("eval")
    torch.manual_seed(3)
    assert torch.equal(net(x), first)
    net.evaluate_with(noise_program=0, adc_offset=0, adc_gain=0, adc_inl=0)
    assert not torch.equal(net(x), first)
    ideal = network()
    ideal.load_state_dict(net.state_dict())
    ideal.set_phase("eval")
    assert torch.equal(net(x), ideal(x))


def test_phases_meet_the_chips_that_are_theirs() -> None:
    net, x = network(drop_p=0.0, noise_train=0.0, **DEVIATIONS), features()
    net.set_phase("pretrain")
    state = torch.get_rng_state()
    assert torch.equal(net(x), net(x))  # ideal
    assert torch.equal(torch.get_rng_state(), state)
    net.set_phase("retrain")
    assert not torch.equal(net(x), net(x))  # a new chip in every pass
    net(x).sum().backward()
    assert net.lstm.w_hh.grad.isfinite().all()


def test_zero_deviations_change_nothing() -> None:
    net, x = network(noise_eval=0.1), features()
    same = network(noise_eval=0.1, noise_program=0.0, adc_offset=0.0, adc_gain=0.0, adc_inl=0.0, adc_draw="fixed")
    for one in (net, same):
        one.set_phase("eval")
    torch.manual_seed(1)
    first = net(x)
    torch.manual_seed(1)
    assert torch.equal(same(x), first)
    assert list(net.state_dict()) == list(same.state_dict())


def test_read_noise_comes_on_top_of_a_chip() -> None:
    net, x = network(noise_program=0.2), features()
    net.evaluate_with(noise_read=0.1)
    net.set_phase("eval")
    assert net.noise_eval == 0.1
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("settings", [{}, {"method": 0, "quant_w": 4}], ids=str)
def test_bit_serial_inputs_with_fine_converters_are_parallel_ones(settings: dict) -> None:
    """Slices of 2 bits over a register of 4, with converters that hardly round, against 4-bit inputs."""
    x = features()
    serial = network(quant_inp=2, quant_actMVM=16, input_coding="bit_serial", **settings)
    parallel = network(quant_inp=4, quant_actMVM=16, **settings)
    with torch.no_grad():  # ranges that a small network fills
        serial.lstm.ranges[ROW["a11"]] = 0.5
        serial.readout.ranges[0] = 0.5
        serial.lstm.b_hh.fill_(0.2)  # converters over the range 1 clip no slice
        if "sum_range" in serial.state_dict():
            serial.sum_range.fill_(2)
    parallel.load_state_dict(serial.state_dict())
    for net in (serial, parallel):
        net.set_phase("eval")
    assert serial(x).std() > 0.05
    assert (serial(x) - parallel(x)).abs().mean() < 0.1 * serial(x).std()
    assert network(input_coding="bit_serial", quant_inp=2).bits.slices == 3
    assert network(input_slices=5).bits.slices == 0


# ---- ranges ----


@pytest.mark.parametrize(
    ("place", "named"),
    [("lstm", "range a9 of the cell is 0 in block 2"), ("readout", "range a2 of the read-out is 0 in block 1"),
     ("sum", "range sum_range is 0 in block 0")],
)  # fmt: skip
def test_a_range_of_zero_is_an_error_with_its_name(place: str, named: str) -> None:
    net = network()
    with torch.no_grad():
        if place == "lstm":
            net.lstm.ranges[7, 2] = 0
        elif place == "readout":
            net.readout.ranges[1, 1] = 0
        else:
            net.sum_range.zero_()
    for phase in ("pretrain", "retrain", "eval"):
        with pytest.raises(KestrelError) as error:
            net.set_phase(phase)
        assert named in str(error.value) and ">= 0.01" in str(error.value) and "\n" not in str(error.value)
    net.project()
    net.set_phase("eval")


# ---- learning ----


def test_learns_a_toy_task_inside_its_bounds() -> None:
    """Which of four channels carries a pulse; weights and ranges stay inside their bounds on the way."""
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    x = torch.randn(200, 8, 4) * 0.3
    x[torch.arange(200), torch.randint(2, 6, (200,)), labels] += 3
    net = BlockLSTM(input_size=4, classes=4, hidden=16, n_msb=2, input_range=4.0, drop_p=0.05)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for phase in ("pretrain", "retrain"):
        net.set_phase(phase)
        for _ in range(60):
            loss = nn.functional.cross_entropy(net(x), labels) + sum(net.penalty().values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            net.project()
            assert net.lstm.w_hh.abs().max() <= 0.2
            assert net.lstm.ranges.min() >= 0.01
    net.set_phase("eval")
    assert (net(x).argmax(1) == labels).float().mean() > 0.9


def test_project() -> None:
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.sub_(50)
    net.project()
    assert net.readout.weight.abs().max() <= 0.2
    assert net.readout.bias.abs().max() <= 1.2
    assert min(net.lstm.ranges.min(), net.readout.ranges.min(), net.sum_range.min()) > 0
    net.set_phase("eval")
    assert net(features()).isfinite().all()


# ---- export ----


SERIAL = {"quant_inp": 2, "input_coding": "bit_serial"}


@pytest.mark.parametrize("settings", [{}, {"method": 0, "n_msb": 8}, {"method": 2}, {"quant_w": 4}, SERIAL], ids=str)
def test_onnx_equals_the_network(settings: dict) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net = network(**settings)
    net.set_phase("eval")
    spotter = KeywordSpotter(nn.Identity(), net)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "n"}, "y": {0: "n"}}}
        torch.onnx.export(spotter, (features(),), file, dynamo=False, **names)
    session = onnxruntime.InferenceSession(file.getvalue())
    x = features(batch=20)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), spotter(x).detach())


@pytest.mark.parametrize(("weight_range", "limit"), [("real", 0.2), ("paper", 1.0)])
def test_weight_groups(weight_range, limit: float) -> None:
    net = network(quant_w=4, weight_range=weight_range)
    groups = {group.name: group for group in net.weight_groups()}
    state = net.state_dict()
    weights = [name for name in state if "w_" in name or "weight" in name]
    assert set(groups) >= set(weights)
    for name, group in groups.items():
        assert group.tensor.shape == state[name].shape
        assert not group.tensor.requires_grad
        codes = group.tensor / group.limit * 8
        torch.testing.assert_close(codes, codes.round())
    assert groups["lstm.w_hh"].limit == limit
    assert groups["lstm.w_hh"].bits == 4
    assert network().weight_groups()[0].bits is None


# ---- bounds ----


@pytest.mark.parametrize(
    ("settings", "field", "bounds"),
    [
        ({"method": 0, "n_msb": 13}, "n_msb", "1..12"),
        ({"method": 2, "n_msb": 5}, "n_msb", "gain_blocks"),
        ({"method": 2, "n_msb": 26, "gain_blocks": 2}, "n_msb", "1..12"),
        ({"method": 3}, "method", "0..2"),
        ({"n_msb": 0}, "n_msb", ">= 1"),
        ({"n_msb": 2.0}, "n_msb", "whole number"),
        ({"hidden": -3}, "hidden", ">= 1"),
        ({"gain_blocks": 0, "method": 2}, "gain_blocks", ">= 1"),
        ({"quant_inp": -1}, "quant_inp", "2..16"),
        ({"quant_actMVM": 17}, "quant_actMVM", "2..16"),
        ({"quant_actNM": 1}, "quant_actNM", "2..16"),
        ({"quant_w": 40}, "quant_w", "2..16"),
        ({"drop_p": 1.5}, "drop_p", "0..1"),
        ({"noise_train": -0.1}, "noise_train", ">= 0"),
        ({"noise_eval": float("nan")}, "noise_eval", ">= 0"),
        ({"max_w": 0.0}, "max_w", "> 0"),
        ({"rows_bias": 0}, "rows_bias", "> 0"),
        ({"input_range": 0.0}, "input_range", ">= 0.01"),
        ({"l2": -1}, "l2", ">= 0"),
        ({"noise_program": -0.1}, "noise_program", ">= 0"),
        ({"adc_draw": "row"}, "adc_draw", "column, chip, fixed"),
        ({"adc_offset": 1.0, "quant_actMVM": None}, "adc_offset", "set quant_actMVM"),
        ({"input_coding": "serial"}, "input_coding", "parallel or bit_serial"),
        ({"input_coding": "bit_serial", "quant_inp": None}, "input_coding", "2..16"),
        ({"input_coding": "bit_serial", "input_slices": 14}, "input_slices", "1..13"),
        ({"input_slices": 0}, "input_slices", "1..15"),
        ({"cs": -1}, "cs", ">= 0"),
    ],
)
def test_wrong_settings(settings: dict, field: str, bounds: str) -> None:
    with pytest.raises(UsageError) as error:
        network(**settings)
    message = str(error.value)
    assert message.startswith(f"model.{field}: ")
    assert bounds in message
    assert "\n" not in message


def test_zero_bits_are_analog() -> None:
    net, same = network(quant_inp=0, quant_w=0), network(quant_inp=None, quant_w=None)
    for one in (net, same):
        one.set_phase("eval")
    assert torch.equal(net(features()), same(features()))
