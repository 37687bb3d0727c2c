from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kestrel.errors import KestrelError
from kestrel.export.c_pack import pack_rows
from kestrel.lower.graph import IntegerGraph, Mismatch, Program, Scan, State, calibrated_scale, input_codes
from kestrel.lower.ops import Accumulate, AddRequantise, DeltaUpdate, MatMul, Multiply, Requantise
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale

RNG = np.random.default_rng(3)
STATE = Tensor((2,), -100, 100)
HALF = Rescale((1,), 1, -100, 100)


def leaky_sum(next_limits: tuple[int, int] = (-100, 100), initial: Constant | None = None) -> Scan:
    """s' = (s + x) / 2."""
    body = Program()
    body.input("x", Tensor((2,), -50, 50))
    body.input("s", STATE)
    body.add(
        AddRequantise(
            inputs=("s", "x"), outputs=("sum",), multipliers=(1, 1), shift=1, low=next_limits[0], high=next_limits[1]
        )
    )
    state = State("s", "sum", STATE, initial)
    return Scan(
        inputs=("xs",), outputs=("all", "end"), body=body, steps=("x",), states=(state,), emitted=("sum",), last=("s",)
    )


def graph_of(scan: Scan, frames: Tensor) -> IntegerGraph:
    graph = IntegerGraph()
    graph.input("xs", frames)
    graph.add(scan)
    for name in scan.outputs:
        graph.output(name)
    return graph


def test_scan_carries_its_state() -> None:
    initial = Constant.of(np.array([40, -40]))
    graph = graph_of(leaky_sum(initial=initial), Tensor((7, 2), -50, 50))
    x = RNG.integers(-50, 51, (3, 7, 2))
    trace: dict[str, np.ndarray] = {}
    out = graph.run(x, trace=trace)
    for clip, unit in np.ndindex(3, 2):
        state = int(initial.values[unit])
        for step in range(7):
            assert trace["s"][clip, step, unit] == state
            state = round((state + int(x[clip, step, unit])) / 2)
            assert out["all"][clip, step, unit] == state
        assert out["end"][clip, unit] == state
    graph.check_trace(trace)
    assert trace["all"].shape == (3, 7, 2)
    trace["s"][0, 0, 0] = 101
    with pytest.raises(KestrelError, match=r"s: .*101 is outside -100\.\.100"):
        graph.check_trace(trace)


def test_states_are_replaced_together() -> None:
    """Two states that swap: both see the values from before the step."""
    body = Program()
    body.input("x", STATE)
    a, b = body.input("a", STATE), body.input("b", STATE)
    body.add(Requantise(inputs=(b,), outputs=("to_a",), rescale=Rescale((1,), 0, -100, 100)))
    body.add(AddRequantise(inputs=(a, "x"), outputs=("to_b",), multipliers=(1, 1), shift=0, low=-100, high=100))
    states = (State("a", "to_a", STATE), State("b", "to_b", STATE))
    scan = Scan(inputs=("xs",), outputs=("a.end", "b.end"), body=body, steps=("x",), states=states, last=("a", "b"))
    graph = graph_of(scan, Tensor((3, 2), -100, 100))
    out = graph.run(np.array([[[1, 1], [10, 10], [30, 30]]]))
    assert out["a.end"].tolist() == [[10, 10]]
    assert out["b.end"].tolist() == [[31, 31]]


def test_scan_refuses_what_does_not_fit() -> None:
    frames = Tensor((7, 2), -50, 50)
    with pytest.raises(KestrelError, match=r"input 'x' holds -50\.\.50, gets -51\.\.50"):
        graph_of(leaky_sum(), Tensor((7, 2), -51, 50))
    with pytest.raises(KestrelError, match=r"has shape \(2,\), gets \(3,\)"):
        graph_of(leaky_sum(), Tensor((7, 3), -50, 50))
    with pytest.raises(KestrelError, match=r"state 's' holds -100\.\.100, gets -100\.\.101"):
        graph_of(leaky_sum((-100, 101)), frames)
    with pytest.raises(KestrelError, match="gets 0..101"):
        graph_of(leaky_sum(initial=Constant.of(np.array([0, 101]))), frames)
    graph = graph_of(leaky_sum(), frames)
    again = Scan(**{**vars(leaky_sum()), "outputs": ("other", "one")})
    with pytest.raises(KestrelError, match="reuses the name 's'"):
        graph.add(again)


def memories(declared: int, threshold: int = 4, feed: str = "delta", kept: bool = True) -> Scan:
    """m += W delta(x), with |W| sums of 3 and 4."""
    x = Tensor((2,), -50, 50)
    memory = Tensor((2,), -declared, declared)
    body = Program()
    body.input("x", x)
    body.input("ref", x)
    body.input("m", memory)
    body.add(DeltaUpdate(inputs=("x", "ref"), outputs=("delta", "sent"), threshold=threshold))
    weight = Constant.of(np.array([[1, -2], [3, 1]]))
    body.add(Accumulate(inputs=("m", feed), outputs=("m.next",), weight=weight))
    states = (State("ref", "sent" if kept else "ref", x), State("m", "m.next", memory, Constant.of(np.array([9, -7]))))
    return Scan(
        inputs=("xs",),
        outputs=("ms", "end"),
        body=body,
        steps=("x",),
        states=states,
        emitted=("m.next",),
        last=("ref",),
    )


def test_memories_are_bounded_by_what_was_transmitted() -> None:
    frames = Tensor((200, 2), -50, 50)
    least = 4 * 50 + 9  # largest initial value and largest W reference, over all outputs
    graph = graph_of(memories(least), frames)
    with pytest.raises(KestrelError, match=r"state 'm' holds -208\.\.208, gets -207\.\.209"):
        graph_of(memories(least - 1), frames)
    x = np.where(RNG.random((2, 200, 2)) < 0.5, -50, 50)
    x[0, :, 0], x[0, :, 1] = 50, 50
    trace: dict[str, np.ndarray] = {}
    out = graph.run(x, trace=trace)
    graph.check_trace(trace)
    weight = np.array([[1, -2], [3, 1]])
    assert (out["ms"] == np.array([9, -7]) + trace["sent"] @ weight.T).all()


@pytest.mark.parametrize("threshold", [0, 1])
def test_a_threshold_that_everything_passes_transmits_everything(threshold: int) -> None:
    graph = graph_of(memories(300, threshold), Tensor((20, 2), -50, 50))
    trace: dict[str, np.ndarray] = {}
    x = RNG.integers(-50, 51, (4, 20, 2))
    graph.run(x, trace=trace)
    assert (trace["sent"] == x).all()


def test_memories_without_a_proof_are_refused() -> None:
    frames = Tensor((5, 2), -50, 50)
    with pytest.raises(KestrelError, match="'x' is not made by a DeltaUpdate"):
        graph_of(memories(300, feed="x"), frames)
    with pytest.raises(KestrelError, match="references of 'delta' are not a state"):
        graph_of(memories(300, kept=False), frames)


def small_graph() -> IntegerGraph:
    graph = IntegerGraph()
    graph.input("xs", Tensor((4, 2), -50, 50, 0.5))
    graph.add(leaky_sum())
    weight = Constant.of(np.array([[1, 2], [3, 4]]))
    graph.add(MatMul(inputs=("end",), outputs=("product",), weight=weight))
    graph.output(graph.add(Multiply(inputs=("product", "end"), outputs=("y",), rescale=HALF)))
    return graph


def test_first_mismatch_is_the_earliest() -> None:
    graph = small_graph()
    x = RNG.integers(-50, 51, (3, 4, 2))
    first: dict[str, np.ndarray] = {}
    graph.run(x, trace=first)
    assert graph.first_mismatch(first, first) is None
    other = {name: array.copy() for name, array in first.items()}
    other["y"][2, 1] += 1
    assert graph.first_mismatch(first, other) == Mismatch("y", (2, 1), int(first["y"][2, 1]), int(first["y"][2, 1]) + 1)
    other["product"][0, 0] -= 5
    other["all"][1, 3, 0] += 1
    found = graph.first_mismatch(first, other)
    assert found is not None
    assert found.tensor == "all"
    other["sum"][2, 3, 1] += 1
    other["sum"][1, 2, 0] += 2
    found = graph.first_mismatch(first, other)
    assert found is not None
    assert (found.tensor, found.index) == ("sum", (1, 2, 0))  # time step 2 comes before 3
    assert str(found) == f"sum[1, 2, 0]: expected {found.expected}, got {found.actual}"
    del other["sum"]  # an implementation need not show everything
    assert graph.first_mismatch(first, other).tensor == "all"  # type: ignore[union-attr]


def test_run_refuses_wrong_inputs() -> None:
    graph = small_graph()
    with pytest.raises(KestrelError, match="leaves its range"):
        graph.run(np.full((1, 4, 2), 51))
    with pytest.raises(KestrelError, match="takes integers"):
        graph.run(np.zeros((1, 4, 2)))
    with pytest.raises(KestrelError, match="takes integers"):
        graph.run(np.zeros((1, 4, 3), np.int8))
    with pytest.raises(KestrelError, match="does not exist"):
        graph.output("nothing")


def test_all_ops_and_tensors_are_listed_with_their_scan() -> None:
    graph = small_graph()
    assert [(type(op).__name__, scan is not None) for op, scan in graph.all_ops()] == [
        ("Scan", False),
        ("AddRequantise", True),
        ("MatMul", False),
        ("Multiply", False),
    ]
    assert {name for name, _, scan in graph.all_tensors() if scan is not None} == {"x", "s", "sum"}


def test_input_codes_round_half_to_even_and_saturate() -> None:
    tensor = Tensor((4,), -(1 << 15), (1 << 15) - 1, 0.5)
    codes = input_codes(np.array([[0.25, 0.75, 1e9, -1e9]]), tensor)
    assert codes.tolist() == [[0, 2, 32767, -32768]]
    assert codes.dtype == np.int16
    with pytest.raises(KestrelError, match="not finite"):
        input_codes(np.array([[0.0, np.nan, 0.0, 0.0]]), tensor)


@pytest.mark.parametrize(("largest", "scale"), [(21844.0, 1.0), (21845.0, 2.0), (100.0, 2.0**-7), (0.0, 2.0**-54)])
def test_calibrated_scale_is_a_power_of_two_with_headroom(largest: float, scale: float) -> None:
    assert calibrated_scale(largest) == scale
    assert 1.5 * largest <= 32767 * scale


def test_calibrated_scale_needs_finite_features() -> None:
    with pytest.raises(KestrelError, match="stage 2"):
        calibrated_scale(float("nan"))


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.floats(0, 1), st.integers(1, 6), st.integers(1, 60))
def test_zeros_are_left_out_where_it_pays(seed: int, bits: int, share: float, rows: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    values = np.where(rng.random((rows, length)) < share, 0, rng.integers(low, high + 1, (rows, length)))
    constant = Constant(values, f"int{bits}")
    found = constant.compact(values)
    sizes = {storage: pack_rows(values, storage).array.nbytes for storage in (f"sparse{bits}", f"masked{bits}")}
    if bits > 2 and (values[values != 0] % 2).all():
        sizes[f"maskedodd{bits - 1}"] = pack_rows(values, f"maskedodd{bits - 1}").array.nbytes
    dense = rows * math.ceil(length * bits / 8)
    if found.storage == constant.storage:
        assert min(sizes.values()) > 3 / 4 * dense
    else:
        assert sizes[found.storage] == min(sizes.values()) <= 3 / 4 * dense
    np.testing.assert_array_equal(found.values, values)
    assert Constant(values, "int16").compact(values).storage == "int16"
