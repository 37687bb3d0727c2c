"""The super-network and the networks that come out of it."""

from __future__ import annotations

import pytest
import torch

from kestrel.errors import UsageError
from kestrel.models.proxyless import ProxylessNet, SuperNet
from kestrel.recipe import proxylessnas_kws as recipe
from kestrel.settings import build, merge

SHAPE, CLASSES = (21, 6), 4
SMALL = {
    "width_mult": 0.2,
    "width_mix": 72,
    "n_cell_stages": [3],
    "kernels": [3, 7],
    "expansions": [1, 2],
    "act_bits": None,
    "search": {"statistics": "running"},
}


def _super(**settings: object) -> SuperNet:
    torch.manual_seed(0)
    net = recipe.build(build(recipe.ModelSpec, merge(SMALL, settings)), SHAPE, CLASSES)
    assert isinstance(net, SuperNet)
    return net


def _moved(net: SuperNet) -> SuperNet:
    """With alphas apart, and statistics of every candidate."""
    net.set_phase("pretrain")
    with torch.no_grad():
        for alpha in net.alphas():
            alpha.normal_()
        for _ in range(40):
            net(torch.randn(8, *SHAPE))
    return net


def _parts(net: torch.nn.Module, *keys: str) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items() if any(key in name for key in keys)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("quantiser", ["scaled", "dorefa"])
def test_derived_network_equals_the_best_path_bit_for_bit(seed: int, quantiser: str) -> None:
    net = _moved(_super(weight_quantiser=quantiser))
    torch.manual_seed(seed)
    with torch.no_grad():
        for alpha in net.alphas():
            alpha.normal_()
    if seed == 0:  # a block that is skipped
        with torch.no_grad():
            net.alphas()[1][-1] = 9.0
    x = torch.randn(5, *SHAPE)
    net.set_phase("eval")
    derived = net.successor()
    derived.set_phase("eval")
    assert isinstance(derived, ProxylessNet)
    assert derived.architecture.blocks == [
        str(choices[int(alpha.argmax())]) for choices, alpha in zip(net.choices, net.alphas(), strict=True)
    ]
    with torch.no_grad():
        assert torch.equal(net(x), derived(x))
    assert derived.macs(SHAPE[0]) == net.resources[0].of(net.best_path())
    stored = sum(group.tensor.numel() for group in derived.weight_groups())
    assert stored == net.resources[1].of(net.best_path())  # 8 bits each


def test_training_draws_paths_and_leaves_other_candidates_alone() -> None:
    net = _super()
    net.set_phase("pretrain")
    before = _parts(net, "running", "tracked")
    torch.manual_seed(5)
    net(torch.randn(4, *SHAPE)).sum().backward()
    path = [block.taken for block in net.mixed()]
    changed = {key for key, value in before.items() if not torch.equal(net.state_dict()[key], value)}
    for key in changed:
        if "candidates" in key:
            _, block, _, candidate, *_ = key.split(".")
            assert path[int(block)] == int(candidate)
    for index, block in enumerate(net.mixed()):
        for k, candidate in enumerate(block.candidates):
            graded = any(parameter.grad is not None for parameter in candidate.parameters())
            assert graded == (k == path[index])
        assert block.alpha.grad is None
    net(torch.randn(4, *SHAPE))
    paths = []
    for _ in range(8):
        net(torch.randn(2, *SHAPE))
        paths.append(tuple(block.taken for block in net.mixed()))
    assert len(set(paths)) > 1


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_counting_and_validation_leave_statistics_alone(statistics: str) -> None:
    net = _moved(_super(search={"statistics": statistics}))
    before = _parts(net, "running", "tracked")
    net.macs(SHAPE[0])
    net.best_path()
    net.successor()
    net.set_phase("eval")
    with torch.no_grad():
        net(torch.randn(6, *SHAPE))
    net.set_phase("pretrain")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_validation_by_batch_statistics() -> None:
    """As the original validates: the best path under the statistics of the batch."""
    net = _moved(_super(search={"statistics": "batch"}))
    x = torch.randn(6, *SHAPE)
    net.set_phase("eval")
    with torch.no_grad():
        one, half = net(x), net(x[:3])
    assert not torch.allclose(one[:3], half)


def test_best_path_keeps_a_budget() -> None:
    free = _super()
    limit = (free.resources[0].smallest + free.resources[0].largest) // 2
    net = _super(search={"budget_macs": limit})
    with torch.no_grad():
        for alpha, costs in zip(net.alphas(), net.resources[0].blocks, strict=True):
            alpha.copy_(torch.tensor(costs) / 1e4)  # the most expensive ones are the likeliest
    assert free.resources[0].of([int(alpha.argmax()) for alpha in net.alphas()]) > limit
    net.set_phase("eval")
    assert net.successor().macs(SHAPE[0]) <= limit
    assert [block.taken for block in net.mixed()] == net.best_path()


def test_structure_comes_back_with_its_weights() -> None:
    net = _moved(_super())
    derived = net.successor()
    again = _super().with_structure(derived.structure() or {})
    again.load_state_dict(derived.state_dict())
    x = torch.randn(3, *SHAPE)
    for each in (derived, again):
        each.set_phase("eval")
    with torch.no_grad():
        assert torch.equal(derived(x), again(x))


def test_fresh_weights_where_nothing_is_inherited() -> None:
    net = _moved(_super(inherit=False))
    kept, fresh = net.successor(), net.successor(to_train=True)
    assert torch.equal(kept.classifier.weight, net.classifier.weight)
    assert not torch.equal(fresh.classifier.weight, net.classifier.weight)


def test_bits_of_single_layers() -> None:
    model = build(
        recipe.ModelSpec,
        merge(SMALL, {"blocks": "7e2 Z 3e1", "weight_bits": 2, "layer_bits": {"first_conv*": 8, "*depthwise.conv": 4}}),
    )
    net = recipe.build(model, SHAPE, CLASSES)
    net.set_phase("pretrain")
    bits = {group.name: group.bits for group in net.weight_groups()}
    assert bits["first_conv.conv.weight"] == 8
    assert bits["blocks.0.depthwise.conv.weight"] == bits["blocks.2.branch.depthwise.conv.weight"] == 4
    assert bits["blocks.0.project.conv.weight"] == bits["classifier.weight"] == 2
    with pytest.raises(UsageError, match=r"model.layer_bits: no layer can be called 'classifer'"):
        _super(layer_bits={"classifer": 4})


def test_all_bits_train() -> None:
    for bits in (None, 1, 2, 3, 5, 8):
        for quantiser in ("dorefa", "scaled", "symmetric"):
            settings = {"blocks": "7e2 Z 3e1", "weight_bits": bits, "weight_quantiser": quantiser, "act_bits": 4}
            net = recipe.build(build(recipe.ModelSpec, merge(SMALL, settings)), SHAPE, CLASSES)
            net.set_phase("pretrain")
            net(torch.randn(4, *SHAPE)).square().mean().backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"net": "6"}, "unknown value of model.net"),
        ({"kernels": [4]}, "model.kernels: 4 is even"),
        ({"stride_stages": [1, 2]}, "model.stride_stages: 1 stages"),
        ({"blocks": "7e1"}, "model.blocks: 1 blocks, n_cell_stages has 3"),
        ({"search": {"budget_bytes": 10}}, "model.search.budget_bytes: 10 bytes of weights are less than"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _super(**settings)
