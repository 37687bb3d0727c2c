"""Networks trained with few bits as ONNX: weights and steps are constants, and the answers are PyTorch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lower_kit import FRAMES, WIDTH, features
from quant_kit import LowBitNet, trained

from kestrel.export.onnx import write_onnx
from kestrel.frontend.post import Post
from kestrel.models.quant_net import LowBitPlan
from kestrel.models.spotter import KeywordSpotter


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("ranges", ["learned", "ema"])
def test_onnx_answers_as_the_network(tmp_path: Path, ranges: str, power_of_two: bool) -> None:
    torch.manual_seed(1)
    net = trained(LowBitNet(LowBitPlan("4bitsym"), ranges=ranges, power_of_two=power_of_two))
    path = tmp_path / "model.onnx"
    write_onnx(KeywordSpotter(Post([], (FRAMES, WIDTH)), net), (FRAMES, WIDTH), path, {})
    x = features(9, 50)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"features": x.numpy()})[0]
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.abs(found - wanted).mean() <= 0.01 * wanted.std()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.96
    codes = net.low_bit_layers()["out"].weight_codes()  # no normalisation behind it, which is folded
    assert codes is not None
    graph = onnx.load(str(path)).graph
    held = [onnx.numpy_helper.to_array(entry) for entry in graph.initializer]
    held += [onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"]
    wanted = np.sort(codes.decode(), None)
    assert any(array.size == wanted.size and np.allclose(np.sort(array, None), wanted) for array in held)
