from kestrel.store.markdown import cell, flat, percent, table


def test_a_table_aligns_numbers_to_the_right_and_escapes_bars():
    text = table(("name", "clips", "share"), [("a|b", 1234, "5.0 %"), ("c", None, None)])
    assert text.splitlines() == [
        "| name | clips | share |",
        "|---|--:|--:|",
        "| a\\|b | 1,234 | 5.0 % |",
        "| c | - | - |",
    ]


def test_cells_are_one_line():
    assert cell("two\nlines") == "two lines"
    assert cell(True) == "yes"
    assert cell(0.25) == "0.25"


def test_percent():
    assert percent(0.9714, 2) == "97.14 %"
    assert percent(None) is None


def test_flat_settings():
    data = {"words": ["yes", "no"], "silence": None, "split": {"rule": "hash", "share": 10.0}, "expect": {}}
    expected = [
        ("words", "yes no"),
        ("silence", "none"),
        ("split.rule", "hash"),
        ("split.share", "10.0"),
        ("expect", "none"),
    ]
    assert flat(data) == expected
