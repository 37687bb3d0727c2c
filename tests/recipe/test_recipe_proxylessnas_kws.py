"""The recipe's files: settings of the paper, published networks, sweeps, and a search handed on between stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_kit import ROOT

from kestrel.errors import UsageError
from kestrel.models.architecture import to_file
from kestrel.models.proxyless import ProxylessNet, SuperNet
from kestrel.pipeline.config import variant_data
from kestrel.recipe import proxylessnas_kws as recipe
from kestrel.settings import build


def _model(variant: str, **settings: object) -> recipe.ModelSpec:
    data = variant_data(ROOT, "proxylessnas_kws", variant)
    return build(recipe.ModelSpec, {**data["model"], **settings}, "model")


def test_base_is_the_paper() -> None:
    model = _model("base")
    torch.manual_seed(0)
    net = recipe.build(model, (51, 10), 12)
    assert isinstance(net, SuperNet)
    assert [len(choices) for choices in net.choices] == [18, *[19] * 11]
    alphas = torch.cat([alpha.detach() for alpha in net.alphas()])
    assert 0.0008 < float(alphas.std()) < 0.0012
    assert net.first_conv.norm.eps == 1e-3 and net.first_conv.norm.momentum == 0.1
    groups = {group.name: group.bits for group in net.successor().weight_groups()}
    assert set(groups.values()) == {8}
    levels = net.first_conv.conv.grid
    assert levels is not None and levels.name == "dorefa8"


@pytest.mark.parametrize(
    ("variant", "macs", "weights"), [("net-5", 3_404_088, 42_200), ("net-wm0.75_5", 4_605_944, 44_100)]
)
def test_published_networks_build(variant: str, macs: int, weights: int) -> None:
    net = recipe.build(_model(variant), (51, 10), 12)
    assert isinstance(net, ProxylessNet)
    assert net.macs(51) == macs == sum(row["macs"] for row in net.layer_table(51))
    assert sum(group.tensor.numel() for group in net.weight_groups()) == pytest.approx(weights, abs=100)


def test_low_bits_keep_the_first_and_the_last_layer() -> None:
    for variant, bits in (("net-5+4w8a", 4), ("net-5+2w8a", 2), ("net-5+1w8a", 1)):
        net = recipe.build(_model(variant), (49, 10), 12)
        net.set_phase("pretrain")
        found = {group.name: group.bits for group in net.weight_groups()}
        assert found.pop("first_conv.conv.weight") == found.pop("classifier.weight") == 8
        assert set(found.values()) == {bits}


def test_quantisation_begins_where_the_settings_say() -> None:
    for variant, begun in (
        ("net-5+8w8a", (True, True)),
        ("net-5+8w8a+qat", (False, True)),
        ("net-5+float", (False, False)),
    ):
        net = recipe.build(_model(variant), (49, 10), 12)
        found = []
        for phase in ("pretrain", "retrain"):
            net.set_phase(phase)
            found.append(all(layer.quantised for layer in net.low_bit_layers().values()))
            assert net.first_conv.act.quantised == net.input.quantised == found[-1]
        assert tuple(found) == begun


def test_an_architecture_file_is_trained(tmp_path: Path) -> None:
    named = recipe.architecture(_model("net-5"))
    assert named is not None
    path = tmp_path / "found.yaml"
    path.write_text(to_file(named))
    again = recipe.architecture(_model("given", net=str(path)))
    assert again == named


def test_a_network_that_was_not_published_is_named() -> None:
    with pytest.raises(UsageError, match="wm0.75_5"):
        recipe.architecture(_model("given", net="wm0.75_55"))


def test_initial_weights_follow_the_fan() -> None:
    torch.manual_seed(0)
    by_output, by_input = (
        recipe.build(_model("net-5", model_init=init), (49, 10), 12) for init in ("he_fout", "he_fin")
    )
    for net, fan in ((by_output, 144), (by_input, 72)):
        deviation = float(net.get_submodule("feature_mix.conv").weight.detach().std())  # type: ignore[union-attr]
        assert deviation == pytest.approx((2 / fan) ** 0.5, rel=0.05)
