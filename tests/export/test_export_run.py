import dataclasses
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from score_kit import CLASSES, FEATURE_SCALE, IDENTITY, PROVENANCE, analog, feature_file, spotter

from kestrel.errors import KestrelError
from kestrel.export import onnx as onnx_export
from kestrel.export.c_check import Toolchain
from kestrel.export.c_files import MODEL_FILES
from kestrel.export.run import export
from kestrel.export.spec import ExportSpec
from kestrel.models.evaluate import predict
from kestrel.models.inventory import parameters

ARGUMENTS = {
    "identity": IDENTITY,
    "split": "test",
    "seed": 3,
    "chip": 0,
    "batch_size": 50,
    "provenance": PROVENANCE,
    "feature_scale": FEATURE_SCALE,
}
FILES = {
    *("card.md", "export.json", "model.onnx", "model_qdq.onnx", "example.npz", "codes.npz", "weights.bin"),
    *("integer/integer.json", "integer/integer.npz", "integer/constants.bin"),
    *(f"c/{name}" for name in MODEL_FILES),
    *("vectors/README.md", "vectors/index.json", "vectors/vectors.npz"),
}


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return feature_file(tmp_path_factory.mktemp("features"))


@pytest.fixture(autouse=True, scope="module")
def portable_kernels():
    """Without vector kernels, which take long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        host = Toolchain.host
        patch.setattr(Toolchain, "host", staticmethod(lambda: dataclasses.replace(host(), variables=("VECTORS=",))))
        yield


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exp") / "export"
    return folder, export(spotter(), data, folder, settings=ExportSpec(), **ARGUMENTS)


def test_all_files_are_there_and_the_summary_says_what_they_are(exported):
    folder, summary = exported
    vectors = {f"vectors/{path}" for path in json.loads((folder / "vectors/index.json").read_text())["files"]}
    assert files_of(folder) == FILES | vectors and len(vectors) > 100
    assert json.loads((folder / "export.json").read_text()) == summary
    assert set(summary["files"]) == FILES - {"card.md", "export.json"}
    for name, entry in summary["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert summary["weight_bytes"] == (folder / "weights.bin").stat().st_size


def test_exported_accuracy_is_that_of_a_network_made_of_the_codes(exported, data):
    """Rebuilt from codes.npz alone, in a fresh network."""
    folder, summary = exported
    content, model = np.load(folder / "codes.npz", allow_pickle=False), spotter()
    state = {f"net.{name}": value for name, value in content.items() if not name.startswith("post.")}
    state = {name: value for name, value in state.items() if not name.endswith((".codes", ".scale", ".bits"))}
    state |= {name: value for name, value in content.items() if name.startswith("post.")}
    for name in (name.removesuffix(".codes") for name in content if name.endswith(".codes")):
        codes, scale = content[f"{name}.codes"], content[f"{name}.scale"]
        assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() == 127
        state[f"net.{name}"] = (codes * scale.reshape(-1, *[1] * (codes.ndim - 1))).astype(np.float32)
    import torch

    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in state.items()})
    accuracy = (predict(model, data, 50).argmax(axis=1) == data.labels).mean()
    assert summary["accuracy"] == accuracy
    assert summary["trained_accuracy"] == (predict(spotter(), data, 50).argmax(axis=1) == data.labels).mean()


def test_few_bits_cost_accuracy_and_bytes(tmp_path, exported, data):
    coarse = export(
        spotter(), data, tmp_path / "export", settings=ExportSpec(weight_bits=2, onnx=False, c=False), **ARGUMENTS
    )
    assert coarse["accuracy"] < exported[1]["accuracy"] - 0.05
    assert coarse["trained_accuracy"] == exported[1]["trained_accuracy"]
    assert coarse["weight_bytes"] < 0.35 * exported[1]["weight_bytes"]
    assert coarse["answers_changed_by_codes"] > 0


def test_weights_trained_at_few_bits_lose_nothing(tmp_path, data):
    summary = export(
        spotter(quant_w=4), data, tmp_path / "export", settings=ExportSpec(onnx=False, c=False), **ARGUMENTS
    )
    assert summary["answers_changed_by_codes"] == 0
    assert summary["accuracy"] == summary["trained_accuracy"]
    assert {section["bits"] for section in summary["weight_sections"]} == {4}


def test_exporting_twice_gives_identical_files(tmp_path, exported, data):
    export(spotter(), data, tmp_path / "elsewhere", settings=ExportSpec(), **ARGUMENTS)
    assert files_of(tmp_path / "elsewhere") == files_of(exported[0])
    for name in files_of(exported[0]):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (exported[0] / name).read_bytes(), name


def test_the_cards_snippet_runs_as_it_stands(exported, data):
    folder, _ = exported
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "card.md").read_text(), re.DOTALL)
    assert len(snippet.splitlines()) == 6
    run = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    answers, difference = run.stdout.splitlines()
    expected = predict(spotter(), data, 50)[:8].argmax(axis=1)
    assert answers == "answers: " + " ".join(CLASSES[index] for index in expected)
    assert float(difference.split(":")[1]) < 1e-4


def test_card_shows_all_of_it(exported):
    folder, summary = exported
    text = (folder / "card.md").read_text()
    low, high = (100 * bound for bound in summary["ci95"])
    for part in (
        f"| integer weights (codes.npz) | {100 * summary['accuracy']:.2f} % | {low:.2f}-{high:.2f} % |",
        f"| trained weights (float32) | {100 * summary['trained_accuracy']:.2f} % |",
        "`toy-4`",
        "ab" * 32,
        "float32 [clips, 8, 6]",
        "float32 [clips, 4]",
        "`yes no go silence`",
        "normalise channel; stack 2",
        "| hop | 320 |",
        "| lstm.w_ih | 2 x 12 x 32 | 8 | 0 | 768 |",
        f"| all | {parameters(spotter().net):,} | {summary['macs']:,} |",
        f"on 130 clips: largest difference of a logit {summary['onnx']['largest_difference']:.3g}; 0 answers differ",
        f"| integer model (integer/), no float | {100 * summary['integer_accuracy']:.2f} % |",
        "largest difference of a logit",
        "## Test vectors",
        "17 quantisers of activations",
        "| C program | bit-identical on 130 clips, ",
        PROVENANCE["checkpoint_sha256"],
        PROVENANCE["command"],
    ):
        assert part in text, part
    for name in FILES - {"card.md"}:
        content = (folder / name).read_bytes()
        assert f"| {name} | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |" in text


def test_device_noise_is_off_in_the_files_and_stated_on_the_card(tmp_path, exported, data):
    settings = ExportSpec(c=False)
    summary = export(spotter(noise_eval=0.2), data, tmp_path / "export", settings=settings, **ARGUMENTS)
    assert summary["accuracy"] == exported[1]["accuracy"]
    clean = exported[1]["files"]
    assert summary["files"] == {name: stamp for name, stamp in clean.items() if not name.startswith("c/")}
    assert "trained weights with device noise 0.2 (seed 3, chip 0)" in (tmp_path / "export" / "card.md").read_text()


def test_without_onnx(tmp_path, data):
    summary = export(spotter(), data, tmp_path / "export", settings=ExportSpec(onnx=False, c=False), **ARGUMENTS)
    assert not list((tmp_path / "export").glob("*.onnx")) and "onnx" not in summary and "onnx_qdq" not in summary
    assert "Left out" in (tmp_path / "export" / "card.md").read_text()


def test_a_failed_check_leaves_the_old_folder(tmp_path, data, monkeypatch):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").write_text("kept")
    monkeypatch.setattr(onnx_export, "most_others", lambda clips: -1.0)
    with pytest.raises(KestrelError, match="otherwise than PyTorch"):
        export(spotter(), data, tmp_path / "export", settings=ExportSpec(c=False), **ARGUMENTS)
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "old"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ram_limit": 100}, r"bytes of ram on .*, export.ram_limit is 100"),
        ({"flash_limit": 100}, r"bytes of flash on .*, export.flash_limit is 100"),
        ({"flash_limit": 10**9, "c": False}, r"export.flash_limit is set, but export.c is false"),
        ({"ram_limit": 10**9, "c": False}, r"--set export.ram_limit=null exports without it"),
    ],
)
def test_a_limit_that_is_not_kept_or_cannot_be_checked_leaves_nothing(settings, text, tmp_path, data):
    with pytest.raises(KestrelError, match=text) as caught:
        export(
            spotter(), data, tmp_path / "export", settings=ExportSpec(onnx=False, vectors=0, **settings), **ARGUMENTS
        )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_limit_on_a_network_without_c_form_is_refused(tmp_path, data):
    with pytest.raises(KestrelError, match="export.ram_limit is set, but the network has no C form: .*quant_inp"):
        export(analog(), data, tmp_path / "export", settings=ExportSpec(onnx=False, ram_limit=10**9), **ARGUMENTS)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_line_says_how_to_go_on(tmp_path, data, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KestrelError, match="apt-get install gcc make.* --set export.c=false"):
        export(spotter(), data, tmp_path / "export", settings=ExportSpec(onnx=False, vectors=0), **ARGUMENTS)
    assert not list(tmp_path.iterdir())
    export(spotter(), data, tmp_path / "export", settings=ExportSpec(onnx=False, vectors=0, c=False), **ARGUMENTS)


def test_other_classes_are_refused(tmp_path):
    data = feature_file(tmp_path / "features", classes=["yes", "no", "stop", "silence"])
    with pytest.raises(KestrelError, match="features of its own protocol"):
        export(spotter(), data, tmp_path / "export", settings=ExportSpec(), **ARGUMENTS)
    assert not (tmp_path / "export").exists()


def test_progress_covers_every_pass(tmp_path, data):
    seen = []
    settings = ExportSpec(c=False)
    export(
        spotter(noise_eval=0.1),
        data,
        tmp_path / "export",
        settings=settings,
        progress=lambda done, total: seen.append((done, total)),
        **ARGUMENTS,
    )
    assert seen[-1] == (6 * 130, 6 * 130) and sorted(seen) == seen
