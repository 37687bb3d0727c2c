"""Networks of quantised layers: stages, schedules, counts, and what their checkpoints hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lower_kit import FRAMES, features
from quant_kit import LowBitNet, trained

from kestrel.errors import UsageError
from kestrel.frontend.post import Post
from kestrel.models.compact import compact, state_of
from kestrel.models.inventory import OUTSIDE, layers, parameters, weight_codes
from kestrel.models.quant_net import LowBitPlan
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.low_bit import QuantActivation
from kestrel.score.count import thop_check


def quantised(net: LowBitNet) -> tuple[bool, bool]:
    """Whether (weights, activations) are quantised in the next forward pass."""
    weights = {layer.quantised for layer in net.low_bit_layers().values()}
    activations = {m.quantised for m in net.modules() if isinstance(m, QuantActivation)}
    assert len(weights) == len(activations) == 1
    return weights.pop(), activations.pop()


@pytest.mark.parametrize(
    ("start", "wanted"), [("pretrain", [True, True]), ("retrain", [False, True]), ("never", [False, False])]
)
def test_full_precision_first(start: str, wanted: list[bool]) -> None:
    net = LowBitNet(LowBitPlan(start=start))  # type: ignore[arg-type]
    found = []
    for stage in ("pretrain", "retrain"):
        net.set_phase(stage)  # type: ignore[arg-type]
        net(features(0, 4))
        before = quantised(net)
        net.set_phase("eval")
        assert quantised(net) == before
        found.append(before[0])
    assert found == wanted


def test_a_delay_trains_in_full_precision_but_validates_quantised() -> None:
    net = LowBitNet(LowBitPlan(delay=1))
    net.updates_per_epoch = 3
    net.set_phase("pretrain")
    net(features(0, 4))
    net.set_phase("retrain")
    seen = []
    for _ in range(5):
        seen.append(quantised(net)[0])
        net.set_phase("eval")
        assert quantised(net)[0]
        net.set_phase("retrain")
        net.project()
    assert seen == [False, False, False, True, True]


def test_activations_can_stay_in_full_precision() -> None:
    net = LowBitNet(LowBitPlan(start="pretrain", activations=False))
    assert quantised(net) == (True, False)
    with net.deployed():
        assert quantised(net) == (True, True)
    assert quantised(net) == (True, False)


def test_layers_may_have_grids_of_their_own() -> None:
    net = LowBitNet(LowBitPlan("2bit", layers={"*": "4bit", "first": "8bit", "out": "float"}))
    grids = {name: layer.grid and layer.grid.name for name, layer in net.low_bit_layers().items()}
    assert grids == {"first": "8bit", "depthwise": "4bit", "embed": "4bit", "expand": "4bit", "out": None}
    codes = weight_codes(trained(net), 6)
    assert [codes[f"{name}.weight"].bits for name in grids] == [8, 4, 4, 4, 6]
    with pytest.raises(UsageError, match=r"layer_weights: no layer is called 'firts'"):
        LowBitNet(LowBitPlan(layers={"firts": "8bit"}))
    with pytest.raises(UsageError, match=r"model.weights: unknown weight quantiser"):
        LowBitNet(LowBitPlan("9bit"))


def test_pruning_reaches_its_share_and_survives_the_next_steps() -> None:
    net = trained(LowBitNet(LowBitPlan("4bit", prune=0.5, prune_not=("first", "out"))), steps=12)
    assert net.pruner is not None
    assert bool(net.pruner.held)
    shares = {n: float((x.effective_weight() == 0).float().mean()) for n, x in net.low_bit_layers().items()}
    assert min(shares[name] for name in ("depthwise", "embed", "expand")) >= 0.49
    assert net.low_bit_layers()["first"].mask is None
    codes = weight_codes(net, 8)["embed.weight"].codes
    assert (codes == 0).mean() >= 0.49
    assert net.weight_sparsity() > 0.25


def test_a_checkpoint_brings_everything_back() -> None:
    plan = LowBitPlan("4bitsym", prune=0.5)
    net = trained(LowBitNet(plan, ranges="learned"))
    other = LowBitNet(plan, ranges="learned")
    other.load_state_dict(net.state_dict())
    other.set_phase("eval")
    x = features(8, 10)
    with torch.no_grad():
        assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("grid", ["8bit", "4bitsym", "ternary", "fp130"])
def test_compact_checkpoints_compute_the_same(grid: str) -> None:
    post = Post([], (FRAMES, 10))
    spotter = KeywordSpotter(post, trained(LowBitNet(LowBitPlan(grid))))
    other = KeywordSpotter(post, LowBitNet(LowBitPlan(grid)))
    other.load_state_dict(state_of(compact(spotter, 8)))
    other.net.set_phase("eval")
    x = features(8, 10)
    with torch.no_grad():
        assert torch.equal(spotter.net(x), other.net(x))


def test_counts_are_exact() -> None:
    net = LowBitNet()
    rows = {row["name"]: row for row in layers(net, FRAMES)}
    assert rows["first"]["macs"] == 9 * 6 * 6 * 10
    assert rows["depthwise"]["macs"] == 9 * 12 * 6 * 10
    assert rows["embed"]["macs"] == 12 * 4 * 3 * 5
    assert rows["expand"]["macs"] == 4 * 6 * 6 * 10
    assert rows["out"]["macs"] == 6 * 5
    assert rows["norm1"] == {"name": "norm1", "parameters": 12, "macs": 0, "output": [6, 6, 10]}
    assert rows[OUTSIDE]["parameters"] == 1  # the strength of the attention
    assert sum(row["parameters"] for row in rows.values()) == parameters(net)
    check = thop_check(net, FRAMES, 10)
    assert check.skipped == []
    # thop counts one operation of each bias beside the products
    assert check.compared is not None
    assert abs(check.compared - net.macs(FRAMES)) <= 12 * 60 + 6 * 60 + 5
    assert net.phase == "pretrain"


def test_weight_groups_hold_what_is_computed_with() -> None:
    net = trained(LowBitNet(LowBitPlan("4bitsym")))
    for group in net.weight_groups():
        assert group.codes is not None
        assert (group.codes.decode() == group.tensor.numpy()).all()
    stored = sum(codes.stored_bytes for codes in weight_codes(net, 8).values())
    weights = sum(np.prod(codes.codes.shape) for codes in weight_codes(net, 8).values())
    scales = sum(codes.scale.size for codes in weight_codes(net, 8).values())
    assert stored == -(-weights // 2) + 4 * scales
