"""Storage of columns without their zeros: sizes, the choice among layouts, and what is packed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import KestrelError
from kestrel.export.c_pack import Packed, pack_rows
from kestrel.lower.columns import balanced_layout, best_layout, groups_layout, layout_of
from kestrel.lower.ops import Accumulate, MatMul
from kestrel.lower.tensor import Constant, Tensor, leaves_out_zeros, sparse_row_bytes


def columns(rng: np.random.Generator, rows: int, count: int, share: float, group: int = 1) -> np.ndarray:
    """int8 [count, rows], of which (groups of) rows are kept with probability `share`."""
    keep = np.repeat(rng.random((count, rows // group)) < share, group, axis=1)
    return rng.integers(-128, 128, (count, rows)) * keep


def unpacked(packed: Packed, rows: int) -> np.ndarray:
    """Written from kestrel.h, value by value; a padding of 0 changes nothing."""
    found = np.zeros((len(packed.array), rows), np.int64)
    lanes = packed.lanes
    for column, data in zip(found, packed.array.astype(np.int64), strict=True):
        signed = np.where(data > 127, data - 256, data)
        if packed.kind == "KESTREL_GROUPS":
            kept = len(data) // (lanes + 1)
            for place in range(kept):
                column[data[place] * lanes :][:lanes] += signed[kept + place * lanes :][:lanes]
            continue
        wide = rows // lanes > 256
        kept = len(data) // (3 if wide else 2)
        for place in range(kept):
            local = data[kept + place] + (256 * data[2 * kept + place] if wide else 0)
            column[local * lanes + place % lanes] += signed[place]
    return found


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 15, 16, 48, 64, 128, 320, 514]), st.integers(1, 9), st.floats(0, 1)
)
@settings(max_examples=80, deadline=None)
def test_packed_columns_hold_their_values(seed: int, rows: int, count: int, share: float) -> None:
    values = columns(np.random.default_rng(seed), rows, count, share)
    for layout in (balanced_layout(values), groups_layout(values)):
        if layout is None:
            assert rows % 16
            continue
        packed = pack_rows(values, layout.storage)
        assert packed.row_bytes == layout.column_bytes and packed.lanes == layout.lanes
        np.testing.assert_array_equal(unpacked(packed, rows), values)


@pytest.mark.parametrize(
    ("rows", "lanes", "keep", "expected"),
    [(2048, 16, 8, (16, 128, 1)), (1024, 4, 16, (4, 64, 1)), (2048, 4, 32, (4, 128, 2)), (256, 64, 1, (64, 64, 1))],
)
def test_the_lanes_that_were_balanced_are_found(rows: int, lanes: int, keep: int, expected: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    order = rng.random((30, rows // lanes, lanes)).argsort(axis=1)
    values = np.where(order < keep, rng.integers(1, 128, order.shape), 0).reshape(30, rows)
    layout = balanced_layout(values)
    assert layout is not None and (layout.lanes, layout.kept, layout.index_bytes) == expected
    assert layout.column_bytes == expected[1] * (1 + expected[2])


def test_groups_are_found_and_preferred() -> None:
    values = columns(np.random.default_rng(1), 1024, 40, 0.1, 64)
    values[0, :64] = 1
    most = max(len({row // 64 for row in np.flatnonzero(column)}) for column in values)
    layout = best_layout(values)
    assert layout is not None and (layout.storage, layout.lanes, layout.kept) == ("groups", 64, most)
    assert layout.column_bytes == 65 * most
    fine = columns(np.random.default_rng(2), 1024, 40, 0.1, 16)
    layout = best_layout(fine)
    assert layout is not None and (layout.storage, layout.lanes) == ("groups", 16)


@pytest.mark.parametrize(("share", "storage"), [(0.03, "balanced"), (0.45, "sparse8"), (0.9, "int8")])
def test_the_weights_decide_how_columns_are_stored(share: float, storage: str) -> None:
    values = columns(np.random.default_rng(3), 512, 33, share)
    weight = Constant(values.T, "int8")
    assert weight.compact(values, columns=True).storage == storage
    assert weight.compact(values).storage == ("int8" if share > 0.5 else "masked8")  # of other products
    assert leaves_out_zeros(storage) == (storage != "int8")


def test_ternary_columns_are_stored_by_size_too() -> None:
    values = np.sign(columns(np.random.default_rng(4), 512, 20, 0.02))
    weight = Constant(values.T, "ternary")
    found = weight.compact(values, columns=True)
    assert found.storage == "balanced"
    assert pack_rows(values, found.storage).row_bytes <= 1.25 * pack_rows(values, "sparse2").row_bytes
    assert weight.compact(values).storage == "sparse2"


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 40), st.integers(1, 12))
def test_columns_keep_a_place_that_follows_from_their_number(seed: int, share: float, rows: int, count: int) -> None:
    values = columns(np.random.default_rng(seed), rows, count, share)
    found = Constant(values.T, "int8").compact(values, columns=True).storage
    assert found in ("int8", "sparse8", "balanced", "groups")
    assert found != "sparse8" or sparse_row_bytes(values, 8) <= 0.75 * rows


def test_masked_matrices_have_no_columns() -> None:
    weight = Constant(np.ones((2, 3), np.int64), "masked8")
    memory, change = Tensor((2,), -9, 9), Tensor((3,), -1, 1)
    with pytest.raises(KestrelError, match="no columns"):
        Accumulate(inputs=("m", "d"), outputs=("y",), weight=weight).infer(memory, change)


def test_a_column_without_weights_is_stored() -> None:
    for storage in ("balanced", "groups"):
        packed = pack_rows(np.zeros((3, 64), np.int64), storage)
        np.testing.assert_array_equal(unpacked(packed, 64), 0)


def test_storages_of_columns_are_for_changes_only() -> None:
    weight = Constant(np.eye(16, dtype=np.int64), "balanced")
    x, memory = Tensor((16,), -128, 127), Tensor((16,), -(1 << 31), (1 << 31) - 1)
    assert Accumulate(inputs=("m", "d"), outputs=("y",), weight=weight).infer(memory, x) == (memory,)
    with pytest.raises(KestrelError, match="columns of Accumulate"):
        MatMul(inputs=("x",), outputs=("y",), weight=weight).infer(x)
    with pytest.raises(KestrelError, match="do not fit"):
        Constant(np.full((16, 16), 200), "groups")
    with pytest.raises(ValueError, match="15 rows"):
        layout_of(np.ones((2, 15), np.int64), "groups")
