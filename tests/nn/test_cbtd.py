"""Column-balanced targeted dropout: exact balance, naive reference, annealing, masks that persist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kestrel.errors import UsageError
from kestrel.nn.cbtd import (
    Balance,
    Pruner,
    assert_balanced,
    pack_mask,
    target_mask,
    unpack_mask,
    weight_sparsity,
    work_per_element,
)

torch.set_num_threads(1)


def naive_mask(weight: np.ndarray, gamma: float, pes: int) -> np.ndarray:
    keep = np.ones(weight.shape, bool)
    for element in range(pes):
        for column in range(weight.shape[1]):
            part = np.abs(weight[element::pes, column])
            count = int(np.floor(gamma * len(part) + 1e-9))
            keep[element::pes, column][np.argsort(part, kind="stable")[:count]] = False
    return keep


@settings(max_examples=40, deadline=None)
@given(
    pes=st.sampled_from([1, 2, 4, 16]),
    local=st.integers(1, 17),
    columns=st.integers(1, 5),
    gamma=st.floats(0, 0.99),
    seed=st.integers(0, 99),
)
def test_balance_is_exact_and_the_smallest_go(pes: int, local: int, columns: int, gamma: float, seed: int) -> None:
    weight = torch.randn(pes * local, columns, generator=torch.Generator().manual_seed(seed))
    balance = Balance(gamma, pes)
    mask = target_mask(weight, balance)
    assert np.array_equal(mask.numpy(), naive_mask(weight.numpy(), gamma, pes))
    assert (work_per_element(weight * mask, balance) == local - int(np.floor(gamma * local + 1e-9))).all()
    assert_balanced(mask, balance, "weight")


def test_published_sizes() -> None:
    assert Balance(0.7, 16).dropped(192) == 8 and Balance(0.7, 16).kept(192) == 4  # 66.7 %
    assert Balance(15 / 16, 64).kept(4096) == 4
    weight = torch.randn(1024, 30)
    mask = target_mask(weight, Balance(15 / 16, 64))
    assert weight_sparsity({"w": weight * mask, "bias": torch.zeros(9)}) == {"w": 15 / 16, "all": 15 / 16}


def test_groups_of_rows_stay_together() -> None:
    weight = torch.randn(256, 7)
    balance = Balance(0.75, 1, 16)
    mask = target_mask(weight, balance)
    groups = mask.view(16, 16, 7)
    assert (groups.all(1) | ~groups.any(1)).all() and (groups[:, 0].sum(0) == 4).all()
    norms = weight.abs().view(16, 16, 7).sum(1)
    assert torch.where(groups[:, 0], norms, torch.inf).amin(0).ge(torch.where(groups[:, 0], 0, norms).amax(0)).all()
    assert_balanced(mask, balance, "weight")
    broken = mask.clone()
    broken[0] = ~broken[0]
    with pytest.raises(AssertionError, match="weight: processing elements keep"):
        assert_balanced(broken, balance, "weight")


def test_errors_name_the_settings() -> None:
    with pytest.raises(UsageError, match=r"weight has 190 rows.*num_array_pe = 16"):
        target_mask(torch.zeros(190, 2), Balance(0.5, 16))
    with pytest.raises(UsageError, match="out of bounds"):
        target_mask(torch.zeros(16, 2), Balance(1.0, 16))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_packed_masks_come_back(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and len(packed) == -(-rows * columns // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def _network() -> tuple[nn.Module, Pruner, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(12, 64))
    return net, Pruner(net, {"0.weight": Balance(0.75, 16)}), dict(net.named_parameters())


def test_annealing_then_holding() -> None:
    _, pruner, weights = _network()
    weight, start = weights["0.weight"], weights["0.weight"].detach().clone()
    shares, grown = [], False
    for update in range(1, 13):  # rounds of 2 updates, alpha 0, 1/4, 1/2, 3/4, 1
        zero = weight.detach() == 0
        with torch.no_grad():
            weight += 0.001 * start.sign()
        pruner.after_update(weights, interval=2, anneal=5)
        if update % 2 == 0 and update <= 10:
            assert pruner.alpha(2, 5) == pytest.approx((update / 2 - 1) / 4)
            shares.append(float((weight == 0).double().mean()))
        elif update < 10:
            grown |= bool((zero & (weight != 0)).any())
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == 0.75
    assert 0.1 < shares[1] < 0.3 and 0.28 < shares[2] < 0.5
    assert grown, "pruned weights may regrow while alpha is below 1"
    assert bool(pruner.held) and float((weight == 0).double().mean()) == 0.75
    assert (work_per_element(weight, Balance(0.75, 16)) == 1).all()


def test_masks_persist_and_a_resumed_pruning_draws_the_same() -> None:
    results = []
    for stop in (None, 7):
        net, pruner, weights = _network()
        for update in range(12):
            if update == stop:
                saved, masks = net.state_dict(), pruner.state_dict()
                net, pruner, weights = _network()
                pruner.key.zero_()
                net.load_state_dict(saved)
                pruner.load_state_dict(masks)
            with torch.no_grad():
                weights["0.weight"] += 0.01 * torch.sin(torch.arange(64 * 12.0).view(64, 12) * (update + 1))
            pruner.after_update(weights, 2, 10)
        results.append(weights["0.weight"].detach().clone())
    assert torch.equal(*results)
    _, pruner, weights = _network()
    pruner.hold(weights)
    mask = pruner.mask("0.weight", torch.Size((64, 12)))
    _, other, foreign = _network()
    other.load_state_dict(pruner.state_dict())
    with torch.no_grad():
        foreign["0.weight"].normal_()
    other.find(foreign)
    assert torch.equal(other.mask("0.weight", mask.shape), mask), "masks that hold are not found anew"
    other.restart()
    other.after_update(foreign, 2, 10)
    assert not foreign["0.weight"][~mask].any()
