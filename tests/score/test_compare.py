from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.errors import KestrelError
from kestrel.score.compare import compare, paired_difference


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_one_seed_each_is_the_table_of_mcnemar(pairs):
    a, b = (np.array([pair[side] for pair in pairs], dtype=float)[None] for side in (0, 1))
    n = len(pairs)
    gained, lost = sum(not x and y for x, y in pairs), sum(x and not y for x, y in pairs)
    found = paired_difference(a, b)
    variance = (gained + lost - (gained - lost) ** 2 / n) / n**2 * n / (n - 1)
    assert found.value == pytest.approx((gained - lost) / n)
    assert found.high == pytest.approx(min(1.0, found.value + 1.959963984540054 * variance**0.5))


def test_more_seeds_of_the_same_answers_do_not_narrow_the_interval():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, (1, 100)), draw.integers(0, 2, (1, 100))
    assert paired_difference(np.repeat(a, 3, axis=0), np.repeat(b, 5, axis=0)) == paired_difference(a, b)


def test_other_clips_damaged_and_missing_files(tmp_path: Path):
    text = "utt_id,position,correct\n"
    for name, rows in (("a", "x,0,1\ny,1,0\n"), ("b", "x,0,1\nz,1,0\n"), ("c", "x,0,1\n"), ("d", "x,0,one\n")):
        (tmp_path / f"{name}.csv").write_text(text + rows)
    a, b, c, d, e = ([tmp_path / f"{name}.csv"] for name in "abcde")
    for other, message in ((b, "lists other clips"), (d, "is damaged"), (e, "cannot read")):
        with pytest.raises(KestrelError, match=message):
            compare(a, other)
    with pytest.raises(KestrelError, match="at least two"):
        compare(c, c)
