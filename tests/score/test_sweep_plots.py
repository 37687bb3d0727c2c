import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image
from matplotlib.figure import Figure
from score_kit import metrics_csv

from kestrel.score import sweep_plots
from kestrel.score.sweep_plots import (
    Line,
    Network,
    Setting,
    Strip,
    _write_beside,
    accuracy_against,
    accuracy_energy,
    accuracy_sparsity,
    error_curves,
    front,
    pareto,
    pareto_hull,
    strips,
)

POINTS = [Setting(x, s, (0.1 * x + 0.2, 0.1 * x + 0.25), (2.0**x,)) for x in (1, 2, 5) for s in ("a = 0", "a = 1")]


def same_twice(tmp_path: Path, draw) -> np.ndarray:
    for name in ("a", "b"):
        draw(tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    return image.imread(tmp_path / "a.png")[:, :, :3]


def has(pixels: np.ndarray, colour: str) -> bool:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(pixels - rgb).max(axis=2) < 0.02).sum() > 20)


def test_accuracy_shows_every_series_and_the_published_row(tmp_path):
    lines = [Line("a = 1", (1, 2, 5), (0.3, 0.4, 0.5)), Line("a = 1", (9,), (0.3,))]
    pixels = same_twice(tmp_path, lambda path: accuracy_against(POINTS, "blocks", "toy", lines[:1], "paper", path))
    assert has(pixels, "#0072B2") and has(pixels, "#D55E00") and min(pixels.shape[:2]) > 400
    accuracy_against(POINTS, "blocks", "toy", [], "", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_sparsity_shows_every_series_and_the_frontier(monkeypatch, tmp_path):
    found = [
        Setting(x, s, (0.95 - 0.1 * x - shift,), (), (0.5 + x,))
        for x in (0.1, 0.2, 0.4)
        for s, shift in (("a", 0), ("b", 0.1))
    ]
    pixels = same_twice(tmp_path, lambda path: accuracy_sparsity(found, "threshold", "toy", path))
    assert has(pixels, "#0072B2") and has(pixels, "#D55E00")
    figures = []
    monkeypatch.setattr(sweep_plots, "save", lambda figure, path: figures.append(figure))
    accuracy_sparsity([*found, Setting(9, "a", (0.5,))], "threshold", "toy", tmp_path / "c.png")
    (line,) = [line for line in figures[0].axes[0].get_lines() if line.get_label() == "frontier"]
    assert sorted(line.get_xdata()) == pytest.approx([60, 70, 90])  # of series a, which has more right at each sparsity


@pytest.mark.parametrize("published", [(0.05, 0.5, 0.97), (0.2, 0.3, 0.4)])
def test_published_rows_stay_inside_while_points_are_missing(monkeypatch, tmp_path, published):
    figures = []
    monkeypatch.setattr(sweep_plots, "save", lambda figure, path: figures.append(figure))
    found = [Setting(2, "", (0.2,)), Setting(3, "", (0.4,))]
    accuracy_against(found, "bits", "toy", [Line("", (2, 3, 8), published)], "paper", tmp_path / "a.png")
    axes = figures[0].axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left <= 2 and right >= 8
    assert low <= 100 * min(published) and high >= 100 * max(published)


def test_equal_energies_have_equal_colours(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(sweep_plots, "save", lambda figure, path: figures.append(figure))
    found = [Setting(x, "", (0.1 * x,), (12.2 + 0.001 * x,)) for x in range(5)]
    strips([Strip("bits", tuple(found))], "toy", tmp_path / "a.png")
    shades = figures[0].axes[1].images[0].get_array()
    assert np.ptp(shades) < 0.01


@pytest.mark.parametrize("x", [[1], [None, 4], ["a", "b"], [0.05], [2, 3, 4, 100]])
@pytest.mark.parametrize("accuracy", [(0.5,), (0.0, 1.0), (0.1, 0.9, 0.9)])
def test_odd_axes_and_accuracies(tmp_path, x, accuracy):
    found = [Setting(value, "", accuracy, (3.0,)) for value in x]
    lines = [Line("", (77,), (0.5,))]  # lies on no value of an axis of names
    accuracy_against(found, "x", "toy", lines, "s", tmp_path / "a.png")
    accuracy_energy(found, "x", "toy", tmp_path / "b.png")
    strips([Strip("x", tuple(found))], "toy", tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 3000 for name in "abc")


def test_energy_and_strips_are_reproducible(tmp_path):
    same_twice(tmp_path, lambda path: accuracy_energy(POINTS, "blocks", "toy", path))
    pixels = same_twice(tmp_path, lambda path: strips([Strip("blocks", tuple(POINTS))], "toy", path))
    narrow = tmp_path / "narrow.png"
    strips([Strip("blocks", tuple(Setting(s.x, s.series, s.accuracy) for s in POINTS))], "toy", narrow)
    assert image.imread(narrow).shape[1] < pixels.shape[1]  # no panel of energies that nobody knows


def test_mean_and_deviation_of_a_setting():
    found = Setting(1, "", (0.5, 0.7), (2.0, 4.0))
    assert (found.mean, found.energy) == (pytest.approx(0.6), 3.0)
    assert found.sd == pytest.approx(math.sqrt(0.02))
    assert Setting(1, "", (0.5,)).sd == 0.0 and Setting(1, "", (0.5,)).energy is None


POINT = st.tuples(st.floats(0.1, 1000), st.floats(0, 100))


@settings(max_examples=100, deadline=None)
@given(st.lists(POINT, min_size=1, max_size=30))
def test_the_hull_is_above_every_point_and_bends_down(points):
    hull = pareto_hull(points)
    assert set(hull) <= set(points)
    assert hull[0][0] == min(energy for energy, _ in points)
    assert hull[-1][1] == max(accuracy for _, accuracy in points)
    x, y = np.log([energy for energy, _ in hull]), np.array([accuracy for _, accuracy in hull])
    for energy, accuracy in points:
        assert accuracy <= np.interp(np.log(energy), x, y) + 1e-6
    slopes = np.diff(y) / np.diff(x)
    assert (slopes > 0).all() and (np.diff(slopes) < 1e-6 * np.abs(slopes[:-1])).all()


def test_the_hull_of_a_known_set():
    assert pareto_hull([(1, 10), (10, 50), (100, 90), (10, 60), (1000, 80)]) == [(1, 10), (10, 60), (100, 90)]


def test_error_curves_of_runs_and_phases(tmp_path):
    first, second = metrics_csv(tmp_path / "pretrain.csv"), metrics_csv(tmp_path / "retrain.csv", 5, 0.6)
    runs = [(f"run {index}", [("pretrain", first), ("retrain", second)]) for index in range(2)]
    same_twice(tmp_path, lambda path: error_curves(runs, "toy", path))
    error_curves([("alone", [("pretrain", first)])] * 9, "toy", tmp_path / "nine.png")
    assert (tmp_path / "nine.png").stat().st_size > 5000


def test_front_is_what_no_other_point_beats() -> None:
    points = [(3.0, 90.0), (1.0, 80.0), (2.0, 79.0), (4.0, 90.0), (3.0, 85.0), (5.0, 95.0)]
    assert front(points) == [(1.0, 80.0), (3.0, 90.0), (5.0, 95.0)]


def test_pareto_picture(tmp_path: Path) -> None:
    found = [Network(f"net {k}", 1e6 * k, 2e4 * k, (0.9 + 0.01 * k,)) for k in (1, 2, 3)]
    published = [Network("theirs", 3e6, 5e4, (0.95,))]
    for name in ("a.png", "b.png"):
        pareto(found, published, "title", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_texts_beside_points_cover_nothing() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    spots = [(1.5, 1.5, "first"), (1.51, 1.54, "second"), (1.52, 1.5, "third"), (2.0, 2.0, "far"), (1.0, 1.0, "low")]
    axes.plot([x for x, _, _ in spots], [y for _, y, _ in spots], "o")
    _write_beside(axes, spots, 9)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert {text.get_text() for text in axes.texts} == {words for _, _, words in spots}
    for index, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:index])
        assert not any(box.contains(*spot) for spot in axes.transData.transform([spot[:2] for spot in spots]))
    _write_beside(axes, [(2.0, 2.0, "far"), *[(2.0, 2.0, f"crowd {number}") for number in range(20)]], 9)
    assert len(axes.texts) < 5 + 21


def test_texts_of_close_points_stand_in_their_order() -> None:
    axes = Figure(figsize=(6, 4)).subplots()
    axes.plot([1.0, 9.0], [0.0, 90.0])
    _write_beside(axes, [(5.0, 80.0, "below"), (5.0, 81.5, "above")], 9)
    height = {text.get_text(): text.get_window_extent().y0 for text in axes.texts}
    assert height["above"] > height["below"]


def test_a_cost_that_all_share_has_no_panel(monkeypatch, tmp_path: Path) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(sweep_plots, "save", lambda figure, path: drawn.append(figure))
    pareto([Network(str(k), 5e4, 1e3 * k, (0.9,)) for k in (1, 2)], [], "one", tmp_path / "a.png")
    pareto([Network(str(k), 5e4 * k, 1e3 * k, (0.9,)) for k in (1, 2)], [], "two", tmp_path / "b.png")
    assert [len(figure.axes) for figure in drawn] == [1, 2]
    assert drawn[0].axes[0].get_xlabel() == "bytes of weights"
