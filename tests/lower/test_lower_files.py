from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lower_kit import FEATURE_SCALE, FRAMES, WIDTH, MixedNet, Recurrent, graph_of, settled, spotter_of
from torch import nn

from kestrel.errors import KestrelError
from kestrel.lower.files import from_plain, load, save, to_plain
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.rnn import Thresholds
from kestrel.lower.spotter import lower


def graphs() -> dict[str, IntegerGraph]:
    torch.manual_seed(4)
    return {
        "blocks": lower(spotter_of([{"normalise": "channel"}, {"dct": 6}], method=2, n_msb=4), FEATURE_SCALE),
        "mixed": graph_of(settled(MixedNet())),
        "delta": graph_of(settled(Recurrent(nn.GRU)), thresholds=Thresholds(0.5, 0.05)),
    }


@pytest.mark.parametrize("name", ["blocks", "mixed", "delta"])
def test_a_graph_read_back_computes_the_same(name: str, tmp_path: Path) -> None:
    graph = graphs()[name]
    graph.notes["classes"] = ["a", "b"]
    save(graph, tmp_path)
    back = load(tmp_path)
    codes = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (9, FRAMES, WIDTH))
    first: dict[str, np.ndarray] = {}
    second: dict[str, np.ndarray] = {}
    graph.run(codes, trace=first)
    back.run(codes, trace=second)
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)
    assert back.tensors == graph.tensors
    assert (back.outputs, back.notes) == (graph.outputs, graph.notes)


def test_files_depend_on_the_graph_alone(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save(graphs()["mixed"], tmp_path / folder)
    for name in ("integer.json", "integer.npz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["integer.json", "integer.npz"]


def test_shared_tables_are_written_once() -> None:
    plain, arrays = to_plain(graphs()["delta"])
    nodes = [op["nodes"]["array"] for op in plain["ops"][1]["body"]["ops"] if op["type"] == "Interpolate"]
    assert len(nodes) == 3
    assert len(set(nodes)) == 2
    assert arrays[nodes[0]].dtype == np.int16


def damaged(plain: dict[str, Any], arrays: dict[str, np.ndarray], how: str) -> None:
    if how == "format":
        plain["format"] = "kestrel-integer-0"
    elif how == "range":
        plain["tensors"]["first"]["high"] = 5
    elif how == "op":
        plain["ops"][0]["type"] = "Softmax"
    elif how == "field":
        del plain["ops"][0]["rescale"]
    elif how == "array":
        arrays.pop(sorted(arrays)[0])
    else:
        arrays[sorted(arrays)[0]] = np.array([1 << 20])


@pytest.mark.parametrize("how", ["format", "range", "op", "field", "array", "values"])
def test_damaged_files_are_refused_in_one_line(how: str) -> None:
    plain, arrays = to_plain(graphs()["mixed"])
    plain = json.loads(json.dumps(plain))
    damaged(plain, arrays, how)
    with pytest.raises(KestrelError) as caught:
        from_plain(plain, arrays)
    assert "\n" not in str(caught.value)
