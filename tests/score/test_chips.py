import json

import numpy as np
import pytest
from matplotlib import image
from score_kit import FEATURE_SCALE, IDENTITY, PROVENANCE, feature_file, spotter

from kestrel.models.evaluate import Accuracy
from kestrel.score import chips
from kestrel.score.run import score

ARGUMENTS = {
    "identity": IDENTITY,
    "split": "test",
    "seed": 3,
    "batch_size": 50,
    "provenance": PROVENANCE,
    "feature_scale": FEATURE_SCALE,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def net():
    trained = spotter()
    trained.net.evaluate_with(noise_read=0.1, noise_program=0.4, adc_offset=1.0)
    return trained


def test_a_study_scores_every_chip_as_it_is_scored_alone(tmp_path, data, net):
    seen = []
    found = score(
        net,
        data,
        tmp_path / "all",
        chip=2,
        chips=4,
        **ARGUMENTS,
        progress=lambda done, total: seen.append((done, total)),
    )
    alone = [score(net, data, tmp_path / "one", chip=chip, **ARGUMENTS) for chip in (2, 3, 4, 5)]
    values = [result["accuracy"] for result in alone]
    spread = found["chips"]
    assert spread["accuracy"] == {str(2 + place): value for place, value in enumerate(values)}
    assert len(set(values)) > 1
    assert found["accuracy"] == values[0]
    assert spread["count"] == 4
    assert spread["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert spread["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert (spread["worst"], spread["best"]) == (min(values), max(values))
    assert spread["worst_chip"] == 2 + values.index(min(values))
    assert spread["deviations"] == {"noise_read": 0.1, "noise_program": 0.4, "adc_offset": 1.0, "adc_draw": "column"}
    assert "chips" not in alone[0]
    assert json.loads((tmp_path / "all" / "result.json").read_text()) == found
    assert max(done for done, _ in seen) == seen[-1][1]  # the passes fill the bar


def test_report_and_picture_show_the_spread(tmp_path, data, net):
    for name in ("a", "b"):
        score(net, data, tmp_path / name, chip=0, chips=3, **ARGUMENTS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    text = (tmp_path / "a" / "report.md").read_text()
    assert "## Chips\n\nChips 0 to 2 on the same 130 clips" in text
    assert "read noise 0.1 max_w, programming noise 0.4 max_w, ADC offset 1 LSB (drawn per column)" in text
    assert "![spread over chips](chips.png)" in text
    assert image.imread(tmp_path / "a" / "chips.png").shape[1] > 500


def test_chips_without_deviations_are_alike_and_the_report_says_so(tmp_path, data):
    found = score(spotter(), data, tmp_path / "score", chip=0, chips=3, **ARGUMENTS)["chips"]
    assert found["sd"] == 0 and found["worst"] == found["best"] == pytest.approx(found["mean"], abs=1e-6)
    assert "All chips are alike: set score.noise_program" in (tmp_path / "score" / "report.md").read_text()


def test_study_figures():
    found = chips.Study(5, (Accuracy(9, 10), Accuracy(7, 10), Accuracy(8, 10)), {})
    assert found.mean == pytest.approx(0.8) and found.deviation == pytest.approx(0.1) and found.worst == 6
