import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import UsageError
from kestrel.hw.delta_cycles import (
    DeltaLayer,
    check_trace,
    dense,
    dense_cycles,
    layer_cycles,
    loads,
    network_cycles,
    place,
)
from kestrel.hw.delta_spec import (
    MACHINES,
    ActivationSpec,
    ComputeSpec,
    DeltaSpec,
    MemorySpec,
    NumbersSpec,
    load_machine,
)
from kestrel.hw.spec import FOLDER


def machine(
    arrays=2, pes=4, clock=1000, skips=True, weight=8, index=None, latency=3, interval=2, units=4, rate=None, request=0
):
    return DeltaSpec(
        ComputeSpec(arrays, pes, clock, skips),
        NumbersSpec(weight, index, 16),
        ActivationSpec(latency, interval, units),
        MemorySpec("on-chip" if rate is None else "dram", rate, request, None),
        power_w=2.0,
        assumed=[],
    )


def naive(layer, trace, spec):
    """Cycles of each step with loops over columns, weights and bits."""
    pes, arrays = spec.compute.pes, spec.compute.arrays
    local = math.ceil(layer.rows / pes)
    sparse = layer.nonzeros is not None and spec.compute.skips_zero_weights
    index = (
        (math.ceil(math.log2(local)) if spec.numbers.index_bits is None else spec.numbers.index_bits) if sparse else 0
    )
    beats = layer.nonzeros if sparse else local
    result = []
    for step in trace:
        busy = [0] * arrays
        bits = requests = 0
        for column, active in enumerate(step):
            if not active:
                continue
            requests += spec.memory.request_cycles
            for _ in range(beats):
                busy[column % arrays] += 1
                bits += pes * (spec.numbers.weight_bits + index)
        product = max(busy)
        transfer = requests
        if spec.memory.bytes_per_second is not None:
            transfer += math.ceil(Fraction(bits * spec.compute.clock_hz, 8 * spec.memory.bytes_per_second))
        activation = spec.activation.latency
        for _ in range(0, layer.hidden, spec.activation.units):
            activation += spec.activation.interval
        result.append(max(product, transfer) + activation)
    return result


@st.composite
def cases(draw):
    gates = draw(st.sampled_from([3, 4]))
    inputs, hidden = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    pes = draw(st.integers(1, 8))
    nonzeros = draw(st.one_of(st.none(), st.integers(0, math.ceil(gates * hidden / pes))))
    spec = machine(
        arrays=draw(st.integers(1, 5)),
        pes=pes,
        clock=draw(st.integers(1, 10**9)),
        skips=draw(st.booleans()),
        weight=draw(st.integers(1, 16)),
        index=draw(st.one_of(st.none(), st.integers(0, 8))),
        latency=draw(st.integers(0, 9)),
        interval=draw(st.integers(0, 5)),
        units=draw(st.integers(1, 6)),
        rate=draw(st.one_of(st.none(), st.integers(1, 10**9))),
        request=draw(st.integers(0, 3)),
    )
    steps = draw(st.integers(1, 4))
    bits = draw(st.lists(st.integers(0, 1), min_size=steps * (inputs + hidden), max_size=steps * (inputs + hidden)))
    trace = np.array(bits, dtype=np.uint8).reshape(steps, inputs + hidden)
    return DeltaLayer(inputs, hidden, gates, nonzeros), trace, spec


@settings(max_examples=150, deadline=None)
@given(cases())
def test_cycles_are_those_of_loops(case):
    layer, trace, spec = case
    found = layer_cycles(layer, trace, spec)
    assert found.cycles.tolist() == naive(layer, trace, spec)
    parts = found.even + found.imbalance + found.memory + found.activation
    np.testing.assert_allclose(parts, found.cycles)
    assert (found.imbalance > -1e-9).all() and (found.memory >= 0).all()
    assert (found.active_inputs + found.active_hidden).tolist() == trace.sum(axis=1).tolist()
    assert (found.work <= spec.compute.arrays * spec.compute.pes * (found.cycles - found.activation)).all()


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_a_further_active_column_never_takes_less_time(case, data):
    layer, trace, spec = case
    more = trace.copy()
    more[:, data.draw(st.integers(0, layer.columns - 1))] = 1
    assert (layer_cycles(layer, more, spec).cycles >= layer_cycles(layer, trace, spec).cycles).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_fewer_weights_faster_memory_and_a_dense_bound(case):
    layer, trace, spec = case
    base = layer_cycles(layer, trace, spec).cycles
    if layer.nonzeros:
        fewer = dataclasses.replace(layer, nonzeros=layer.nonzeros - 1)
        assert (layer_cycles(fewer, trace, spec).cycles <= base).all()
    if spec.memory.bytes_per_second:
        memory = dataclasses.replace(spec.memory, bytes_per_second=2 * spec.memory.bytes_per_second)
        assert (layer_cycles(layer, trace, dataclasses.replace(spec, memory=memory)).cycles <= base).all()
    assert (layer_cycles(dense(layer), trace, spec).cycles <= dense_cycles((layer,), spec)).all()


def test_dense_step_by_hand():
    # 6 columns on 2 arrays = 3 each; 4 * 4 rows on 4 PEs = 4 beats; activation 3 + 2 * ceil(4 / 4)
    layer = DeltaLayer(2, 4, 4)
    found = layer_cycles(layer, np.ones((1, 6), dtype=np.uint8), machine())
    assert found.cycles.tolist() == [3 * 4 + 3 + 2] and dense_cycles((layer, layer), machine()) == 34
    assert found.imbalance.tolist() == [0] and found.work.tolist() == [layer.dense_macs]


def test_step_without_deltas_takes_the_activation_alone():
    found = layer_cycles(DeltaLayer(2, 4, 3), np.zeros((5, 6), dtype=bool), machine(rate=1, request=9))
    assert found.cycles.tolist() == [5] * 5 and not found.work.any() and not found.weight_bits.any()


def test_worst_array_decides():
    layer, spec = DeltaLayer(4, 4, 4), machine(latency=0, interval=0)
    spread = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], dtype=np.uint8)
    heaped = np.array([[1, 0, 1, 0, 1, 0, 1, 0]], dtype=np.uint8)  # even columns: all on array 0
    assert layer_cycles(layer, spread, spec).cycles.tolist() == [2 * 4]
    found = layer_cycles(layer, heaped, spec)
    assert found.cycles.tolist() == [4 * 4] and found.imbalance.tolist() == [8.0]
    assert loads(heaped != 0, 2).tolist() == [[4, 0]] and loads(heaped != 0, 3).sum() == 4


def test_weights_from_dram_bound_the_product():
    layer = DeltaLayer(2, 4, 4)
    trace = np.ones((1, 6), dtype=np.uint8)
    slow = layer_cycles(layer, trace, machine(clock=1000, rate=3000))  # 96 bytes at 3 bytes a cycle
    assert slow.cycles.tolist() == [32 + 5] and slow.memory.tolist() == [32 - 12]
    assert layer_cycles(layer, trace, machine(rate=3000, request=2)).cycles.tolist() == [32 + 12 + 5]
    assert layer_cycles(layer, trace, machine(rate=10**6)).memory.tolist() == [0]


def test_transfers_whose_bits_times_clock_exceed_64_bits_are_exact():
    spec = machine(arrays=1, pes=65536, clock=10**12, weight=64, rate=10**9 + 7)
    layer, trace = DeltaLayer(100, 1, 4), np.ones((1, 101), dtype=np.uint8)
    assert 101 * 65536 * 64 * 10**12 // 8 > 2**63
    assert layer_cycles(layer, trace, spec).cycles.tolist() == naive(layer, trace, spec)


def test_pruned_columns_take_k_beats_and_carry_an_index():
    layer = DeltaLayer(123, 1024, 4, nonzeros=4)
    spec = load_machine("spartus")
    placed = place(layer, spec)
    assert (placed.beats, placed.column_macs, placed.column_bits) == (4, 256, 4 * 64 * (8 + 6))
    assert place(dense(layer), spec).beats == 64
    # zero weights take a cycle as well where the machine cannot skip them
    assert place(DeltaLayer(40, 256, 3, nonzeros=0), load_machine("deltarnn")).beats == 1


def test_balance_for_more_pes_holds_on_a_divisor_of_them():
    layer = DeltaLayer(16, 64, 4, nonzeros=1, pes=16)
    assert place(layer, machine(pes=16)).beats == 1
    assert place(layer, machine(pes=4)).beats == 4
    with pytest.raises(UsageError, match=r"balanced for 16 PEs.*prune for a multiple of 32"):
        place(layer, machine(pes=32))
    with pytest.raises(UsageError, match="nonzeros = 9 is out of bounds"):
        place(DeltaLayer(2, 8, 4, nonzeros=9), machine(pes=4))


def test_rows_that_do_not_fill_the_pes_are_no_work():
    found = layer_cycles(DeltaLayer(1, 3, 3), np.ones((1, 4), dtype=np.uint8), machine(pes=4, arrays=1))
    assert found.work.tolist() == [9 * 4] and found.cycles.tolist() == [3 * 4 + 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 4, 3), "inputs = 0 is out of bounds"),
        ((4, 2.5, 3), "hidden = 2.5 is out of bounds"),
        ((4, 4, 2), r"gates = 2 is out of bounds \(3 for a GRU, 4 for an LSTM\)"),
        ((4, 4, 3, -1), "nonzeros = -1 is out of bounds"),
        ((4, 4, 3, 4, 4), r"nonzeros = 4 is out of bounds \(0..3: 12 rows on 4 PEs\)"),
        ((4, 4, 3, 1, 0), "pes = 0 is out of bounds"),
    ],
)
def test_wrong_layers(values, message):
    with pytest.raises(UsageError, match=message):
        DeltaLayer(*values)


@pytest.mark.parametrize("trace", [np.zeros(6, np.uint8), np.zeros((2, 5), np.uint8), np.zeros((0, 6), np.uint8)])
def test_traces_of_another_shape(trace):
    with pytest.raises(UsageError, match=r"expected \[steps, 6\] with at least 1 step"):
        check_trace(DeltaLayer(2, 4, 3), trace)


def test_traces_of_other_types_and_of_other_networks():
    layer = DeltaLayer(2, 4, 3)
    with pytest.raises(UsageError, match="type float32; expected uint8 or bool"):
        check_trace(layer, np.zeros((2, 6), np.float32))
    one, two = np.zeros((1, 6), np.uint8), np.zeros((2, 6), np.uint8)
    with pytest.raises(UsageError, match="traces of 1 layers for a network of 2"):
        network_cycles((layer, layer), [one], machine())
    with pytest.raises(UsageError, match=r"have \[1, 2\] steps"):
        network_cycles((layer, layer), [one, two], machine())


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_loads_and_says_what_it_assumes(name):
    spec = load_machine(name)
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert spec.name == name and spec.assumed and spec.peak_ops > 0
    for key in spec.assumed:  # the comment of the line says so as well
        line = next(line for line in text.splitlines() if line.strip().startswith(key.split(".")[-1] + ":"))
        assert "assumed" in line, key
    marked = [line for line in text.splitlines() if "# assumed" in line]
    assert len(marked) == len(spec.assumed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pes: 64 ", "pes: 0 ", r"compute\.pes: 0 is out of bounds \(1\.\.65536\)"),
        ("  interval:", "  intervall:", r"activation\.interval is missing"),
        ("weights: on-chip", "weights: tape", r"memory\.weights"),
        ("weights: on-chip", "weights: dram", r"memory\.bytes_per_second is null; weights in DRAM need a bandwidth"),
        ("[compute.arrays,", "[compute.array,", r"unknown key in assumed 'compute\.array'; did you mean"),
        ("power_w: 8.5", "power_w: 0", r"power_w: 0.0 is out of bounds \(> 0"),
    ],
)
def test_wrong_constants_are_one_line_with_the_key(tmp_path, old, new, message):
    text = (FOLDER / "spartus.yaml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "spartus.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        load_machine("spartus", tmp_path)
    assert str(caught.value).startswith("spartus.yaml: ") and "\n" not in str(caught.value)


def test_machines_of_other_names(tmp_path):
    with pytest.raises(UsageError, match="unknown accelerator 'spartan'; did you mean 'spartus'"):
        load_machine("spartan")
    (tmp_path / "mine.yaml").write_text((FOLDER / "spartus.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_machine("mine", tmp_path).name == "mine"
