"""The energy model against every figure that its authors published, and properties of it."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import UsageError
from kestrel.hw import accelerator, cim
from kestrel.hw.spec import ISCAS21_CIM, load_cim
from kestrel.hw.workload import LSTMWork

SPEC = load_cim()
# Published with the paper: blocks of method 0 (each scores 3 of 12 classes at 4 blocks), the base point.
BASE = LSTMWork(
    inputs=40, hidden=114, steps=50, blocks=4, outputs=3, dac_bits=4, adc_bits=6, digital_bits=8, bias_rows=6
)
ONE = dataclasses.replace(BASE, blocks=1, outputs=12)
METHOD1 = dataclasses.replace(BASE, outputs=12, sums=36)


def total(**changes: int) -> float:
    return cim.energy(dataclasses.replace(BASE, **changes), SPEC).total_uj


def digital(**changes: int) -> float:
    return accelerator.energy(dataclasses.replace(BASE, **changes), SPEC).total_uj


def test_components_of_a_step_and_a_block():
    energy = cim.energy(BASE, SPEC)
    step = {part.name: part.step_pj for part in energy.parts if part.step_pj is not None}
    assert step == pytest.approx(
        {
            "cells": 140.448,
            "DAC": 24.576,
            "ADC": 125304.832,
            "multiply": 1571.328,
            "add": 35.568,
            "sigmoid": 426.36,
        },
        abs=1e-6,
    )
    assert energy.step_pj == pytest.approx(127503.112, abs=1e-6)
    assert energy.readout_pj == pytest.approx(15757.148, abs=1e-6)
    readout = {part.name: part.readout_pj for part in energy.parts}
    assert readout["ADC"] == pytest.approx(15663.104) and readout["DAC"] == pytest.approx(3.072)
    assert readout["multiply"] == pytest.approx(90.288) and readout["cells"] == pytest.approx(0.684)


def test_one_and_four_blocks():
    assert cim.energy(ONE, SPEC).total_uj == pytest.approx(6.3909148, abs=1e-9)
    assert round(cim.energy(ONE, SPEC).total_uj, 3) == 6.391
    assert total() == pytest.approx(25.563650992, abs=1e-9)
    assert round(total(), 3) == 25.564


@pytest.mark.parametrize(
    ("blocks", "outputs", "published"),
    [(1, 12, 6.3909148), (2, 6, 12.781826864), (3, 4, 19.172738928), (4, 3, 25.563650992), (6, 2, 38.34547512)],
)
def test_blocks_of_method_0(blocks, outputs, published):
    assert total(blocks=blocks, outputs=outputs) == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize(("blocks", "published"), [(2, 6.732), (3, 13.464), (4, 20.196), (5, 26.928), (6, 33.66)])
def test_the_sum_of_method_1_takes_picojoules(blocks, published):
    """Published: energy of method 1 minus method 0, in pJ; 12 additions for each further block."""
    energy = cim.energy(dataclasses.replace(METHOD1, blocks=blocks, sums=12 * (blocks - 1)), SPEC)
    assert 1e6 * energy.components["summation"] == pytest.approx(published, abs=1e-6)


def test_method_1_at_the_base_point():
    assert cim.energy(METHOD1, SPEC).total_uj == pytest.approx(25.563671188, abs=1e-5)


@pytest.mark.parametrize(
    ("bits", "published"),
    [(2, 5.11786), (3, 6.48442), (4, 9.21753), (5, 14.63120), (6, 25.56365), (7, 47.37600), (8, 91.00069)],
)
def test_adc_bits(bits, published):
    assert total(adc_bits=bits) == pytest.approx(published, abs=0.03)  # the goal is 0.1


@pytest.mark.parametrize(
    ("bits", "published"),
    [
        (2, 25.559955376),
        (3, 25.560571312),
        (5, 25.564882864),
        (6, 25.569810352),
        (7, 25.57165816),
        (8, 25.578433456),
    ],
)
def test_dac_bits(bits, published):
    assert total(dac_bits=bits) == pytest.approx(published, abs=1e-9)


@pytest.mark.parametrize(
    ("bits", "published"), [(2, 25.26355184), (4, 25.324124128), (6, 25.424422016), (10, 25.742742368), (12, 25.961025)]
)
def test_digital_bits(bits, published):
    assert total(digital_bits=bits) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(
    ("hidden", "arrays", "published"),
    [
        (114, 8, 25.563650992),
        (200, 16, 50.966170304),
        (300, 28, 88.986191904),
        (400, 44, 139.571154304),
        (500, 72, 227.786939104),
    ],
)
def test_units(hidden, arrays, published):
    work = dataclasses.replace(BASE, hidden=hidden)
    assert cim.step_arrays(work, SPEC) == arrays
    assert cim.energy(work, SPEC).total_uj == pytest.approx(published, abs=1e-8)


def test_digital_comparison_at_six_bits():
    """Published in nJ per step and block; 361.7 uJ for four blocks."""
    energy = accelerator.energy(dataclasses.replace(BASE, digital_bits=6), SPEC)
    step = {part.name: (part.step_pj or 0) / 1e3 for part in energy.parts}
    assert step["MAC"] == pytest.approx(23.25, abs=0.01)
    assert step["sigmoid"] == pytest.approx(0.43, abs=0.005)
    assert step["partial sums"] == pytest.approx(107.9, abs=0.05)
    assert step["weights"] == pytest.approx(107.9, abs=0.05)
    assert step["inputs"] == pytest.approx(54.8, abs=0.05)
    assert step["global buffer"] == pytest.approx(1514.29, abs=0.01)
    assert energy.total_uj == pytest.approx(361.7355, abs=0.01)


@pytest.mark.parametrize(
    ("bits", "published"), [(2, 357.583), (4, 359.143), (8, 365.265), (10, 369.770), (12, 375.252)]
)
def test_digital_comparison_at_other_bits(bits, published):
    assert digital(digital_bits=bits) == pytest.approx(published, rel=1.5e-3)


@pytest.mark.parametrize(("hidden", "published"), [(200, 981.591), (300, 2078.539), (400, 3579.335), (500, 5484.531)])
def test_digital_comparison_at_other_sizes(hidden, published):
    assert digital(hidden=hidden, digital_bits=6) == pytest.approx(published, rel=5e-4)


@pytest.mark.parametrize(("hidden", "published"), [(118, 95.0524), (344, 665.2699)])
def test_lstm_accelerator_baseline(hidden, published):
    """Single LSTMs at 8 bits, 49 steps of 40 values; constants were not fitted to them."""
    assert digital(hidden=hidden, blocks=1, outputs=12, steps=49) == pytest.approx(published, rel=1e-3)


def test_lstm_accelerator_baseline_that_the_model_does_not_give():
    """214 units were published at 375.5 uJ, 37 % above the law that the two other sizes follow."""
    assert digital(hidden=214, blocks=1, outputs=12, steps=49) == pytest.approx(275.0, abs=0.1)


def test_advantage_over_the_digital_baseline():
    baseline = digital(hidden=118, blocks=1, outputs=12, steps=49)
    assert round(baseline / cim.energy(METHOD1, SPEC).total_uj, 1) == 3.7


def test_area_and_cycles_give_the_published_point_and_say_that_they_are_estimates():
    area, latency = cim.area(METHOD1, SPEC), cim.latency(METHOD1, SPEC)
    assert (area.mm2, area.arrays, area.estimate) == (pytest.approx(25.209), 36, True)
    assert (latency.cycles, latency.seconds, latency.estimate) == (2862, None, True)


def test_a_clock_gives_seconds():
    spec = dataclasses.replace(SPEC, estimate=dataclasses.replace(SPEC.estimate, clock_hz=2e6))
    assert cim.latency(METHOD1, spec).seconds == pytest.approx(2862 / 2e6)


def test_bias_rows_are_counted_where_the_file_says_so():
    spec = dataclasses.replace(SPEC, crossbar=dataclasses.replace(SPEC.crossbar, count_bias_rows=True))
    assert cim.step_cells(BASE, spec) - cim.step_cells(BASE, SPEC) == 4 * 114 * 2 * 6
    assert cim.readout_cells(BASE, spec) - cim.readout_cells(BASE, SPEC) == 3 * 6
    wide = dataclasses.replace(BASE, hidden=400)
    assert (cim.step_arrays(wide, SPEC), cim.step_arrays(wide, spec)) == (44, 48)


WORKS = st.builds(
    LSTMWork,
    inputs=st.integers(1, 200),
    hidden=st.integers(1, 600),
    steps=st.integers(1, 120),
    blocks=st.integers(1, 12),
    outputs=st.integers(1, 40),
    sums=st.integers(0, 100),
    dac_bits=st.integers(2, 15),
    adc_bits=st.integers(2, 15),
    digital_bits=st.integers(2, 15),
    bias_rows=st.integers(0, 10),
    passes=st.integers(1, 8),
)
GROWING = (
    "inputs",
    "hidden",
    "steps",
    "blocks",
    "outputs",
    "sums",
    "dac_bits",
    "adc_bits",
    "digital_bits",
    "passes",
)


@settings(max_examples=150, deadline=None)
@given(WORKS, st.sampled_from(GROWING))
def test_more_work_never_costs_less(work, name):
    more = dataclasses.replace(work, **{name: getattr(work, name) + 1})
    before, after = cim.energy(work, SPEC), cim.energy(more, SPEC)
    assert after.total_uj > before.total_uj
    assert all(after.components[part] >= value - 1e-15 for part, value in before.components.items())
    assert cim.area(more, SPEC).mm2 >= cim.area(work, SPEC).mm2
    assert cim.latency(more, SPEC).cycles >= cim.latency(work, SPEC).cycles
    assert accelerator.energy(more, SPEC).total_uj >= accelerator.energy(work, SPEC).total_uj


@settings(max_examples=100, deadline=None)
@given(WORKS, st.integers(2, 5))
def test_blocks_cost_their_number_times_one(work, blocks):
    work = dataclasses.replace(work, sums=0, blocks=1)
    many = dataclasses.replace(work, blocks=blocks)
    assert cim.energy(many, SPEC).total_uj == pytest.approx(blocks * cim.energy(work, SPEC).total_uj)
    assert cim.area(many, SPEC).arrays == blocks * cim.area(work, SPEC).arrays
    assert cim.latency(many, SPEC) == cim.latency(work, SPEC)


@settings(max_examples=100, deadline=None)
@given(WORKS)
def test_the_total_is_what_steps_and_read_outs_take(work):
    energy = cim.energy(work, SPEC)
    in_blocks = work.blocks * (work.steps * energy.step_pj + energy.readout_pj) * 1e-6
    assert energy.total_uj == pytest.approx(in_blocks + energy.components["summation"])
    assert all(value >= 0 for value in energy.components.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_arrays_hold_all_cells(inputs, hidden):
    work = dataclasses.replace(BASE, inputs=inputs, hidden=hidden)
    assert cim.step_arrays(work, SPEC) * 128 * 128 >= cim.step_cells(work, SPEC)
    naive = sum(-(-rows * hidden // (128 * 128)) for rows in (inputs, hidden) for _ in range(4))
    assert cim.step_arrays(work, SPEC) == naive


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("adc_bits", 1, "2..16"),
        ("dac_bits", 17, "2..16"),
        ("digital_bits", -8, "2..16"),
        ("hidden", 0, ">= 1"),
        ("steps", 2.5, ">= 1"),
        ("sums", -1, ">= 0"),
    ],
)
def test_work_out_of_bounds_names_field_and_bounds(name, value, bounds):
    with pytest.raises(UsageError, match=f"{name} = {value} is out of bounds .*{bounds}") as caught:
        dataclasses.replace(BASE, **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cell_pj: 0.002 ", "cell_pj: -1 ", r"crossbar\.cell_pj: -1\.0 is out of bounds \(>= 0\)"),
        ("rows: 128", "rows: 0", r"crossbar\.rows: 0 is out of bounds \(1\.\.65536\)"),
        ("rows: 128", "rows: many", r"crossbar\.rows: expected int, not 'many'"),
        ("  cell_pj:", "  cel_pj:", r"crossbar\.cell_pj is missing \(a cell in one product\)"),
        ("  area_arrays: 36 ", "  area_arrays: 36\n  are: 1 ", r"unknown key 'estimate\.are'"),
        ("estimate:", "guess:", "estimate is missing"),
        ("mac_pj: 0.33112 ", "mac_pj: .nan ", "accelerator.mac_pj: nan is not a finite number"),
    ],
)
def test_wrong_constants_are_one_line_with_the_key(tmp_path, old, new, message):
    text = ISCAS21_CIM.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "iscas21_cim.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        load_cim(path)
    assert str(caught.value).startswith("iscas21_cim.yaml: ") and "\n" not in str(caught.value)


def test_missing_file_of_constants_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml: No such file"):
        load_cim(tmp_path / "none.yaml")
