"""Accuracy of the integer model that a microcontroller without a multiplier computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kestrel.errors import KestrelError
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.narrow import narrow_form
from kestrel.lower.spotter import predict_codes
from kestrel.lower.stream import stream_program
from kestrel.models.evaluate import accuracy

if TYPE_CHECKING:
    from kestrel.store.hdf5 import FeatureFile


def narrow_figures(graph: IntegerGraph | None, data: FeatureFile) -> dict[str, Any]:
    """Entries of result.json, `narrow_accuracy` and its interval; none for networks that cannot run column by column."""
    if graph is None:
        return {}
    try:
        narrow = narrow_form(graph)
        stream_program(narrow)
    except KestrelError:
        return {}
    right = accuracy(predict_codes(narrow, data), data.labels)
    return {"narrow_accuracy": right.value, "narrow_ci95": [round(bound, 6) for bound in right.ci95]}
