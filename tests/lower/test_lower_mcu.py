"""Accuracy of what a microcontroller without a multiplier computes, as the score stage reports it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kestrel.lower.mcu import narrow_figures
from kestrel.lower.narrow import narrow_form
from kestrel.lower.ops import Window
from tests.lower.stream_kit import Maker, spotter


def features(maker: Maker, clips: int) -> SimpleNamespace:
    """A feature file of random clips, labelled by the narrow model but for every fourth one."""
    codes = maker.features_of(clips)
    answers = narrow_form(maker.graph).run(codes)["logits"].argmax(axis=1)
    labels = np.where(np.arange(clips) % 4 == 0, (answers + 1) % 12, answers)
    rows = codes.astype(np.float32) * np.float32(maker.graph.tensors["features"].scale)
    return SimpleNamespace(shape=rows.shape, labels=labels, rows=lambda index: rows[index])


def test_accuracy_is_that_of_the_narrow_model() -> None:
    maker = spotter(3, channels=8, wide=12, blocks=1)
    found = narrow_figures(maker.graph, features(maker, 40))
    assert found["narrow_accuracy"] == pytest.approx(0.75)
    low, high = found["narrow_ci95"]
    assert 0.55 < low < 0.75 < high < 0.9


def test_networks_that_cannot_stream_have_none() -> None:
    maker = Maker(0, frames=12, width=4)
    padded = Window((3, 1), before=(1, 0), after=(1, 0))
    graph = maker.finish(maker.depthwise(maker.codes(), padded), 12)
    assert narrow_figures(graph, features(maker, 4)) == {}
    assert narrow_figures(None, features(maker, 4)) == {}
