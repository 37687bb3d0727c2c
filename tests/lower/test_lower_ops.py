"""Every op against a naive reference with Python integers, and what it refuses."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from kestrel.errors import KestrelError
from kestrel.lower.graph import Program
from kestrel.lower.ops import (
    Accumulate,
    AddRequantise,
    ArgMax,
    Concat,
    Conv2d,
    DeltaUpdate,
    DepthwiseConv2d,
    Interpolate,
    Lookup,
    MatMul,
    MaxPool,
    Multiply,
    Op,
    Requantise,
    Reshape,
    Slice,
    SumPool,
    Transpose,
    Upsample,
    Window,
)
from kestrel.lower.tensor import Constant, Tensor
from kestrel.quant.integer import Rescale

RNG = np.random.default_rng(0)
INT8 = (-128, 127)
HALVES = Rescale((1,), 1, -40, 40)


def tensor(*shape: int, low: int = INT8[0], high: int = INT8[1]) -> Tensor:
    return Tensor(shape, low, high)


def codes(*shape: int, low: int = INT8[0], high: int = INT8[1]) -> np.ndarray:
    return RNG.integers(low, high + 1, (3, *shape))


def rescaled(total: int, rescale: Rescale, channel: int) -> int:
    m = rescale.multipliers[channel % len(rescale.multipliers)]
    o = rescale.offsets[channel % len(rescale.offsets)]
    return max(rescale.low, min(rescale.high, round(Fraction(total * m + o, 1 << rescale.shift))))


def apply(op: Op, *arrays: np.ndarray, shapes: list[Tensor] | None = None) -> np.ndarray:
    """The op in a program of its own; its result must have the shape and range that were inferred."""
    program = Program()
    for place, name in enumerate(op.inputs):
        program.input(name, shapes[place] if shapes else tensor(*arrays[place].shape[1:]))
    name = program.add(op)
    values = dict(zip(op.inputs, arrays, strict=True))
    program.execute(values)
    made = program.tensors[name]
    assert values[name].shape[1:] == made.shape
    assert values[name].min() >= made.low
    assert values[name].max() <= made.high
    return values[name]


def refused(op: Op, *shapes: Tensor) -> str:
    program = Program()
    for name, shape in zip(op.inputs, shapes, strict=True):
        program.input(name, shape)
    with pytest.raises(KestrelError) as caught:
        program.add(op)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one(kind: Any, **fields: Any) -> Op:
    return kind(inputs=("x",), outputs=("y",), **fields)


def two(kind: Any, **fields: Any) -> Op:
    return kind(inputs=("a", "b"), outputs=("y",), **fields)


def test_requantise_per_channel() -> None:
    rescale = Rescale((3, -5, 7), 3, -50, 60, (4, 0, -9))
    x = codes(4, 3)
    y = apply(one(Requantise, rescale=rescale), x)
    for index in np.ndindex(x.shape):
        assert y[index] == rescaled(int(x[index]), rescale, index[-1])
    assert "2 multipliers for 3 channels" in refused(one(Requantise, rescale=Rescale((1, 2), 0, 0, 1)), tensor(3))
    largest, extremes = (1 << 31) - 1, np.array([[-(1 << 31), (1 << 31) - 1]])
    for shift in (0, 31, 62):
        widest = Rescale((largest,), shift, -largest, largest, (-(1 << 31),))
        found = apply(one(Requantise, rescale=widest), extremes, shapes=[Tensor((2,), -(1 << 31), largest)])
        assert found.tolist() == [[rescaled(int(value), widest, 0) for value in extremes[0]]]
    assert "offset has more" in refused(one(Requantise, rescale=Rescale((1,), 0, 0, 1, (1 << 31,))), tensor(3))
    assert "shift 63" in refused(one(Requantise, rescale=Rescale((1,), 63, 0, 1)), tensor(3))
    assert "multiplier has more than" in refused(one(Requantise, rescale=Rescale((1 << 31,), 0, 0, 1)), tensor(3))


def test_add() -> None:
    a, b = codes(5), codes(5)
    y = apply(two(AddRequantise, multipliers=(3, -2), shift=2, low=-60, high=60), a, b)
    for index in np.ndindex(a.shape):
        total = round(Fraction(int(a[index]) * 3 - int(b[index]) * 2, 4))
        assert y[index] == max(-60, min(60, total))
    op = two(AddRequantise, multipliers=(3, -2), shift=2, low=-60, high=60)
    assert "different shapes" in refused(op, tensor(5), tensor(4))
    assert "1 multipliers for 2" in refused(
        two(AddRequantise, multipliers=(3,), shift=2, low=0, high=1), tensor(5), tensor(5)
    )


def test_multiply_with_repeated_axes() -> None:
    a, b = codes(2, 3, 4), codes(1, 1, 4)
    assert (apply(two(Multiply), a, b) == a * b).all()
    y = apply(two(Multiply, rescale=HALVES), a, b)
    for index in np.ndindex(a.shape):
        assert y[index] == rescaled(int(a[index]) * int(b[index[0], 0, 0, index[3]]), HALVES, 0)
    assert "cannot multiply" in refused(two(Multiply), tensor(1, 4), tensor(3, 4))
    wide = Tensor((2,), -(1 << 20), 1 << 20)
    assert "beyond 32 bits" in refused(two(Multiply), wide, wide)


def test_lookup_and_interpolation() -> None:
    table = Constant.of(np.arange(256)[::-1] - 100)
    x = codes(7)
    assert (apply(one(Lookup, table=table, first=-128), x) == 255 - (x + 128) - 100).all()
    assert "covers -127..128" in refused(one(Lookup, table=table, first=-127), tensor(7))
    nodes = Constant.of(np.array([0, 64, -64, 32, 5]))
    y = apply(one(Interpolate, nodes=nodes, first=-128, step_bits=6, low=-50, high=60), x)
    for index in np.ndindex(x.shape):
        place, rest = divmod(int(x[index]) + 128, 64)
        start, end = int(nodes.values[place]), int(nodes.values[place + 1])
        assert y[index] == max(-50, min(60, start + round(Fraction((end - start) * rest, 64))))
    assert "cover" in refused(one(Interpolate, nodes=nodes, first=0, step_bits=6, low=0, high=1), tensor(7))
    steep = Constant.of(np.array([0, 1 << 30]))
    assert "rise of a segment" in refused(
        one(Interpolate, nodes=steep, first=-128, step_bits=8, low=0, high=1), tensor(7)
    )


def test_matmul() -> None:
    weight, bias = Constant.of(RNG.integers(-8, 8, (4, 6)), 4), Constant.of(RNG.integers(-900, 900, 4))
    rescale = Rescale((3, 5, -7, 1), 6, 0, 127, (10, 0, -30, 64))
    x = codes(2, 6)
    raw = apply(one(MatMul, weight=weight, bias=bias), x)
    y = apply(one(MatMul, weight=weight, bias=bias, rescale=rescale), x)
    for clip, step, out in np.ndindex(raw.shape):
        total = int(bias.values[out]) + sum(int(weight.values[out, i]) * int(x[clip, step, i]) for i in range(6))
        assert raw[clip, step, out] == total
        assert y[clip, step, out] == rescaled(total, rescale, out)
    assert "take 6 inputs, there are 5" in refused(one(MatMul, weight=weight), tensor(5))
    assert "4 outputs with a bias" in refused(one(MatMul, weight=weight, bias=Constant.of(np.arange(3))), tensor(6))


@pytest.mark.parametrize("magnitude", [1 << 9, 1 << 20, 1 << 26])
def test_products_are_exact_beyond_float32(magnitude: int) -> None:
    """The oracle multiplies in floating point where that is exact; every width must give the integers."""
    x = RNG.integers(-magnitude, magnitude + 1, (3, 9))
    weight = Constant.of(RNG.integers(-3, 4, (5, 9)), 3)
    y = apply(one(MatMul, weight=weight), x, shapes=[Tensor((9,), -magnitude, magnitude)])
    assert y.tolist() == [
        [sum(int(w) * int(v) for w, v in zip(row, clip, strict=True)) for row in weight.values] for clip in x
    ]


def test_accumulators_that_could_overflow_are_refused() -> None:
    weight = Constant.of(np.full((1, 4), 127))
    fits = (1 << 31) // (4 * 127)
    for limit, fine in ((fits, True), (fits + 1, False)):
        op, shape = one(MatMul, weight=weight), Tensor((4,), -limit, limit)
        if fine:
            assert apply(op, np.full((1, 4), -limit), shapes=[shape]).item() == -limit * 4 * 127
        else:
            assert refused(op, shape).endswith("beyond 32 bits: use fewer weight bits or input bits")


def test_a_partial_sum_that_could_overflow_is_refused() -> None:
    """The whole sum would cancel, but not every order of adding."""
    weight = Constant.of(np.array([[30000, -30000]]))
    assert "beyond 32 bits" in refused(one(MatMul, weight=weight), Tensor((2,), 0, 100_000))


@pytest.mark.parametrize(
    ("stride", "before", "after"), [((1, 1), (0, 0), (0, 0)), ((2, 1), (1, 2), (1, 0)), ((1, 3), (0, 1), (2, 1))]
)
def test_convolutions(stride: tuple[int, int], before: tuple[int, int], after: tuple[int, int]) -> None:
    window = Window((3, 2), stride, before, after)
    weight = Constant.of(RNG.integers(-8, 8, (4, 3, 2, 5)), 4)
    bias = Constant.of(RNG.integers(-99, 99, 4))
    rescale = Rescale((3, 5, 7, 9), 5, -127, 127)
    x = codes(6, 7, 5)
    y = apply(one(Conv2d, weight=weight, window=window, bias=bias, rescale=rescale), x)
    single = Constant.of(RNG.integers(-8, 8, (3, 2, 5)), 4)
    z = apply(one(DepthwiseConv2d, weight=single, window=window), x)
    assert y.shape[1] == (6 + before[0] + after[0] - 3) // stride[0] + 1
    assert y.shape[2] == (7 + before[1] + after[1] - 2) // stride[1] + 1

    def pixel(clip: int, row: int, column: int, channel: int) -> int:
        inside = 0 <= row < 6 and 0 <= column < 7
        return int(x[clip, row, column, channel]) if inside else 0

    taps = list(np.ndindex(3, 2))
    for clip, row, column in np.ndindex(y.shape[:3]):
        corner = (row * stride[0] - before[0], column * stride[1] - before[1])
        for out in range(4):
            total = int(bias.values[out])
            for i, j in taps:
                for c in range(5):
                    total += int(weight.values[out, i, j, c]) * pixel(clip, corner[0] + i, corner[1] + j, c)
            assert y[clip, row, column, out] == rescaled(total, rescale, out)
        for c in range(5):
            total = sum(int(single.values[i, j, c]) * pixel(clip, corner[0] + i, corner[1] + j, c) for i, j in taps)
            assert z[clip, row, column, c] == total


def test_convolutions_refuse_what_does_not_fit() -> None:
    weight = Constant.of(np.ones((4, 3, 3, 5)))
    assert "takes an image" in refused(one(Conv2d, weight=weight, window=Window((3, 3))), tensor(6, 5))
    assert "larger than" in refused(one(Conv2d, weight=weight, window=Window((3, 3))), tensor(2, 6, 5))
    assert "take 5 channels" in refused(one(Conv2d, weight=weight, window=Window((3, 3))), tensor(6, 6, 4))
    assert "the window" in refused(one(Conv2d, weight=weight, window=Window((2, 3))), tensor(6, 6, 5))
    single = Constant.of(np.ones((3, 3, 5)))
    assert "have 5 channels" in refused(one(DepthwiseConv2d, weight=single, window=Window((3, 3))), tensor(6, 6, 4))


def test_pools() -> None:
    window = Window((2, 3), (2, 2))
    share = Rescale.of(1 / 6, INT8)
    x = codes(5, 7, 2)
    largest, mean = apply(one(MaxPool, window=window), x), apply(one(SumPool, window=window, rescale=share), x)
    for clip, row, column, channel in np.ndindex(largest.shape):
        part = x[clip, 2 * row : 2 * row + 2, 2 * column : 2 * column + 3, channel]
        assert largest[clip, row, column, channel] == part.max()
        assert mean[clip, row, column, channel] == rescaled(int(part.sum()), share, 0)
    everything = apply(one(SumPool, window=Window((5, 7))), x)
    assert (everything[:, 0, 0] == x.sum(axis=(1, 2))).all()
    assert "padding is not supported" in refused(one(MaxPool, window=Window((2, 2), before=(1, 1))), tensor(4, 4, 1))


def test_values_are_moved() -> None:
    x = codes(2, 3, 4)
    up = apply(one(Upsample, factor=(2, 3)), x)
    for clip, row, column, channel in np.ndindex(up.shape):
        assert up[clip, row, column, channel] == x[clip, row // 2, column // 3, channel]
    assert (apply(one(Slice, start=1, stop=3, axis=1), x) == x[:, :, 1:3]).all()
    assert (apply(one(Reshape, shape=(8, 3)), x) == x.reshape(3, 8, 3)).all()
    assert (apply(one(Transpose, axes=(2, 0, 1)), x) == np.transpose(x, (0, 3, 1, 2))).all()
    y = codes(2, 1, 4)
    assert (apply(two(Concat, axis=1), x, y) == np.concatenate([x, y], axis=2)).all()
    assert apply(one(ArgMax), np.array([[3, 9, 9], [1, 1, 0]])).tolist() == [[1], [0]]
    assert "outside 0..2" in refused(one(Slice, start=1, stop=3, axis=0), tensor(2, 3))
    assert "cannot shape" in refused(one(Reshape, shape=(5,)), tensor(2, 3))
    assert "do not order" in refused(one(Transpose, axes=(0, 0)), tensor(2, 3))
    assert "cannot join" in refused(two(Concat, axis=0), tensor(2, 3), tensor(2, 4))
    assert "takes a vector" in refused(one(ArgMax), tensor(2, 3))


def test_delta_update() -> None:
    op = DeltaUpdate(inputs=("x", "r"), outputs=("d", "next"), threshold=3)
    x, reference = np.array([[5, 4, 3, -9, 0]]), np.array([[2, 2, 3, -5, 0]])
    delta, following = op.run(x, reference)
    assert delta.tolist() == [[3, 0, 0, -4, 0]]  # equality passes
    assert following.tolist() == [[5, 2, 3, -9, 0]]
    made = op.infer(tensor(5), tensor(5, low=-4, high=300))
    assert (made[0].low, made[0].high) == (-428, 428)
    assert (made[1].low, made[1].high) == (-128, 300)
    assert "negative" in refused(DeltaUpdate(inputs=("x", "r"), outputs=("d", "n"), threshold=-1), tensor(5), tensor(5))


def test_accumulate() -> None:
    weight = Constant.of(RNG.integers(-8, 8, (4, 6)), 4)
    memory, delta = codes(4, low=-999, high=999), codes(6)
    op = Accumulate(inputs=("m", "d"), outputs=("y",), weight=weight)
    assert (op.run(memory, delta)[0] == memory + delta @ weight.values.T).all()
    assert "take 6 inputs" in refused(op, tensor(4), tensor(5))
    assert "make 4 outputs" in refused(op, tensor(3), tensor(6))


@pytest.mark.parametrize(
    ("storage", "fine", "wrong"),
    [
        ("int4", [-8, 7], [8]),
        ("ternary", [-1, 0, 1], [2]),
        ("binary", [-1, 1], [0]),
        ("odd2", [-3, -1, 1, 3], [2]),
        ("odd4", [-15, 15], [17]),
    ],
)
def test_constants_hold_what_their_storage_says(storage: str, fine: list[int], wrong: list[int]) -> None:
    assert Constant(np.array(fine), storage).values.tolist() == fine
    with pytest.raises(KestrelError, match="do not fit"):
        Constant(np.array(wrong), storage)


def test_storage_of_constants_and_tensors() -> None:
    assert [Constant.of(np.array([v])).storage for v in (127, -129, 1 << 20)] == ["int8", "int16", "int32"]
    assert Constant.of(np.array([1]), 12).storage == "int16"
    with pytest.raises(KestrelError, match="32 bits"):
        Constant.of(np.array([1 << 40]))
    assert [Tensor((3,), 0, high).bits for high in (127, 128, 32768)] == [8, 16, 32]
    assert Tensor((3, 5), 0, 200).bytes == 30
    with pytest.raises(KestrelError, match="32 bits"):
        Tensor((3,), 0, 1 << 31)


def test_programs_refuse_unknown_and_repeated_names() -> None:
    program = Program()
    program.input("x", tensor(3))
    with pytest.raises(KestrelError, match="'z' does not exist yet"):
        program.add(Reshape(inputs=("z",), outputs=("y",), shape=(3,)))
    with pytest.raises(KestrelError, match="exists already"):
        program.add(Reshape(inputs=("x",), outputs=("x",), shape=(3,)))
    with pytest.raises(KestrelError, match="2 inputs, takes 1"):
        program.add(Reshape(inputs=("x", "x"), outputs=("y",), shape=(3,)))
