"""Variants that are joined: `a+b` lays the deltas of b over those of a."""

from __future__ import annotations

from pathlib import Path

import pytest

from kestrel.errors import UsageError
from kestrel.pipeline.config import Options, resolve, variant_data

ROOT = Path(__file__).resolve().parents[2]


def test_deltas_are_laid_over_each_other_in_their_order() -> None:
    recipe = "hello_edge_lstm"
    joined = variant_data(ROOT, recipe, "8w8a-344-40-fixed+logmel")
    large, features = variant_data(ROOT, recipe, "8w8a-344-40-fixed"), variant_data(ROOT, recipe, "logmel")
    assert joined["model"] == {**large["model"], "input_range": features["model"]["input_range"]}
    assert joined["feature"] == {**large["feature"], "post": features["feature"]["post"]}
    assert joined["train"] == features["train"] and "steps" not in joined["train"]
    assert variant_data(ROOT, recipe, "logmel+logmel-10")["feature"]["post"][1] == {"dct": 10}
    assert variant_data(ROOT, recipe, "logmel-10+logmel")["feature"]["post"][1] == {"dct": 40}


def test_the_name_of_the_run_is_the_joined_one() -> None:
    config = resolve(ROOT, Options(recipe="hello_edge_lstm", variant="8w8a-344+mini"), ROOT)
    assert config.variant == "8w8a-344+mini" and config.tag == "8w8a-344+mini-mini-12-seed0"
    assert (config.model.hidden, config.train.epochs, config.retrain) == (344, 18, None)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("8w8a-118+logmell", "unknown variant 'logmell'; did you mean 'logmel'?"),
        ("logmel+logmel", "join different variants, each once"),
        ("base+logmel", "leave out base"),
        ("8w8a-118+", "unknown variant ''"),
    ],
)
def test_wrong_joins_are_one_line(variant: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(ROOT, Options(recipe="hello_edge_lstm", variant=variant), ROOT)
    assert message in str(caught.value) and "\n" not in str(caught.value)
