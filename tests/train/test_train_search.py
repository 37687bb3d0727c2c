"""The search beside the training: gradients, modes, budgets, and resuming at any batch."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from train_kit import CLASSES, make_job, make_splits, write_features

from kestrel.errors import RunAgain
from kestrel.frontend.post import Post
from kestrel.models.architecture import read_file
from kestrel.models.proxyless import SuperNet
from kestrel.models.spotter import KeywordSpotter
from kestrel.nn.channel_major import hold_statistics
from kestrel.recipe import proxylessnas_kws as recipe
from kestrel.settings import build, merge
from kestrel.store import checkpoint
from kestrel.train import loop
from kestrel.train.data import Batch
from kestrel.train.loop import Job, train
from kestrel.train.ranks import Ranks
from kestrel.train.search import Search, keep_others
from kestrel.train.signals import StopFlag

SHAPE = (5, 4)  # of train_kit
SMALL = {
    "width_mult": 0.12,
    "n_cell_stages": [2],
    "kernels": [3, 5],
    "expansions": [1, 2],
    "search": {"warmup_epochs": 1, "arch_start_epoch": 0, "grad_update_arch_param_every": 2, "arch_lr": 0.1},
}


def _spotter(**settings: Any) -> KeywordSpotter:
    torch.manual_seed(0)
    net = recipe.build(build(recipe.ModelSpec, merge(SMALL, settings)), SHAPE, len(CLASSES))
    return KeywordSpotter(Post([], SHAPE), net)


def _job(out: Path, **phase: Any) -> Job:
    base = {"epochs": 3, "optimizer": "sgd", "lr": [0.05], "nesterov": True, "keep": "last", "schedule": "cosine"}
    return make_job(out, phase={**base, **phase})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_features(tmp_path / "train.h5", 70)
    write_features(tmp_path / "validation.h5", 40, seed=1)
    return tmp_path


def _search(data: Path, **settings: Any) -> Search:
    spotter = _spotter(search=settings)
    job = _job(data / "out")
    _, validation = make_splits(data, job)
    spotter.net.updates_per_epoch = 5
    with Ranks(torch.device("cpu")) as ranks:
        search = Search(spotter, validation, job, 15, ranks, logging.getLogger("test"))
    spotter.net.set_phase("pretrain")
    return search


def _draw(data: Path) -> Batch:
    return next(make_splits(data, _job(data / "out"))[1].batches())


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("mode", ["full", "full_v2"])
def test_alpha_gradient_is_that_of_brute_force(data: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy through gates that stand in the graph, and the expected cost, by hand."""
    settings = {
        "grad_binary_mode": mode,
        "target_hardware": "flops",
        "flops_ref_value": 5e4,
        "grad_reg_loss_alpha": 1.0,
    }
    search = _search(data, **settings, grad_reg_loss_beta=2.0)
    net, batch = search.net.double(), _draw(data)
    batch = Batch(batch.features.double(), batch.labels, batch.rows)
    found: list[Tensor] = []
    monkeypatch.setattr(search.optimizer, "step", lambda: found.extend(a.grad.clone() for a in search.parameters))
    torch.manual_seed(4)
    with search._untouched():
        search._by_gates(batch)
        path = [block.taken for block in net.mixed()]
        wanted = _by_hand(search, batch, path)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.abs().max() > 1e-6


def _by_hand(search: Search, batch: Batch, path: list[int]) -> list[Tensor]:
    net = search.net
    alphas = [alpha.detach().clone().requires_grad_() for alpha in search.parameters]
    chances = [torch.softmax(alpha, 0) for alpha in alphas]
    # one-hot in value, with the gradient of the chances: what a gate is (Courbariaux et al. 2015)
    gates = [
        functional.one_hot(torch.tensor(k), len(p)).to(p.dtype) + p - p.detach()
        for k, p in zip(path, chances, strict=True)
    ]
    x = batch.features.transpose(1, 2).unsqueeze(1)
    x = net.first_conv(net.input(x))
    for block, gate in zip(net.mixed(), gates, strict=True):
        branch = sum(gate[k] * candidate(x) for k, candidate in enumerate(block.candidates))
        x = block.act(x + branch) if block.shortcut else branch
    logits = net.classifier(net.mean(net.feature_mix(x).mean((2, 3))))
    expected = net.resources[0].expected(chances)
    loss = functional.cross_entropy(logits, batch.labels) * (expected.log() / math.log(5e4)) ** 2.0
    return list(torch.autograd.grad(loss, alphas))


def test_two_mode_keeps_the_chances_of_unsampled_candidates(data: Path) -> None:
    search = _search(data, grad_binary_mode="two", target_hardware="flops", arch_lr_schedule="constant")
    with torch.no_grad():
        for alpha in search.parameters:
            alpha.normal_()
    before = [block.chances().detach().clone() for block in search.net.mixed()]
    torch.manual_seed(1)
    with search._untouched():
        search._by_gates(_draw(data))
    for block, old in zip(search.net.mixed(), before, strict=True):
        new = block.chances().detach()
        moved = (new - old).abs() > 1e-6
        assert 0 < int(moved.sum()) <= 2
        torch.testing.assert_close(new[moved].sum(), old[moved].sum())
        torch.testing.assert_close(new[~moved], old[~moved])


def test_keep_others() -> None:
    before = torch.tensor([0.3, -1.0, 2.0, 0.5])
    alpha = before + torch.tensor([0.7, 0.1, -0.4, 0.0])
    keep_others(alpha, before, [0, 2])
    chances, old = torch.softmax(alpha, 0), torch.softmax(before, 0)
    torch.testing.assert_close(chances[[1, 3]], old[[1, 3]])
    torch.testing.assert_close(chances[[0, 2]].sum(), old[[0, 2]].sum())
    torch.testing.assert_close(alpha[0] - alpha[2], before[0] - before[2] + 1.1)


def test_alpha_learns_where_the_block_is_skipped(data: Path) -> None:
    search = _search(data, target_hardware="none")
    block = search.net.mixed()[1]
    block.alpha.data[-1] = 8.0
    before = block.alpha.detach().clone()
    torch.manual_seed(1)
    with search._untouched():
        search._by_gates(_draw(data))
    assert block.taken == len(block.candidates)
    assert ((block.alpha - before).abs() > 0).sum() >= 4


def test_an_update_of_alphas_touches_nothing_else(data: Path) -> None:
    search = _search(data)
    before = {name: value.clone() for name, value in search.net.state_dict().items()}
    with search._untouched():
        search._by_gates(_draw(data))
    changed = {name for name, value in before.items() if not torch.equal(search.net.state_dict()[name], value)}
    assert {name for name in changed if not name.endswith(".largest")} == {"blocks.0.alpha", "blocks.1.alpha"}


def test_loss_terms(data: Path) -> None:
    entropy = torch.tensor(0.7)

    def loss(**settings: Any) -> tuple[float, float, float]:
        search = _search(data, **settings)
        chances = [block.chances() for block in search.net.mixed()]
        macs, stored = (float(each.expected(chances).detach()) for each in search.net.resources)
        return float(search.loss(entropy, chances).detach()), macs, stored

    assert loss(target_hardware="none")[0] == pytest.approx(0.7)
    found, macs, _ = loss(
        target_hardware="flops", grad_reg_loss_alpha=0.2, grad_reg_loss_beta=0.3, flops_ref_value=100e6
    )
    assert found == pytest.approx(0.2 * 0.7 * (math.log(macs) / math.log(100e6)) ** 0.3, rel=1e-5)
    found, _, stored = loss(
        target_hardware="mem", grad_reg_loss_type="add#linear", grad_reg_loss_lambda=0.1, mem_ref_value=1000.0
    )
    assert found == pytest.approx(0.7 + 0.1 * (stored - 1000) / 1000, rel=1e-5)


def test_rate_rises_along_a_cosine(data: Path) -> None:
    search = _search(data)
    assert search.rate(search.warm) == pytest.approx(0.0)
    assert search.rate(15) == pytest.approx(0.1)
    half = (search.warm + 15) / 2
    assert search.rate(half) == pytest.approx(0.1 * (1 + math.cos(math.pi * 1.25)))  # type: ignore[arg-type]


def test_updates_are_due_as_in_the_original(data: Path) -> None:
    """Every second batch, not in the warm-up of one pass of five batches, nor in one more pass where that is set."""
    assert [step for step in range(1, 16) if _search(data)._due(step)] == [7, 9, 12, 14]
    assert [step for step in range(1, 16) if _search(data, arch_start_epoch=1)._due(step)] == [12, 14]
    rl = _search(data, arch_algo="rl", rl_update_steps_per_epoch=2)
    assert [step for step in range(1, 16) if rl._due(step)] == [8, 10, 13, 15]
    assert [_search(data, arch_algo="rl", rl_update_per_epoch=True)._due(step) for step in (9, 10)] == [0, 5]


# ----------------------------------------------------------------------------------------------------------- whole searches


def _run(data: Path, out: Path, stop_after: list[int], spotter: KeywordSpotter, **phase: Any) -> dict[str, Any]:
    """Train, stopped behind each of these updates; the content of last.pt."""
    for stops in [*stop_after, None]:
        job = _job(out, **phase)
        stop = StopFlag()
        copied = _spotter_like(spotter)

        def progress(done: int, total: int, text: str, stops: int | None = stops, stop: StopFlag = stop) -> None:
            if done == stops:
                stop.signal = "SIGTERM"

        try:
            train(job, copied, *make_splits(data, job), progress=progress, stop=stop)
        except RunAgain:
            assert stops is not None
    return checkpoint.load(out / "last.pt")


def _spotter_like(spotter: KeywordSpotter) -> KeywordSpotter:
    import copy

    return copy.deepcopy(spotter)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_hardware": "flops", "flops_ref_value": 1e5},
        {"grad_binary_mode": "two"},
        {"arch_algo": "rl", "rl_batch_size": 3, "target_hardware": "both", "budget_macs": 200_000},
    ],
)
def test_a_search_in_pieces_equals_a_straight_one(data: Path, monkeypatch: pytest.MonkeyPatch, settings: dict) -> None:
    """Stopped in the warm-up, at its end and in the search: the same alphas, weights, files, bit by bit."""
    monkeypatch.setattr(loop, "draw_curves", lambda path, rows, title: path.write_text(str(rows)))
    spotter = _spotter(search=settings)
    straight = _run(data, data / "a", [], spotter)
    pieces = _run(data, data / "b", [2, 5, 9], spotter)
    for name, value in straight["model"].items():
        assert torch.equal(value, pieces["model"][name]), name
    assert any(bool((value != 0).any()) for name, value in straight["model"].items() if name.endswith("alpha"))
    assert straight["search"]["history"] == pieces["search"]["history"]
    assert straight["search"]["done"] == pieces["search"]["done"] > 0
    for name in ("search.csv", "architecture.yaml", "best.pt"):
        assert (data / "a" / name).read_bytes() == (data / "b" / name).read_bytes()
    assert (data / "a" / "search.png").stat().st_size > 0


def test_files_and_budget_of_a_search(data: Path) -> None:
    free = _spotter().net
    assert isinstance(free, SuperNet)
    macs, stored = free.resources
    budget = {
        "budget_macs": (macs.smallest * 2 + macs.largest) // 3,
        "budget_bytes": (stored.smallest + stored.largest) // 2,
    }
    spotter = _spotter(search={**budget, "budget_rate": 0.5})
    last = _run(data, data / "out", [], spotter, epochs=4)
    rows = list(csv.DictReader((data / "out" / "search.csv").open()))
    assert [row["phase"] for row in rows] == ["warm-up", "search", "search", "search"]
    assert all(int(row["macs"]) <= budget["budget_macs"] for row in rows)
    assert all(int(row["bytes"]) <= budget["budget_bytes"] for row in rows)
    assert float(rows[0]["entropy"]) == pytest.approx((math.log(4) + math.log(5)) / 2, abs=1e-3)
    found = read_file(data / "out" / "architecture.yaml")
    assert found.text == rows[-1]["blocks"]
    best = checkpoint.load(data / "out" / "best.pt")
    assert best["metrics"]["step"] == last["step"]  # the last network is kept, not the most accurate one of the way
    spotter.load_state_dict(best["model"])
    derived = spotter.net.successor()
    assert derived.macs(SHAPE[0]) == int(rows[-1]["macs"])


def test_validation_mixes_the_classes(data: Path) -> None:
    """Files are often sorted by class, and a batch of one class has no statistics to normalise by."""
    search = _search(data)
    _, validation = make_splits(data, _job(data / "out"))
    order = search.mixed(validation).order(0)
    assert sorted(order) == list(range(40)) != list(order)


def test_weights_alone_train_in_the_warm_up(data: Path) -> None:
    spotter = _spotter()
    alphas = [alpha.detach().clone() for alpha in spotter.net.alphas()]  # type: ignore[operator]
    last = _run(data, data / "out", [], spotter, epochs=1)
    for index, alpha in enumerate(alphas):
        assert torch.equal(last["model"][f"net.blocks.{index}.alpha"], alpha)
    assert last["search"]["done"] == 0


def test_held_statistics_come_back(data: Path) -> None:
    search = _search(data)
    with pytest.raises(ZeroDivisionError), search._untouched():
        raise ZeroDivisionError
    norm = search.net.first_conv.norm
    assert norm.statistics == "own"
    assert not search.net.path_held
    hold_statistics(search.net, False)
