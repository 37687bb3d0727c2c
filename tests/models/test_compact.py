"""Compact checkpoints: a network loaded from one computes with exactly the stored weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kestrel.errors import KestrelError
from kestrel.frontend.post import Post
from kestrel.models.block_lstm import BlockLSTM
from kestrel.models.compact import compact, state_of
from kestrel.models.inventory import decoded_weights, weight_codes
from kestrel.models.spotter import KeywordSpotter
from kestrel.store.checkpoint import load, save

FRAMES, WIDTH = 6, 5
STEPS = [{"normalise": "channel"}, {"dct": 4}]


def make(seed: int, quant_w: int | None, method: int = 1, blocks: int = 2) -> KeywordSpotter:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    post = Post(STEPS, (FRAMES, WIDTH))
    net = BlockLSTM(
        input_size=4, classes=3, hidden=7, n_msb=blocks, method=method, quant_w=quant_w, noise_eval=0.0, input_range=3.0
    )
    return KeywordSpotter(post, net)


def fitted(quant_w: int | None, method: int = 1) -> tuple[KeywordSpotter, torch.Tensor]:
    spotter = make(1, quant_w, method)
    x = torch.randn(40, FRAMES, WIDTH, generator=torch.Generator().manual_seed(3)) * 2 + 1
    spotter.post.fit([x])
    with torch.no_grad():  # ranges and weights that no level holds by chance
        for parameter in spotter.net.parameters():
            parameter.add_(0.03 * torch.rand_like(parameter))
    spotter.net.project()
    spotter.net.set_phase("eval")
    return spotter, x


@pytest.mark.parametrize("quant_w", [None, 2, 4, 8, 12])
@pytest.mark.parametrize("method", [0, 1])
def test_round_trip_gives_the_answers_of_the_stored_weights(tmp_path: Path, quant_w: int | None, method: int) -> None:
    spotter, x = fitted(quant_w, method)
    with torch.no_grad(), decoded_weights(spotter.net, weight_codes(spotter.net, 8)):
        expected = spotter(x)
    save(tmp_path / "kept.pt", compact(spotter, 8))
    other = make(2, quant_w, method)
    other.load_state_dict(state_of(load(tmp_path / "kept.pt")))
    other.net.set_phase("eval")
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        if quant_w is not None:  # its own quantiser stores the same levels
            assert torch.equal(expected, spotter(x))
    again = weight_codes(other.net, 8)
    for name, codes in weight_codes(spotter.net, 8).items():
        assert np.array_equal(again[name].codes, codes.codes), name
        assert np.array_equal(again[name].scale, codes.scale), name


def test_weights_are_small_integers_and_the_rest_is_exact() -> None:
    spotter, _ = fitted(None)
    content = compact(spotter, 8)
    assert {group["codes"].dtype for group in content["codes"].values()} == {torch.int8}
    assert {group["codes"].dtype for group in compact(spotter, 9)["codes"].values()} == {torch.int16}
    state = state_of(content)
    assert set(state) == set(spotter.state_dict())
    for name, value in spotter.state_dict().items():
        if name in content["codes"]:
            step = content["codes"][name]["scale"].max().item()
            assert (state[name] - value).abs().max() <= 0.5001 * step
        else:
            assert torch.equal(state[name], value), name


def test_a_training_checkpoint_keeps_its_state_and_other_content_is_refused() -> None:
    spotter, _ = fitted(4)
    state = spotter.state_dict()
    assert state_of({"model": state}) is state
    for content in ({}, {"codes": {}}, {"codes": {"net.w": {"scale": 1}}, "others": {}}, {"codes": 3, "others": {}}):
        with pytest.raises(KestrelError, match="some.pt holds no weights"):
            state_of(content, "some.pt")


def test_weights_that_are_not_finite_are_refused() -> None:
    spotter, _ = fitted(None)
    with torch.no_grad():
        spotter.net.readout.weight[0, 0, 0] = float("nan")
    with pytest.raises(KestrelError, match="not finite"):
        compact(spotter, 8)
