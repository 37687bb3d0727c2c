"""The delta network: stages, losses and decisions, pruning through stages, stored weights, counts."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kestrel.errors import UsageError
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.inventory import decoded_weights, parameters, weight_codes
from kestrel.nn.cbtd import Balance, weight_sparsity, work_per_element
from kestrel.nn.delta import collecting

torch.set_num_threads(1)
CLASSES = 5


def _net(phase: Any = "eval", **settings: Any) -> DeltaNetwork:
    torch.manual_seed(0)
    net = DeltaNetwork(**{"input_size": 6, "classes": CLASSES, "rnn_size": 16, **settings})
    net.set_phase(phase)
    return net


def _batch(clips: int = 7, frames: int = 14) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(clips, frames, 6, generator=generator).cumsum(1) * 0.4
    return x, torch.randint(CLASSES, (clips,), generator=generator)


def _train(net: DeltaNetwork, phase: Any, updates: int, rate: float = 0.02) -> list[float]:
    net.set_phase(phase)
    net.updates_per_epoch = 5
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    x, labels = _batch()
    losses = []
    for _ in range(updates):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x), labels) + sum(net.penalty().values())
        loss.backward()
        optimizer.step()
        net.project()
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("kind", "expected"), [("GRU", 16_524), ("LSTM", 21_772)])
def test_sizes_of_the_original(kind: Any, expected: int) -> None:
    net = DeltaNetwork(input_size=16, classes=12, rnn_type=kind)
    assert parameters(net) == expected
    gates = 3 if kind == "GRU" else 4
    table = net.layer_table(61)
    assert sum(row["macs_per_frame"] for row in table) == gates * 64 * 80 + 64 * 12
    assert net.macs(61) == 61 * (gates * 64 * 80 + 64 * 12)
    assert sum(row["parameters"] for row in table) == expected
    names = {f"rnn.{part}_l0" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")} | {"cl.weight", "cl.bias"}
    assert {group.name for group in net.weight_groups()} == names


def test_initial_weights() -> None:
    net = DeltaNetwork(input_size=16, classes=12, rnn_type="LSTM", rnn_layers=2, fc_extra_size=8)
    for name, parameter in net.named_parameters():
        if "bias" in name:
            assert not parameter.any()
    for gate in net.rnn.weight_hh_l1.split(64):
        torch.testing.assert_close(gate @ gate.T, torch.eye(64), atol=1e-5, rtol=0)
    assert [row["name"] for row in net.layer_table(1)] == ["rnn.l0", "rnn.l1", "fc_extra", "cl"]


# --------------------------------------------------------------------------------------------------- losses, decisions


def test_mean_logits() -> None:
    net, (x, _) = _net(), _batch()
    torch.testing.assert_close(net(x), net.frame_logits(x).mean(1))
    lengths = torch.tensor([14, 1, 3, 5, 14, 8, 2])
    z = net.frame_logits(x)
    expected = torch.stack([clip[:length].mean(0) for clip, length in zip(z, lengths, strict=True)])
    torch.testing.assert_close(net(x, lengths), expected)


def _last_speech(z: Tensor, silence: int) -> Tensor:
    for frame in range(len(z) - 1, -1, -1):
        if int(z[frame].argmax()) != silence:
            return z[frame]
    return z[-1]


@pytest.mark.parametrize("silence", [-1, 0])
def test_last_speech(silence: int) -> None:
    net, (x, _) = _net(decision="last_speech", silence_class=silence), _batch(40)
    with torch.no_grad():
        net.cl.weight.mul_(4)
        z = net.frame_logits(x)
        index = silence % CLASSES
        silent = (z.argmax(-1) == index).float().mean(1)
        assert (silent > 0).any() and (silent < 1).any() and (z[:, -1].argmax(-1) == index).any()
        torch.testing.assert_close(net(x), torch.stack([_last_speech(clip, index) for clip in z]))
        lengths = torch.arange(40) % 14 + 1
        expected = [_last_speech(clip[:length], index) for clip, length in zip(z, lengths, strict=True)]
        torch.testing.assert_close(net(x, lengths), torch.stack(expected))
        net.cl.weight.zero_()
        net.cl.bias[index] = 1
        assert (net(x).argmax(-1) == index).all(), "none is speech: silence"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_of_frames_is_the_mean_cross_entropy(smoothing: float, padded: bool) -> None:
    net, (x, labels) = _net("retrain", loss="frame", beta=0.0), _batch()
    lengths = torch.tensor([14, 9, 5, 14, 7, 6, 14]) if padded else None
    ours = functional.cross_entropy(net(x, lengths), labels, label_smoothing=smoothing) + net.penalty()["frames"]
    z, total = net.frame_logits(x, lengths), torch.zeros(())
    for clip in range(7):
        length = 14 if lengths is None else int(lengths[clip])
        silent = [frame < 2 or frame >= length - 2 for frame in range(length)]
        for frame in range(length):
            if silent[frame]:
                loss = functional.cross_entropy(z[clip, frame], torch.tensor(CLASSES - 1))
            else:
                loss = functional.cross_entropy(z[clip, frame], labels[clip], label_smoothing=smoothing)
            total = total + loss / length / 7
    torch.testing.assert_close(ours, total)
    ours.backward()
    assert net.cl.weight.grad.abs().max() > 0
    net.set_phase("eval")
    assert net.penalty() == {} and net(x).shape == (7, CLASSES)


def test_penalty_on_changes() -> None:
    net, (x, _) = _net("retrain", thx=0.1, thh=0.05, beta=3.0), _batch()
    assert float(net.penalty()["delta_h"]) == 0, "a process without a clip has the same terms"
    net(x)
    with collecting(net):
        change = net.rnn(x).change
    torch.testing.assert_close(net.penalty()["delta_h"], 3 * change)
    net.set_phase("pretrain")
    net(x)
    assert net.penalty() == {}, "thresholds act from the retraining on"


def test_settings_that_do_not_fit() -> None:
    for settings, text in (
        ({"decision": "last_speech", "silence_class": None}, "silence_class"),
        ({"loss": "frame", "silence_class": None}, "label_head"),
        ({"silence_class": 5}, "silence_class: 5"),
        ({"qa": 3}, "model.qa: 3"),
        ({"thx": [0.1, 0.2, 0.3]}, "thx: 3 thresholds for 1 layers"),
        ({"cbtd_from": "pretrain", "num_array_pe": 5}, "num_array_pe = 5"),
    ):
        with pytest.raises(UsageError, match=text):
            _net(**settings)
    net = _net("retrain", loss="frame", silence_class=None, label_head=0, label_tail=0)
    net(_batch()[0])


def test_a_clip_with_nan_has_no_finite_logits() -> None:
    for decision in ("mean_logits", "last_speech"):
        net, (x, _) = _net(thx=0.1, thh=0.1, delta_from="pretrain", decision=decision), _batch()
        x[3, 5, 2] = torch.nan
        assert net(x).isfinite().all(1).tolist() == [clip != 3 for clip in range(7)]
        assert net(x[:1, :1]).isfinite().all()


# -------------------------------------------------------------------------------------------------------------- stages


def test_thresholds_follow_the_stage_also_in_evaluation() -> None:
    net, (x, _) = _net("pretrain", thx=0.1, thh=0.2), _batch()
    assert not net.rnn.is_delta
    net.set_phase("eval")
    dense = net(x)
    assert not net.rnn.is_delta
    net.set_phase("retrain")
    assert net.rnn.is_delta and net.rnn.thresholds[0].h == 0.2
    net.set_phase("eval")
    assert net.rnn.is_delta and (net(x) - dense).abs().max() > 1e-4
    other = _net("pretrain", thx=0.1, thh=0.2)
    other.load_state_dict(net.state_dict())
    other.set_phase("eval")
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    net.set_thresholds(0.0, 0.0)
    torch.testing.assert_close(net(x), dense, rtol=1e-5, atol=1e-6)
    assert _net("pretrain", thx=0.1, delta_from="pretrain").rnn.is_delta


def test_retraining_at_thresholds_of_zero_begins_with_the_pretrained_scores() -> None:
    net, (x, _) = _net(), _batch()
    _train(net, "pretrain", 5)
    net.set_phase("eval")
    dense = net(x)
    again = _net("pretrain", thx=0.0, thh=0.0)
    again.load_state_dict(net.state_dict())
    again.set_phase("retrain")
    again.set_phase("eval")
    torch.testing.assert_close(again(x), dense, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_both_stages_learn(kind: Any, fixed: int) -> None:
    settings = {"qa": fixed, "qw": fixed, "qc": fixed, "qcw": fixed, "fc_extra_size": 16, "rnn_layers": 2}
    net = _net(rnn_type=kind, thx=0.1, thh=0.05, beta=0.1, cbtd_from="pretrain", gamma_rnn=0.5, num_array_pe=4,
               alpha_anneal_epoch=2, rnn_dropout=0.05, fc_dropout=0.05, **settings)  # fmt: skip
    first = _train(net, "pretrain", 40)
    second = _train(net, "retrain", 40)
    assert sum(second[-5:]) < 0.7 * sum(first[:5])


# ------------------------------------------------------------------------------------------------------------- pruning

PRUNED = {"cbtd_from": "pretrain", "gamma_rnn": 0.75, "gamma_fc": 0.5, "num_array_pe": 4, "fc_extra_size": 8}
BALANCES = {
    "rnn.weight_ih_l0": Balance(0.75, 4),
    "rnn.weight_hh_l0": Balance(0.75, 4),
    "fc_extra.weight": Balance(0.5, 4),
}


def _assert_pruned(weights: dict[str, Tensor]) -> None:
    for name, balance in BALANCES.items():
        work = work_per_element(weights[name], balance)
        assert (work == balance.kept(weights[name].shape[0])).all(), name


def test_evaluation_and_export_are_fully_pruned_at_any_time() -> None:
    net, (x, _) = _net(alpha_anneal_epoch=100, **PRUNED), _batch()
    _train(net, "pretrain", 7)
    assert weight_sparsity(dict(net.named_parameters()))["all"] < 0.2
    net.set_phase("eval")
    logits = net(x)
    groups = {group.name: group.tensor for group in net.weight_groups()}
    _assert_pruned(groups)
    dense = _net(**{**PRUNED, "cbtd_from": "none"})
    dense.load_state_dict({name: groups.get(name, value) for name, value in dense.state_dict().items()})
    torch.testing.assert_close(logits, dense(x), rtol=1e-5, atol=1e-6)
    codes = weight_codes(net, 8)
    with decoded_weights(net, codes):
        net.set_phase("eval")
        inside = net(x)
    torch.testing.assert_close(inside, logits, rtol=0.1, atol=0.1)
    _assert_pruned({name: torch.from_numpy(code.decode()) + 1e-9 * (groups[name] != 0) for name, code in codes.items()})


def test_pruning_completes_and_masks_last_through_retraining() -> None:
    net = _net(alpha_anneal_epoch=3, **PRUNED)
    _train(net, "pretrain", 15)
    weights = dict(net.named_parameters())
    _assert_pruned(weights)
    kept = {name: weights[name] != 0 for name in BALANCES}
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    again = _net(alpha_anneal_epoch=3, **PRUNED)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    _train(again, "retrain", 12)
    for name, mask in kept.items():
        assert torch.equal(dict(again.named_parameters())[name] != 0, mask), name
    assert not torch.equal(dict(again.named_parameters())["rnn.weight_hh_l0"], weights["rnn.weight_hh_l0"])


def test_pruning_from_the_retraining_on() -> None:
    net = _net(**{**PRUNED, "cbtd_from": "retrain"})
    _train(net, "pretrain", 12)
    net.set_phase("eval")
    assert net.masks() == {} and weight_sparsity(dict(net.named_parameters()))["all"] == 0
    _train(net, "retrain", 1)
    _assert_pruned(dict(net.named_parameters()))


def test_pruning_counts_batches_of_an_epoch_and_the_stage() -> None:
    net = _net(alpha_anneal_epoch=4, **PRUNED)
    _train(net, "pretrain", 14)  # rounds after 5 and 10 updates
    assert int(net.pruner.updates) == 14 and net.pruner.alpha(5, 4) == pytest.approx(1 / 3)
    net.set_phase("retrain")
    assert int(net.pruner.updates) == 0 and bool(net.pruner.held)
    _train(net, "retrain", 3)
    again = _net(alpha_anneal_epoch=4, **PRUNED)
    again.load_state_dict(net.state_dict())
    again.set_phase("retrain")
    assert int(again.pruner.updates) == 3, "a resumed stage does not begin again"


# --------------------------------------------------------------------------------------------------------- fixed point


def test_fixed_point_weights_are_stored_as_they_compute() -> None:
    net, (x, _) = _net(qa=1, qw=1, qc=1, qcw=1, thx=0.1, thh=0.1, fc_extra_size=8), _batch()
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(3)
    _train(net, "pretrain", 3)
    net.set_phase("eval")
    logits = net(x)
    assert (logits * 14 * 32 - (logits * 14 * 32).round()).abs().max() < 1e-3, "means of 14 logits Q3.5"
    codes = weight_codes(net, 8)
    for name, parameter in net.named_parameters():
        levels = (parameter.detach() * 128).round() / 128
        torch.testing.assert_close(torch.from_numpy(codes[name].decode()), levels, rtol=0, atol=0)
    with decoded_weights(net, codes):
        torch.testing.assert_close(net(x), logits, rtol=0, atol=0)


def test_class_layer_is_scaled_once_per_epoch() -> None:
    net, (x, _) = _net("pretrain", qc=1, qcw=1, cqi=2, cqf=6, cwqi=4, cwqf=4), _batch()
    net.updates_per_epoch = 2
    with torch.no_grad():
        net.cl.bias.copy_(torch.tensor([6.0, -6, 0, 1, 2]))
    net(x)
    peak = float(net.logit_peak)
    net.project()
    assert peak > 6 and float(net.cl.bias.detach().max()) == 6, "not in the middle of an epoch"
    net(x)
    net.project()
    assert float(net.cl.bias.detach().max()) == pytest.approx(6 * (2 - 1 / 64) / peak)
    assert float(net.logit_peak) == 0


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("loss", ["utterance", "frame"])
def test_clips_shorter_than_head_and_tail_train(frames: int, loss: str) -> None:
    """All frames of a clip that is shorter than label_head + label_tail are silence; loss and gradients are finite."""
    net = _net(loss=loss, decision="last_speech", thx=0.2, thh=0.1, delta_from="pretrain", beta=0.5)
    net.set_phase("pretrain")
    x = torch.randn(5, frames, net.input_size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5) % net.classes
    total = functional.cross_entropy(net(x), labels) + sum(net.penalty().values())
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    if loss == "frame" and frames < 3:
        silent = functional.cross_entropy(net.frame_logits(x).flatten(0, 1), torch.full((5 * frames,), net.silence))
        found = functional.cross_entropy(net(x), labels) + net.penalty()["frames"]
        torch.testing.assert_close(found, silent)
    net.set_phase("eval")
    assert torch.isfinite(net(x)).all()


def test_a_nan_is_seen_in_the_answer() -> None:
    for decision in ("mean_logits", "last_speech"):
        net = _net(decision=decision, thx=0.5, thh=0.5, delta_from="pretrain")
        net.set_phase("eval")
        x = torch.randn(3, 8, net.input_size, generator=torch.Generator().manual_seed(1))
        x[1, 4, 0] = float("nan")
        broken = ~torch.isfinite(net(x)).all(1)
        assert broken.tolist() == [False, True, False]
