"""From a network to its figures, and what reports, cards and pictures show of them."""

import json

import pytest
from matplotlib import image
from torch import nn

from kestrel.errors import KestrelError
from kestrel.hw.markdown import section, summary
from kestrel.hw.network import hardware, lstm_work
from kestrel.models.block_lstm import BlockLSTM
from kestrel.score.plots import energy_bars


def network(**changes) -> BlockLSTM:
    return BlockLSTM(**{"input_size": 40, "classes": 12, "hidden": 114, "n_msb": 4, "method": 0, **changes})


def test_a_network_is_counted_at_its_own_size_and_steps():
    figures, obstacle = hardware(network(), 50)
    assert obstacle == "" and figures is not None
    assert figures.energy.total_uj == pytest.approx(25.563650992, abs=1e-9)
    assert figures.digital is not None and figures.digital.total_uj == pytest.approx(365.3, abs=0.1)
    short, _ = hardware(network(hidden=64, n_msb=2), 25)
    assert short is not None and "2 blocks of 64 units, 40 inputs, 25 steps" in short.setup
    assert short.energy.total_uj < figures.energy.total_uj / 3.9


@pytest.mark.parametrize(
    ("model", "outputs", "sums"),
    [
        ({"method": 0, "n_msb": 4}, 3, 0),
        ({"method": 0, "n_msb": 5}, 3, 0),
        ({"method": 1, "n_msb": 4}, 12, 36),
        ({"method": 1, "n_msb": 1}, 12, 0),
        ({"method": 2, "n_msb": 4, "gain_blocks": 2}, 6, 12),
        ({"method": 2, "n_msb": 6, "gain_blocks": 3}, 6, 24),
    ],
)
def test_scores_of_each_method(model, outputs, sums):
    work = lstm_work(network(**model), 50)
    assert (work.outputs, work.sums, work.blocks) == (outputs, sums, model["n_msb"])


@pytest.mark.parametrize("name", ["quant_inp", "quant_actMVM", "quant_actNM"])
@pytest.mark.parametrize("bits", [None, 0])
def test_analog_signals_have_no_energy(name, bits):
    figures, obstacle = hardware(network(**{name: bits}), 50)
    assert figures is None
    assert f"model.{name} is null (analog)" in obstacle and "2..16" in obstacle and "\n" not in obstacle
    assert section(None, obstacle).endswith(f"Not estimated: {obstacle}.")


def test_other_networks_have_no_model_yet():
    assert hardware(nn.Linear(2, 2), 50) == (None, "there is no hardware model of Linear")


def test_record_is_plain_and_adds_up():
    figures, _ = hardware(network(method=1), 50)
    assert figures is not None
    record = json.loads(json.dumps(figures.record()))
    assert record["energy_uj"] == pytest.approx(25.563679)
    energy = record["energy"]
    assert sum(energy["components"].values()) == pytest.approx(record["energy_uj"], abs=1e-5)
    assert sum(energy["digital_components"].values()) == pytest.approx(energy["digital_uj"], abs=1e-5)
    assert (energy["area_mm2"], energy["cycles"], energy["arrays"]) == (25.209, 2862, 36)
    assert energy["estimates"] == ["area_mm2", "cycles"] and energy["model"] == "iscas21_cim"


def test_section_and_log_line():
    figures, _ = hardware(network(method=1), 50)
    assert figures is not None
    text = section(figures, "")
    assert "**25.564 µJ per decision**" in text and "nothing was measured" in text
    assert "| ADC | 25.124 | 98.28 % | 125,304.832 | 15,663.104 |" in text
    assert "| area | 25.2 mm², 36 arrays | estimate, scaled from one published point |" in text
    assert "2,862 cycles" in text
    line = summary(figures)
    assert line.startswith("energy 25.564 µJ per decision by model iscas21_cim (ADC 98.3 %)") and "\n" not in line


def rows(bits=(4, 6, 8)):
    found = []
    for value in bits:
        figures, _ = hardware(network(quant_actMVM=value), 50)
        found.append((f"{value} bits", figures.energy.components))
    return found


def test_energy_bars_are_reproducible_and_give_small_parts_a_panel(tmp_path):
    for name in "ab":
        energy_bars(rows(), tmp_path / f"{name}.png", "ADC bits")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    energy_bars([("even", {"a": 1.0, "b": 1.0, "c": 1.0})], tmp_path / "one.png")
    wide, narrow = (image.imread(tmp_path / name).shape[1] for name in ("a.png", "one.png"))
    assert wide > 1.3 * narrow


@pytest.mark.parametrize("empty", [[], [("nothing", {})], [("zero", {"ADC": 0.0})]])
def test_energy_bars_without_energy(tmp_path, empty):
    with pytest.raises(KestrelError, match="no energy to draw"):
        energy_bars(empty, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
