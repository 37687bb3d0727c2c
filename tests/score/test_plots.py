import numpy as np
import pytest
from matplotlib import image
from score_kit import metrics_csv

from kestrel.errors import KestrelError
from kestrel.score.plots import best_row, confusion_matrix, curves, read_metrics


@pytest.mark.parametrize("classes", [2, 12, 35])
def test_confusion_picture_is_reproducible_and_large_enough_to_read(tmp_path, classes):
    matrix = np.full((classes, classes), 2) + np.diag([1000] * classes)
    names = [f"word {index}" for index in range(classes)]
    confusion_matrix(matrix, names, "toy, test", tmp_path / "a.png")
    if classes <= 12:  # the large one takes seconds
        confusion_matrix(matrix, names, "toy, test", tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    height, width, _ = image.imread(tmp_path / "a.png").shape
    assert min(height, width) >= 40 * classes  # pixels of a cell
    assert max(height, width) < 2200


def test_confusion_picture_shows_right_blue_wrong_orange_and_nothing_white(tmp_path):
    confusion_matrix(np.array([[9, 0], [9, 0]]), ["yes", "no"], "toy", tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")[:, :, :3].reshape(-1, 3)
    red, _, blue = pixels.T
    blues, oranges = (blue > red + 0.3).mean(), (red > blue + 0.3).mean()
    assert blues > 0.1 and oranges > 0.1 and (pixels.min(axis=1) > 0.99).mean() > 0.3


def test_confusion_picture_of_a_class_without_clips(tmp_path):
    confusion_matrix(np.array([[0, 0], [1, 3]]), ["yes", "no"], "toy", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_pictures_do_not_depend_on_the_users_matplotlib_settings(tmp_path):
    import matplotlib as mpl

    confusion_matrix(np.eye(2, dtype=int), ["yes", "no"], "toy", tmp_path / "a.png")
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 20, "savefig.dpi": 30}):
        confusion_matrix(np.eye(2, dtype=int), ["yes", "no"], "toy", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_curves_are_reproducible_and_wider_with_more_stages(tmp_path):
    first, second = metrics_csv(tmp_path / "pretrain.csv"), metrics_csv(tmp_path / "retrain.csv", 5, 0.6)
    for name in ("a", "b"):
        curves([("pretrain", first), ("retrain", second)], tmp_path / f"{name}.png")
    curves([("pretrain", first)], tmp_path / "one.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert image.imread(tmp_path / "a.png").shape[1] > image.imread(tmp_path / "one.png").shape[1] > 600


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ["0,,,1.4,0.25"],
        ["0,,,1.4,0.25", "9,0.5,1.0,0.5,1.0"],
        ["0,,,0.9,0.64", "9,0.8,0.66,0.9,0.66"],
    ],
)
def test_curves_of_short_flat_or_perfect_training(tmp_path, rows):
    header = "step,train_loss,train_accuracy,validation_loss,validation_accuracy"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    curves([("pretrain", tmp_path / "metrics.csv")], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_best_row_is_the_one_that_training_keeps():
    columns = {
        "validation_accuracy": np.array([0.5, np.nan, 0.9, 0.9, 0.9]),
        "validation_loss": np.array([0.1, 0.1, 0.4, 0.3, 0.3]),
    }
    assert best_row(columns) == 3
    assert best_row({name: np.array([np.nan]) for name in columns}) is None


def test_read_metrics_leaves_empty_fields_open(tmp_path):
    columns = read_metrics(metrics_csv(tmp_path / "metrics.csv"))
    assert columns["step"].tolist()[:2] == [0, 100]
    assert np.isnan(columns["train_loss"][0]) and columns["validation_accuracy"][0] == 0.25


@pytest.mark.parametrize("text", ["step,train_loss\n1,2\n", "a\nb\n", "step,train_loss\n1,many\n", None])
def test_damaged_metrics_are_one_line(tmp_path, text):
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KestrelError, match="run its training stage again") as raised:
        read_metrics(path)
    assert "\n" not in str(raised.value)
