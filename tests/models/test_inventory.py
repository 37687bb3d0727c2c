import numpy as np
import pytest
import torch
from torch import nn

from kestrel.errors import KestrelError
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.inventory import (
    OUTSIDE,
    decoded_weights,
    describe_devices,
    device_figures,
    evaluation_noise_of,
    layers,
    noise_off,
    other_parameters,
    parameters,
    weight_codes,
)
from kestrel.models.network import Network, WeightGroup


def _net(**settings):
    torch.manual_seed(0)
    net = BlockLSTM(input_size=5, classes=4, hidden=6, n_msb=2, input_range=4.0, **settings)
    net.set_phase("eval")
    return net


class _Shared(Network):
    """One layer used twice, and a parameter that no layer of the table claims."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.again = self.layer
        self.gain = nn.Parameter(torch.ones(2))

    def layer_table(self, frames):
        return [{"name": "layer", "parameters": 12, "macs": 9 * frames}]

    def weight_groups(self):
        return [WeightGroup("layer.weight", self.layer.weight, None, None)]


def test_a_shared_parameter_counts_once_and_the_table_adds_up():
    net = _Shared()
    assert parameters(net) == 14
    assert layers(net, 5) == [
        {"name": "layer", "parameters": 12, "macs": 45},
        {"name": OUTSIDE, "parameters": 2, "macs": 0},
    ]


def test_layers_of_the_block_lstm_add_up():
    net = _net()
    rows = layers(net, 7)
    assert sum(row["parameters"] for row in rows) == parameters(net)
    # per block: 4 H (I + H) in every frame, H classes at the end
    assert sum(row["macs"] for row in rows) == net.macs(7) == 2 * (4 * 6 * (5 + 6) * 7 + 6 * 4)


def test_analog_weights_get_the_bits_asked_for_and_trained_ones_keep_theirs():
    assert {group.bits for group in weight_codes(_net(), 5).values()} == {5}
    assert {group.bits for group in weight_codes(_net(quant_w=3), 5).values()} == {3}


@pytest.mark.parametrize("weight_range", ["real", "paper"])
def test_weights_trained_with_bits_are_exact_as_codes(weight_range):
    net, x = _net(quant_w=4, weight_range=weight_range), torch.randn(6, 7, 5)
    codes = weight_codes(net, 8)
    for group in net.weight_groups():
        np.testing.assert_allclose(codes[group.name].decode(), group.tensor.numpy(), rtol=1e-6)
    with torch.no_grad():
        before = net(x)
        with decoded_weights(net, codes):
            torch.testing.assert_close(net(x), before)


def test_coarse_codes_change_the_answers_and_the_weights_come_back():
    net, x = _net(), torch.randn(6, 7, 5)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        before = net(x)
        with decoded_weights(net, weight_codes(net, 2)):
            assert (net(x) != before).any()
        assert (net(x) == before).all()
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())


def test_weights_come_back_after_an_error():
    net = _net()
    before = net.lstm.w_ih.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), decoded_weights(net, weight_codes(net, 2)):
        raise RuntimeError("stop")
    assert torch.equal(net.lstm.w_ih, before)


def test_weights_that_are_not_finite_are_an_error():
    net = _net()
    with torch.no_grad():
        net.lstm.w_hh[0, 0, 0] = torch.nan
    with pytest.raises(KestrelError, match=r"'lstm.w_hh' are not finite"):
        weight_codes(net, 8)


def test_every_parameter_is_a_weight_code_or_among_the_others():
    net = _net()
    names = set(weight_codes(net, 8)) | set(other_parameters(net))
    assert names == {name for name, _ in net.named_parameters()}


def test_noise_off_makes_evaluation_repeatable_and_is_undone():
    net, x = _net(noise_eval=0.3), torch.randn(6, 7, 5)
    assert evaluation_noise_of(net) == 0.3
    with torch.no_grad():
        assert (net(x) != net(x)).any()
        with noise_off(net):
            assert (net(x) == net(x)).all()
            assert evaluation_noise_of(net) == 0.0
        assert (net(x) != net(x)).any()
    assert device_figures(net) == {"noise_read": 0.3}
    assert evaluation_noise_of(nn.Linear(2, 2)) == 0.0


def test_noise_off_is_ideal_hardware_and_a_chip_comes_back():
    net, x = _net(noise_program=0.2, adc_offset=1.0), torch.randn(6, 7, 5)
    with torch.no_grad():
        chip = net(x)
        with noise_off(net):
            ideal = net(x)
            assert device_figures(net) == {}
        assert (net(x) == chip).all()
    assert (ideal != chip).any()
    assert describe_devices(device_figures(net)) == "programming noise 0.2 max_w, ADC offset 1 LSB (drawn per column)"
    assert describe_devices({}) == "none"
