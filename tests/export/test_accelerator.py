"""Memory images of delta networks: sizes from the files, round trips, and what a damaged one says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import score_kit
import torch

from kestrel.errors import KestrelError
from kestrel.export import accelerator
from kestrel.export.run import export
from kestrel.export.spec import ExportSpec
from kestrel.frontend.post import Post
from kestrel.models.delta_rnn import DeltaNetwork
from kestrel.models.spotter import KeywordSpotter
from kestrel.quant.cbcsc import Cbcsc, decode
from kestrel.quant.edgedrnn import split_layer
from kestrel.quant.memory_image import read_hex_image

FIXED = {"qa": 1, "qw": 1, "qc": 1, "qcw": 1}
PRUNED = {"cbtd_from": "pretrain", "gamma_rnn": 0.75, "num_array_pe": 4}


def exported(folder: Path, **model: object) -> tuple[Path, dict, KeywordSpotter]:
    torch.manual_seed(3)
    post = Post([{"normalise": "channel"}], (score_kit.FRAMES, score_kit.WIDTH))
    post.fit([torch.from_numpy(score_kit.clips(50)[0])])
    settings = {"rnn_size": 16, "delta_from": "pretrain", "thx": 0.5, "thh": 0.125, **model}
    net = DeltaNetwork(input_size=score_kit.WIDTH, classes=len(score_kit.CLASSES), **settings)
    spotter = KeywordSpotter(post, net)
    summary = export(
        spotter,
        score_kit.feature_file(folder / "features", 20),
        folder / "export",
        identity=score_kit.IDENTITY,
        split="test",
        seed=0,
        chip=0,
        batch_size=10,
        settings=ExportSpec(c=False, onnx=False, vectors=0),
        feature_scale=score_kit.FEATURE_SCALE,
        provenance=score_kit.PROVENANCE,
    )
    return folder / "export", summary, spotter


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_images_of_a_pruned_network(kind: str, tmp_path: Path) -> None:
    folder, summary, _ = exported(tmp_path, rnn_type=kind, rnn_layers=2, **PRUNED)
    codes = np.load(folder / "codes.npz")
    sections = {section["layer"]: section for section in summary["accelerator_memory"]}
    assert set(sections) == {"rnn_l0", "rnn_l1", "all"}
    rows = (3 if kind == "GRU" else 4) * 16
    for index in range(2):
        section = sections[f"rnn_l{index}"]
        assert (section["beats"], section["pes"], section["rows"]) == (rows // 16, 4, rows)  # a quarter of rows / 4
        stored = (folder / "memory" / f"rnn_l{index}.cbcsc.bin").read_bytes()
        assert len(stored) == section["bytes"] == section["words"] + -(-section["words"] * 4 // 8)
        shape = (section["columns"], section["beats"], 4)
        packed = Cbcsc.of_bytes(stored[: section["words"]], stored[section["words"] :], shape, rows, 8)
        expected = np.concatenate([codes[f"rnn.weight_{part}_l{index}.codes"] for part in ("ih", "hh")], axis=1)
        np.testing.assert_array_equal(decode(packed), expected)
        assert section["bytes"] < 0.4 * section["dense_bytes"]
    kept = [place for place in summary["weight_sections"] if ".weight_" not in place["name"]]  # class layer and biases
    scales = sum(place["scale_bytes"] for place in summary["weight_sections"])
    images = sum(path.stat().st_size for path in (folder / "memory").glob("*.cbcsc.bin"))
    assert summary["packed_bytes"] == images + scales + sum(place["code_bytes"] for place in kept)
    card = (folder / "card.md").read_text()
    assert (
        f"{summary['packed_bytes']:,} with pruned layers as CBCSC, {summary['weight_bytes']:,} as dense codes" in card
    )
    assert "## Accelerator memory" in card and "memory/rnn_l0.cbcsc.bin" in card
    assert json.loads((folder / "memory" / "memory.json").read_text())["layers"] == summary["accelerator_memory"]


def test_images_of_a_dense_network_in_fixed_point(tmp_path: Path) -> None:
    folder, summary, _ = exported(tmp_path, **FIXED)
    (section,) = summary["accelerator_memory"]
    assert "packed_bytes" not in summary
    assert section["layout"] == "edgedrnn" and section["columns"] == 1 + 8 + 16  # bias, 6 inputs and 2 zeros, states
    memory = folder / "memory"
    stream = read_hex_image((memory / "edgedrnn.hex").read_text(), 8)
    assert len(stream) == section["bytes"] == (memory / "edgedrnn.bin").stat().st_size
    bias, w_x, w_h = split_layer(stream.reshape(48, -1, order="F"), score_kit.WIDTH, 8)
    codes = np.load(folder / "codes.npz")
    np.testing.assert_array_equal(w_x, codes["rnn.weight_ih_l0.codes"])
    np.testing.assert_array_equal(w_h, codes["rnn.weight_hh_l0.codes"])
    np.testing.assert_array_equal(bias, codes["rnn.bias_ih_l0.codes"] + codes["rnn.bias_hh_l0.codes"])
    registers = read_hex_image((memory / "edgedrnn.registers.hex").read_text(), 32, signed=False)
    assert registers[:6].tolist() == [0, 16, 4, 1, 8, 16]  # thresholds 0.5 and 0.125 in steps of 2^-5
    assert "no weights were pruned" in (folder / "card.md").read_text()


def test_a_damaged_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = accelerator.hex_image
    monkeypatch.setattr(accelerator, "hex_image", lambda codes, bits: right(np.asarray(codes) * 0, bits))
    with pytest.raises(KestrelError, match=r"memory image rnn_l0 \(hex\) does not read back"):
        exported(tmp_path, **PRUNED)
    assert not (tmp_path / "export").exists()
