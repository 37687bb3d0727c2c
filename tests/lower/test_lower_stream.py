"""Graphs cut in time: rates, queues, memory, the narrow form, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from kestrel.digits import signed_digits
from kestrel.errors import KestrelError
from kestrel.lower import ops
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.narrow import few_bits, narrow_form
from kestrel.lower.ops import Window
from kestrel.lower.stream import stream_program
from kestrel.lower.stream_steps import Keep, Pool, Repeat, queues
from kestrel.lower.stream_steps import Window as WindowStep
from kestrel.lower.tensor import Tensor
from kestrel.quant.integer import INT32, Rescale
from tests.lower.stream_kit import LIMITS, Maker, picture, spotter


def test_narrow_form_answers_like_the_wide_one() -> None:
    maker = spotter(0)
    narrow = narrow_form(maker.graph)
    features = maker.features_of(60)
    wide, found = maker.graph.run(features)["logits"], narrow.run(features)["logits"]
    assert (wide.argmax(1) == found.argmax(1)).mean() > 0.9
    assert np.abs(wide - found).mean() < 0.05 * np.abs(wide).mean()


def test_narrow_form_stays_in_32_bits() -> None:
    """Every partial sum of digits, for every value on the way, with extreme features."""
    for maker in (spotter(1, "odd4"), picture()):
        graph = narrow_form(maker.graph)
        trace: dict[str, np.ndarray] = {}
        graph.run(maker.features_of(8), trace=trace)
        for op in graph.ops:
            rescale = getattr(op, "rescale", None)
            if rescale is None:
                continue
            assert isinstance(rescale, Rescale)
            x = trace[op.inputs[0]]
            if hasattr(op, "accumulate"):
                x = op.accumulate(x)
            elif isinstance(op, ops.Multiply):
                x = x * trace[op.inputs[1]]
            elif isinstance(op, ops.SumPool):
                x = op.window.views(x).sum(axis=(4, 5))
            offsets = np.broadcast_to(rescale.offsets, x.shape[-1])
            for channel, m in enumerate(np.broadcast_to(rescale.multipliers, x.shape[-1]).tolist()):
                digits = signed_digits(m)
                assert len(digits) <= 3 and all(exponent < 16 for _, exponent in digits)
                total = np.zeros(x.shape[:-1], np.int64)
                for sign, exponent in digits:
                    total = total + sign * (x[..., channel] << exponent)
                    assert INT32[0] <= total.min() and total.max() <= INT32[1]
                total = total + offsets[channel] + (1 << rescale.shift)
                assert INT32[0] <= total.min() and total.max() <= INT32[1]


def test_few_bits_are_near() -> None:
    ratios = [0.013, -0.4, 0.09, 0.0]
    multipliers, shift = few_bits(ratios, 20_000)
    for m, ratio in zip(multipliers, ratios, strict=True):
        assert abs(m / 2**shift - ratio) <= 0.04 * abs(ratio) + 2.0 ** -(shift + 1)
    assert few_bits([0.0], 5) == ([0], 0) and few_bits([0.25], 100) == ([1], 2)
    with pytest.raises(KestrelError, match="no digits in 32 bits"):
        few_bits([0.5], 1 << 31)


def test_channels_without_gain_keep_their_offset() -> None:
    maker = Maker(0, frames=4, width=3)
    x = maker.codes()
    op = ops.Conv2d(
        inputs=(x,), outputs=("y",), weight=maker_weight(maker, 2, 3), window=Window((1, 1)),
        rescale=Rescale.of([0.0, 0.01], LIMITS, [17.0, 3.0]),
    )  # fmt: skip
    maker.graph.add(op)
    graph = narrow_form(maker.finish("y", 2))
    trace: dict[str, np.ndarray] = {}
    graph.run(maker.features_of(3), trace=trace)
    assert (trace["y"][..., 0] == 17).all()


def maker_weight(maker: Maker, outputs: int, inputs: int) -> ops.Constant:
    return ops.Constant(maker.rng.integers(-7, 8, (outputs, 1, 1, inputs)), "int4")


def test_rates_and_queues() -> None:
    program = stream_program(narrow_form(spotter().graph))
    kinds = [type(step).__name__ for step in program.steps]
    assert kinds.count("Repeat") == 1 and kinds.count("Keep") == 1 and kinds[-1] == "Pool"
    stem = next(step for step in program.steps if isinstance(step, WindowStep))
    assert (stem.size, stem.stride, stem.first) == (3, 2, 3)
    causal = [step for step in program.steps if isinstance(step, WindowStep) and step.size == 5]
    assert [(step.stride, step.first) for step in causal] == [(1, 1)] * 3
    (queue,) = (step for step in program.steps if isinstance(step, Keep))
    assert queue.depth == 2 and len(queue.readers) == 2  # gate and residual wait for the pooled columns
    assert {key[0] for key in queues(program)} == set(queue.readers)
    assert any(isinstance(step, Repeat) and step.factor == 2 for step in program.steps)


def test_memory_holds_columns_not_clips() -> None:
    program = stream_program(narrow_form(spotter().graph))
    kept = 3 * 20 + 24 + 2 * 24 + 3 * 5 * 24 + 4 * 24 * 2  # stem, running pool, queue, blocks, segments
    assert program.state == kept
    assert program.scratch <= 64 + 4 * 64 + 128 + 24 + 24 + 2 * 24
    longer = stream_program(narrow_form(spotter(frames=97).graph))
    assert (longer.state, longer.scratch) == (program.state, program.scratch)


def test_segments() -> None:
    graph = narrow_form(spotter().graph)
    for segments in (1, 2, 3, 6, 24):
        (pool,) = (step for step in stream_program(graph, segments).steps if isinstance(step, Pool))
        assert (pool.segments, pool.columns) == (segments, 24 // segments)
    with pytest.raises(KestrelError, match="24 columns cannot be cut into 7"):
        stream_program(graph, 7)


def refused(build, match: str, **settings) -> None:
    maker = Maker(0, frames=12, width=4, **settings)
    with pytest.raises(KestrelError, match=match):
        stream_program(narrow_form(maker.finish(build(maker, maker.codes()), 3)))


def test_refusals() -> None:
    refused(lambda m, x: m.depthwise(x, Window((3, 1), before=(1, 0), after=(1, 0))), "zeros after the clip")
    refused(lambda m, x: m.depthwise(x, Window((3, 1), before=(3, 0))), "zeros only")
    refused(lambda m, x: m.add(ops.Slice, x, start=2, stop=8), "last frames can be cut off")
    refused(
        lambda m, x: m.add(ops.Transpose, x, axes=(2, 1, 0)), "time is|global in time|moves values|zeros|global pool"
    )
    refused(
        lambda m, x: m.pointwise(m.add(ops.Requantise, x, rescale=Rescale((9,), 0, -1000, 1000)), 3), "products take 8"
    )

    def lengths(m: Maker, x: str) -> str:
        pooled = m.add(ops.MaxPool, x, window=Window((2, 1), (2, 1)))
        return m.residual(m.add(ops.Upsample, pooled, factor=(2, 1)), m.depthwise(x, Window((2, 1), before=(1, 0))))

    stream_program(narrow_form(_finished(lengths)))


def _finished(build) -> IntegerGraph:
    maker = Maker(0, frames=12, width=4)
    return maker.finish(build(maker, maker.codes()), 3)


def test_last_frames_may_be_left_out() -> None:
    maker = Maker(0, frames=13, width=4)
    cut = maker.add(ops.Slice, maker.features, start=0, stop=12)
    codes = maker.add(ops.Requantise, cut, rescale=Rescale.of(1 / 3, LIMITS))
    image = maker.add(ops.Reshape, codes, shape=(12, 1, 4))
    program = stream_program(narrow_form(maker.finish(maker.conv(image, 3, Window((3, 1), (3, 1))), 3)))
    assert program.streams["features"].length == 12


def test_only_pooled_clips() -> None:
    graph = IntegerGraph()
    x = graph.input("features", Tensor((6, 4), -128, 127, 1.0))
    graph.output(graph.add(ops.Requantise(inputs=(x,), outputs=("logits",), rescale=Rescale((1,), 0, -128, 127))))
    with pytest.raises(KestrelError, match="ends with a global pool"):
        stream_program(graph)
