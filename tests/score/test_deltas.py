"""Sparsity, multiply-adds and cycles of delta networks, against counting one by one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import score_kit
import torch

from kestrel.errors import UsageError
from kestrel.frontend.post import Post
from kestrel.hw.delta_network import delta_layers, pruned_layers, trace_meter
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.evaluate import predict
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.delta_cell import GATES, transmit
from kestrel.score import deltas
from kestrel.score.run import score

FILES = ("sparsity.csv", "sparsity.png", "deltas.png")


def spotter(**model: object) -> KeywordSpotter:
    torch.manual_seed(2)
    post = Post([{"normalise": "channel"}], (score_kit.FRAMES, score_kit.WIDTH))
    post.fit([torch.from_numpy(score_kit.clips(50)[0])])
    settings = {"rnn_size": 16, "delta_from": "pretrain", "thx": 0.5, "thh": 0.1, **model}
    net = DeltaNetwork(input_size=score_kit.WIDTH, classes=len(score_kit.CLASSES), **settings)
    net.set_phase("eval")
    return KeywordSpotter(post, net)


def counted(model: KeywordSpotter, features: torch.Tensor) -> list[tuple[int, int]]:
    """Zero deltas of inputs and of states of one clip [1, T, F], by layer, one frame after the other."""
    net = model.net
    assert isinstance(net, DeltaNetwork)
    sequence, found = model.post(features)[0], []
    for layer in range(net.rnn.num_layers):
        weights, theta, hidden = net.rnn.layer_weights(layer), net.rnn.thresholds[layer], net.rnn.hidden_size
        one = type(net.rnn)(sequence.shape[1], hidden, thx=theta.x, thh=theta.h)
        for name, value in zip(weights._fields, weights, strict=True):
            part = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}[name]
            getattr(one, f"{part}_l0").data.copy_(value)
        out = one(sequence[None], path="plain").h[0].detach()
        x_ref, h_ref, before, zeros = torch.zeros_like(sequence[0]), torch.zeros(hidden), torch.zeros(hidden), [0, 0]
        for x, after in zip(sequence, out, strict=True):
            delta_x, x_ref = transmit(x, x_ref, theta.x)
            delta_h, h_ref = transmit(before, h_ref, theta.h)
            zeros[0] += int((delta_x == 0).sum())
            zeros[1] += int((delta_h == 0).sum())
            before = after
        found.append((zeros[0], zeros[1]))
        sequence = out
    return found


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_sparsity_of_layers_and_clips(kind: str, tmp_path: Path) -> None:
    model = spotter(rnn_type=kind, rnn_layers=2)
    data = score_kit.feature_file(tmp_path, 20)
    with deltas.recorded(model.net) as transmitted:
        predict(model, data, 7)
    assert transmitted is not None and isinstance(model.net, DeltaNetwork)
    found = deltas.study(model.net, transmitted, "spartus")
    naive = np.array([counted(model, torch.from_numpy(data.rows(np.array([row])))) for row in range(20)])  # [20, 2, 2]
    sizes = score_kit.FRAMES * np.array([[score_kit.WIDTH, 16], [16, 16]])
    for layer, shares in enumerate(found.by_layer.values()):
        np.testing.assert_allclose(shares[:, :2], naive[:, layer] / sizes[layer])
        np.testing.assert_allclose(shares[:, 2], naive[:, layer].sum(1) / sizes[layer].sum())
    np.testing.assert_allclose(found.clips[:, 2], naive.sum((1, 2)) / sizes.sum())
    assert found.whole.pooled == pytest.approx(naive.sum() / sizes.sum() / 20)
    dense = GATES[model.net.rnn.kind] * 16
    for layer, name in enumerate(found.layers):
        expected = dense * (20 * sizes[layer].sum() - naive[:, layer].sum()) / (20 * score_kit.FRAMES)
        assert found.macs[name].temporal == found.macs[name].both == pytest.approx(expected)
    assert found.macs["all"].dense == model.net.macs(1)
    assert found.figures is not None and found.figures.occupancy == pytest.approx(1 - found.whole.pooled)


def test_pruned_weights_and_their_balance() -> None:
    net = spotter(cbtd_from="pretrain", gamma_rnn=0.75, num_array_pe=4).net
    assert isinstance(net, DeltaNetwork)
    (own,) = delta_layers(net)
    assert (own.nonzeros, own.pes, own.gates, own.columns) == (3, 4, 3, score_kit.WIDTH + 16)
    (coarse,) = pruned_layers(net, 2)
    assert coarse.nonzeros == 6  # an element does the work of two
    masks = np.concatenate([mask.numpy() for mask in net.masks().values()], axis=1)
    (fine,) = pruned_layers(net, 64)  # 48 rows: elements have a row or none
    assert fine.nonzeros == masks.max() == 1
    (whole,) = delta_layers(spotter().net)
    assert (whole.nonzeros, whole.pes) == (None, None)
    rows = spotter(cbtd_from="pretrain", gamma_rnn=0.75, num_array_pe=1, cbtd_group=4).net
    (grouped,) = delta_layers(rows)
    assert (grouped.nonzeros, grouped.pes) == (3, 4)  # groups of neighbouring rows lie in different elements


def test_other_networks_and_machines(tmp_path: Path) -> None:
    with deltas.recorded(score_kit.spotter().net) as transmitted:
        assert transmitted is None
    with pytest.raises(UsageError, match="unknown accelerator"):
        trace_meter(spotter().net, "spartacus")


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_score_says_what_is_saved(threshold: float, tmp_path: Path) -> None:
    model = spotter(thx=threshold, thh=threshold, cbtd_from="pretrain", gamma_rnn=0.75, num_array_pe=4)
    data = score_kit.feature_file(tmp_path / "features", 30)
    result = score(
        model,
        data,
        tmp_path / "score",
        identity=score_kit.IDENTITY,
        split="test",
        seed=0,
        chip=0,
        machine="edge_spartus",
        batch_size=16,
        provenance=score_kit.PROVENANCE,
        feature_scale=score_kit.FEATURE_SCALE,
    )
    assert result == json.loads((tmp_path / "score" / "result.json").read_text())
    weights = result["sparsity"]["weights"]
    assert weights["rnn.weight_ih_l0"] == weights["rnn.weight_hh_l0"] == 0.75 and weights["cl.weight"] == 0
    assert 0.6 < result["weight_sparsity"] < 0.75
    assert result["temporal_sparsity"] == result["sparsity"]["pooled"]
    if not threshold:
        assert result["temporal_sparsity"] < 0.1  # the first state is 0, and so is its change
    assert result["accelerator"]["machine"] == "edge_spartus" and result["accelerator"]["speedup"] > 1
    report = (tmp_path / "score" / "report.md").read_text()
    assert "## Sparsity" in report and "## Cycles on an accelerator (model)" in report
    assert all((tmp_path / "score" / name).stat().st_size > 0 for name in FILES)
    rows = list(csv.DictReader((tmp_path / "score" / "sparsity.csv").open()))
    assert [int(row["position"]) for row in rows] == list(range(30))
    mean = np.mean([float(row["pooled"]) for row in rows])
    assert mean == pytest.approx(result["temporal_sparsity"], abs=1e-5)
    cycles = np.mean([float(row["cycles_per_frame"]) for row in rows])
    assert cycles == pytest.approx(result["accelerator"]["cycles"]["mean"], abs=0.01)
