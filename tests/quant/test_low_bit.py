"""Grids of weights: levels, nearest level, steps, gradients, and the bytes that codes take."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kestrel.errors import UsageError
from kestrel.lower.tensor import STORAGE_BITS, Constant
from kestrel.quant.low_bit import NAMES, SCALES, Grid, check_grid, fake_quantise, shaped
from kestrel.quant.packing import WeightCodes, pack_storage, unpack_kept, unpack_storage

LEVELS = {
    "2bit": [-1, 0, 1],
    "3bit": [-3, -2, -1, 0, 1, 2, 3],
    "2bitsym": [-3, -1, 1, 3],
    "4bitsym": list(range(-15, 16, 2)),
    "ternary": [-1, 0, 1],
    "binary": [-1, 1],
    "fp130": [-128, -64, -32, -16, -8, -4, -2, -1, 1, 2, 4, 8, 16, 32, 64, 128],
    "dorefa1": [-1, 1],
    "dorefa2": [-3, -1, 1, 3],
}
SETTINGS = list(itertools.product(NAMES, SCALES, (False, True)))


def weights(seed: int = 0, shape: tuple[int, ...] = (5, 4, 3, 3)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 0, shape[0]).view(-1, *(1 for _ in shape[1:]))


@pytest.mark.parametrize("name", LEVELS)
def test_levels(name: str) -> None:
    grid = Grid.named(name)
    assert grid.levels == LEVELS[name]
    swept = grid.codes(torch.linspace(-300, 300, 60001), torch.ones(()))
    if name != "fp130":  # its smallest level is far from 0
        assert sorted(set(swept.int().tolist())) == LEVELS[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fp130"])
def test_codes_are_the_nearest_levels(name: str) -> None:
    grid = Grid.named(name)
    x = torch.linspace(-1.3 * grid.largest, 1.3 * grid.largest, 2001, dtype=torch.float64)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    found = grid.codes(x * 0.37, torch.tensor(0.37, dtype=torch.float64))
    assert (found - x).abs().max() <= (levels - x[:, None]).abs().amin(1).max() + 1e-9
    assert torch.allclose((found - x).abs(), (levels - x[:, None]).abs().amin(1))


def test_fp130_rounds_the_exponent() -> None:
    codes = Grid.named("fp130").codes(torch.tensor([0.0, 0.3, -0.3, 1.4, 1.5, -90.0, 91.0, 1e6]), torch.ones(()))
    assert codes.tolist() == [1, 1, -1, 1, 2, -64, 128, 128]


def test_ties_go_to_even_levels() -> None:
    assert Grid.named("4bit").codes(torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.ones(())).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_is_the_formula_of_the_paper(bits: int) -> None:
    w = torch.linspace(-1.5, 1.5, 976, dtype=torch.float64)
    steps = 2**bits - 1
    wanted = 2 * torch.clip(torch.round((w + 1) / 2 * steps) / steps, 0, 1) - 1
    grid = Grid.named(f"dorefa{bits}")
    step = grid.step(w.view(1, -1))
    assert torch.allclose(grid.codes(w, step) * step, wanted, atol=1e-12)


@pytest.mark.parametrize(("name", "scale", "per_output"), SETTINGS)
def test_quantising_again_changes_nothing(name: str, scale: str, per_output: bool) -> None:
    grid, w = Grid.named(name), weights()
    step = grid.step(w, scale, per_output)  # type: ignore[arg-type]
    assert step.shape == ((5,) if per_output else (1,))
    once = fake_quantise(grid, w, step)
    assert torch.equal(fake_quantise(grid, once, step), once)
    stored = grid.weight_codes(w, step)
    assert (stored.decode() == once.numpy()).all()
    assert set(np.unique(stored.codes)) <= set(grid.levels)
    assert grid.storage(False) in STORAGE_BITS
    Constant(stored.codes, stored.stored_as)  # fits its storage


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_goes_straight_through(name: str) -> None:
    grid, w = Grid.named(name), weights().requires_grad_()
    wanted = torch.randn(w.shape)
    (fake_quantise(grid, w, grid.step(w)) * wanted).sum().backward()
    assert torch.equal(w.grad, wanted)


def test_steps_by_maximum_and_mean() -> None:
    w = torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.0, -1.0]])
    assert Grid.named("8bit").step(w).tolist() == pytest.approx([2 / 127])
    assert Grid.named("8bit").step(w, per_output=True).tolist() == pytest.approx([1 / 127, 2 / 127])
    assert Grid.named("4bitsym").step(w, per_output=True).tolist() == pytest.approx([1 / 15, 2 / 15])
    mean = w.abs().mean().item()
    # BitNetMCU: scale 2^(b-1) / (mean / 0.25); the mean lies at level 2 of 4 bits, at 0.5 of 2 bits
    assert Grid.named("4bit").step(w, "mean").tolist() == pytest.approx([mean / 2])
    assert (2 * Grid.named("4bitsym").step(w, "mean")).tolist() == pytest.approx([mean / 2])
    assert (2 * Grid.named("2bitsym").step(w, "mean")).tolist() == pytest.approx([2 * mean])
    assert Grid.named("ternary").step(w, "mean").tolist() == pytest.approx([mean])
    assert Grid.named("binary").step(w, "octav").tolist() == pytest.approx([mean])
    assert Grid.named("fp130").step(w).tolist() == pytest.approx([2 / 128])


def test_masked_weights_do_not_move_the_step() -> None:
    w, mask = torch.tensor([[1.0, 100.0, 3.0]]), torch.tensor([[True, False, True]])
    for scale in SCALES:
        for name in ("8bit", "ternary", "4bitsym"):
            grid = Grid.named(name)
            assert grid.step(w, scale, mask=mask).item() == pytest.approx(grid.step(w[:, [0, 2]], scale).item())


@pytest.mark.parametrize("name", ["3bit", "4bit", "4bitsym", "5bit"])
def test_octav_has_less_error_than_the_maximum(name: str) -> None:
    grid, w = Grid.named(name), torch.distributions.Laplace(0.0, 1.0).sample((1, 20000))
    torch.manual_seed(0)

    def error(step: torch.Tensor) -> float:
        return float((fake_quantise(grid, w, step) - w).square().mean())

    found = grid.step(w, "octav")
    assert error(found) < error(grid.step(w, "max"))
    assert error(found) <= 1.1 * min(error(found * factor) for factor in torch.linspace(0.5, 2, 31))


def test_all_zero_weights_have_finite_codes() -> None:
    for name, scale, per_output in SETTINGS:
        grid, w = Grid.named(name), torch.zeros(3, 4)
        step = grid.step(w, scale, per_output)  # type: ignore[arg-type]
        assert bool(torch.isfinite(grid.codes(w, shaped(step, w)) * shaped(step, w)).all())


@pytest.mark.parametrize("name", ["4bitsym", "binary", "fp130", "ternary", "8bit"])
def test_pruned_weights_are_real_zeros_in_storage(name: str) -> None:
    grid, w = Grid.named(name), weights()
    mask = weights(1) > 0
    stored = grid.weight_codes(w, grid.step(w), mask)
    assert (stored.codes[~mask.numpy()] == 0).all()
    assert (stored.codes == 0).mean() >= 0.3
    Constant(stored.codes, stored.stored_as)
    assert stored.leaves_out_zeros and stored.kept is not None
    assert (unpack_kept(stored.packed(), stored.kept, stored.codes.size) == stored.codes.reshape(-1)).all()
    kept, size = np.count_nonzero(stored.codes), stored.codes.size
    bits = 1 if name == "ternary" else grid.bits
    assert len(stored.packed()) == -(-size // 8) + -(-kept * bits // 8)  # a bit each, and those that are kept
    dense = len(grid.weight_codes(w, grid.step(w)).packed())
    assert (
        len(grid.weight_codes(w, grid.step(w), torch.ones_like(mask)).packed()) <= dense
    )  # never more with nothing pruned
    assert len(stored.packed()) < dense or name == "binary"  # whose codes take no more than the bit


@pytest.mark.parametrize("name", NAMES)
def test_packed_codes_come_back(name: str) -> None:
    grid = Grid.named(name)
    codes = np.random.default_rng(0).choice(grid.levels, 37)
    storage = grid.storage(False)
    data = pack_storage(codes, storage)
    assert len(data) == -(-37 * 8 // 5 // 8) if storage == "ternary" else len(data) == -(-37 * grid.bits // 8)
    assert (unpack_storage(data, storage, 37) == codes).all()
    assert WeightCodes(codes, np.ones(1, np.float32), grid.bits, storage).packed() == data


@pytest.mark.parametrize(
    ("storage", "codes"), [("ternary", [2]), ("power4", [3]), ("power4", [256]), ("odd4", [2]), ("odd4", [17])]
)
def test_codes_that_do_not_fit_are_refused(storage: str, codes: list[int]) -> None:
    with pytest.raises(ValueError, match="code"):
        pack_storage(codes, storage)


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"model.weights: unknown weight quantiser '4bitsyn'; did you mean '4bitsym'"):
        check_grid("4bitsyn", "model.weights")
