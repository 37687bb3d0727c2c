"""Storage of the columns of a matrix W in `Accumulate`, whose zeros are left out so that a kernel never meets them.

Two storages, int8 values both, whose sizes follow from the weights alone:

`balanced`: rows are spread over M lanes, row r to lane r mod M as its local row r div M; every lane keeps the same number
K of weights of every column, with their local rows (the CBCSC form of kestrel.quant.cbcsc). Of the M that take at most a
quarter more bytes than the smallest, it is the one with the fewest weights, which is the fastest.

`groups`: rows in groups of 64 or 16 neighbours; a column keeps whole groups, with their numbers.

All columns take as many bytes as the fullest, so the place of a column follows from its number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BALANCED, GROUPS = "balanced", "groups"
LANES = (1, 2, 4, 8, 16, 32, 64)  # M, numbers of lanes that are tried
GROUP_ROWS = (64, 16)
BITS = 8  # of a value
_BYTE, _WORD = 1 << 8, 1 << 16  # local rows, and groups, that an index of one or two bytes counts


@dataclass(frozen=True)
class Layout:
    """How every column lies: `kept` weights (`balanced`) or groups; `lanes`: M, or the rows of a group."""

    storage: str
    lanes: int
    kept: int
    index_bytes: int

    @property
    def column_bytes(self) -> int:
        """Bytes of a column."""
        values = self.kept * (1 if self.storage == BALANCED else self.lanes)
        return values + self.kept * self.index_bytes


def balanced_layout(columns: np.ndarray) -> Layout | None:
    """The `balanced` layout of `columns` [columns, rows]; None where there is none."""
    count, rows = columns.shape
    found = []
    for lanes in LANES:
        local = rows // lanes
        if rows % lanes or not rows or local > _WORD:
            continue
        used = np.count_nonzero(columns.reshape(count, local, lanes), axis=1)
        beats = max(int(used.max(initial=0)), 1)
        found.append(Layout(BALANCED, lanes, beats * lanes, 1 if local <= _BYTE else 2))
    smallest = min((layout.column_bytes for layout in found), default=0)
    near = [layout for layout in found if 4 * layout.column_bytes <= 5 * smallest]
    return min(near, key=lambda layout: (layout.kept, layout.column_bytes, -layout.lanes), default=None)


def groups_layout(columns: np.ndarray) -> Layout | None:
    """The smallest `groups` layout of `columns` [columns, rows]; None where rows are no whole groups."""
    count, rows = columns.shape
    found = []
    for lanes in GROUP_ROWS:
        groups = rows // lanes
        if rows % lanes or not 0 < groups <= _BYTE:
            continue
        used = columns.reshape(count, groups, lanes).any(axis=2).sum(axis=1)
        found.append(Layout(GROUPS, lanes, max(int(used.max(initial=0)), 1), 1))
    return min(found, key=lambda layout: layout.column_bytes, default=None)


def layout_of(columns: np.ndarray, storage: str) -> Layout:
    """The layout of `columns` [columns, rows] in one of the two storages. Raises ValueError where there is none."""
    found = balanced_layout(columns) if storage == BALANCED else groups_layout(columns)
    if found is None:
        raise ValueError(f"{columns.shape[1]} rows have no storage {storage!r}")
    return found


def best_layout(columns: np.ndarray) -> Layout | None:
    """The smaller of both layouts of `columns` [columns, rows]; of equals `groups`, whose kernels are faster."""
    found = [layout for layout in (groups_layout(columns), balanced_layout(columns)) if layout is not None]
    return min(found, key=lambda layout: layout.column_bytes, default=None)
