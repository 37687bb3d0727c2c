"""Settings that were added later leave older results up to date, as long as they stand at their defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from kestrel.errors import KestrelError
from kestrel.pipeline.config import Options, resolve
from kestrel.pipeline.stages import Run, settings_of
from kestrel.score.spec import ScoreSpec

ROOT = Path(__file__).resolve().parents[2]


def settings(stage: str, *changes: str, recipe: str = "iscas21_lstm") -> dict:
    config = resolve(ROOT, Options(recipe=recipe, set=list(changes)), ROOT)
    return settings_of(Run(ROOT, ROOT / "exp" / "none", config, 1, False), stage)


@pytest.mark.parametrize("recipe", ["iscas21_lstm", "hello_edge_lstm"])
def test_defaults_are_left_out_and_changes_are_not(recipe: str) -> None:
    for stage in ("pretrain", "score"):
        assert "adc_inl" not in settings(stage, recipe=recipe)["model"]
        changed = settings(stage, "model.adc_inl=0.5", "model.input_coding=bit_serial", recipe=recipe)["model"]
        assert (changed["adc_inl"], changed["input_coding"]) == (0.5, "bit_serial")
    assert "chips" not in settings("score", recipe=recipe)["score"]
    assert settings("score", "score.chips=25", recipe=recipe)["score"]["chips"] == 25


@pytest.mark.parametrize("name", ["chips=25", "noise_program=0.05", "noise_read=0", "adc_offset=1", "adc_draw=fixed"])
def test_evaluation_settings_do_not_touch_training(name: str) -> None:
    for stage in ("pretrain", "retrain"):
        assert settings(stage, f"score.{name}") == settings(stage)
    assert settings("score", f"score.{name}") != settings("score")


def test_only_what_is_given_replaces_the_model_s() -> None:
    assert ScoreSpec().deviations() == {}
    assert ScoreSpec(noise_read=0.0, adc_draw="fixed").deviations() == {"noise_read": 0.0, "adc_draw": "fixed"}


def test_bounds_are_named() -> None:
    with pytest.raises(KestrelError, match=r"score\.noise_program: -1"):
        settings("score", "score.noise_program=-1")
    with pytest.raises(KestrelError, match=r"score\.chips: 0"):
        settings("score", "score.chips=0")
