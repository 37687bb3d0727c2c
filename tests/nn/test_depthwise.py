"""Convolutions of small maps against PyTorch's own, values and gradients, in every layout."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

from kestrel.nn import build, channel_major, depthwise, native
from kestrel.nn.channel_major import BatchNorm2d, MaxPool2d, hold_statistics, is_batch_last, is_channel_major

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channel_major.channels_last,
    "channel_major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "batch_last": channel_major.batch_last,
}


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _both(x: torch.Tensor, parameters: list[torch.Tensor], ours, theirs) -> None:  # type: ignore[no-untyped-def]
    """Results and gradients of two functions are equal."""
    leaves = [x.detach().requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]
    made, wanted = ours(*leaves), theirs(*leaves)
    torch.testing.assert_close(made, wanted)
    grad = _draw(*wanted.shape)
    for mine, other in zip(
        torch.autograd.grad(made, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [((5, 13), 7, 1, 3), ((5, 13), 3, 1, 1), ((10, 26), 5, 2, 2), ((7, 6), 7, 2, 3), ((1, 4), 3, 1, 1), ((30, 20), 3, 2, 0)],
)  # fmt: skip
def test_depthwise_equals_grouped_convolution(layout: str, size, kernel: int, stride: int, padding: int) -> None:  # type: ignore[no-untyped-def]
    x, weight = LAYOUTS[layout](_draw(3, 4, *size)), _draw(4, 1, kernel, kernel)
    s, p = (stride, stride), (padding, padding)
    wanted = lambda x, w: functional.conv2d(x, w, None, s, p, 1, 4)  # noqa: E731
    _both(x, [weight], lambda x, w: depthwise.depthwise_conv2d(x, w, s, p), wanted)
    _both(x, [weight], lambda x, w: depthwise.toeplitz_conv2d(x, w, s, p), wanted)


def _native_equals_torch(
    clips: int, layout: str, size: tuple, kernel: tuple, stride: tuple, padding: tuple, results: int = 1
) -> None:
    """Values and gradients of the native kernels against a grouped convolution in float64."""
    x, weight = LAYOUTS[layout](_draw(clips, 3, *size)).float(), _draw(3 * results, 1, *kernel).float()
    assert depthwise.takes_native(x)
    found = []
    for apply, dtype in ((depthwise.depthwise_conv2d, torch.float32), (functional.conv2d, torch.float64)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        made = apply(*leaves, stride=stride, padding=padding, **({"groups": 3} if dtype == torch.float64 else {}))
        found.append([made, *torch.autograd.grad(made, leaves, _draw(*made.shape).to(dtype))])
    assert is_batch_last(found[0][0])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5 * other.detach().abs().max().item())


NATIVE = [
    (16, (5, 13), (7, 7), (1, 1), (3, 3)), (17, (5, 13), (5, 5), (1, 1), (2, 2)), (100, (5, 13), (3, 3), (1, 1), (1, 1)),
    (31, (10, 26), (7, 7), (2, 2), (3, 3)), (40, (6, 9), (3, 5), (1, 2), (0, 2)), (130, (20, 1), (13, 1), (1, 1), (6, 0)),
    (33, (21, 1), (9, 1), (2, 1), (0, 0)), (20, (4, 30), (1, 11), (1, 3), (0, 5)), (18, (3, 3), (7, 7), (1, 1), (3, 3)),
    (25, (7, 7), (2, 2), (3, 3), (0, 0)), (150, (2, 2), (1, 1), (1, 1), (2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", NATIVE)
def test_native_depthwise_equals_grouped_convolution(native_library, layout: str, case: tuple) -> None:  # type: ignore[no-untyped-def]
    clips, *rest = case
    _native_equals_torch(clips, layout, *rest)


def test_several_results_of_a_channel(native_library) -> None:  # type: ignore[no-untyped-def]
    _native_equals_torch(20, "contiguous", (5, 13), (3, 5), (2, 1), (1, 2), results=4)


def test_convolution_of_one_channel_is_native(native_library) -> None:  # type: ignore[no-untyped-def]
    x, weight = _draw(16, 1, 6, 7).float(), _draw(9, 1, 3, 3).float()
    made = depthwise.conv2d(x, weight, padding=(1, 1))
    assert is_batch_last(made)
    torch.testing.assert_close(made, functional.conv2d(x, weight, padding=1))


def test_images_stay_batch_last_from_the_first_convolution_on(native_library) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(16, 1, 10, 26)
    for weight, stride, groups in ((6, 1, 3, 3), 2, 1), ((6, 1, 5, 5), 1, 6), ((8, 6, 1, 1), 1, 1):
        padding = (weight[2] // 2, weight[3] // 2)
        x = depthwise.conv2d(x, torch.randn(weight), None, (stride, stride), padding, groups)
        x = functional.relu6(BatchNorm2d(weight[0])(x))
        assert is_batch_last(x)


@pytest.mark.parametrize("isa", ["avx2", "baseline", "portable"])
def test_every_instruction_set_convolves_alike(native_library, monkeypatch, tmp_path, isa: str) -> None:  # type: ignore[no-untyped-def]
    if isa == "portable":
        path = build.build(tmp_path, ("-DKESTREL_PORTABLE", "-O1"))
    else:
        path = shutil.copy(native_library, tmp_path / f"{isa}.so")  # a library decides once
        monkeypatch.setenv("KESTREL_ISA", isa)
    library = native.open_library(path)
    monkeypatch.setattr(native, "_load", lambda: library)
    for clips, *rest in NATIVE:
        _native_equals_torch(clips, "batch_last", *rest)


def test_native_depthwise_does_not_depend_on_threads(native_library) -> None:  # type: ignore[no-untyped-def]
    x, weight = channel_major.batch_last(_draw(50, 7, 5, 13).float()).requires_grad_(), _draw(7, 1, 5, 5).float()
    weight.requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made = depthwise.depthwise_conv2d(x, weight, padding=(2, 2))
            found.append([made, *torch.autograd.grad(made.square().sum(), (x, weight))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_few_clips_and_other_numbers_go_another_way(native_library) -> None:  # type: ignore[no-untyped-def]
    x = torch.zeros(16, 2, 3, 3)
    assert depthwise.takes_native(x) and not depthwise.takes_native(x[:15]) and not depthwise.takes_native(x.double())


def test_kernel_that_is_not_square_and_unequal_strides() -> None:
    x, weight = _draw(2, 3, 6, 9), _draw(3, 1, 3, 5)
    _both(
        x,
        [weight],
        lambda x, w: depthwise.toeplitz_conv2d(x, w, (1, 2), (0, 2)),
        lambda x, w: functional.conv2d(x, w, None, (1, 2), (0, 2), 1, 3),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 6), (3, 2)])
def test_conv2d_equals_torch(layout: str, kernel: int, groups: int) -> None:
    x, weight, bias = LAYOUTS[layout](_draw(3, 6, 5, 7)), _draw(6, 6 // groups, kernel, kernel), _draw(6)
    p = (kernel // 2, kernel // 2)
    _both(
        x,
        [weight, bias],
        lambda x, w, b: depthwise.conv2d(x, w, b, (1, 1), p, groups),
        lambda x, w, b: functional.conv2d(x, w, b, 1, p, 1, groups),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("statistics", ["own", "batch"])
@pytest.mark.parametrize("clips", [1, 4])
def test_gradient_of_batch_norm_in_every_layout(layout: str, of_gradient: str, statistics: str, clips: int) -> None:
    x = _draw(clips, 3, 4, 5)
    norm = BatchNorm2d(3, eps=1e-3).double()
    hold_statistics(norm, statistics == "batch")
    leaf = LAYOUTS[layout](x).requires_grad_()
    grad = _draw(clips, 3, 5, 4).transpose(2, 3)
    (made,) = torch.autograd.grad(norm(leaf), leaf, LAYOUTS[of_gradient](grad))
    centred = x - x.mean((0, 2, 3), keepdim=True)
    spread = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-3).sqrt()
    along = (grad * centred).mean((0, 2, 3), keepdim=True) / spread**2
    torch.testing.assert_close(made, (grad - grad.mean((0, 2, 3), keepdim=True) - centred * along) / spread)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clips", [1, 4])
def test_batch_norm_equals_torch(layout: str, training: bool, clips: int) -> None:
    x = LAYOUTS[layout](_draw(clips, 3, 4, 5))
    ours, theirs = BatchNorm2d(3, eps=1e-3).double(), nn.BatchNorm2d(3, eps=1e-3).double()
    for norm in (ours, theirs):
        norm.train(training)
        norm(x + 1)  # moves the running statistics
    _both(x, [], ours, theirs)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_statistics_are_of_the_batch_and_not_noted(layout: str) -> None:
    x = LAYOUTS[layout](_draw(4, 3, 2, 5))
    norm = BatchNorm2d(3).double().eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    hold_statistics(norm, True)
    made = norm(x)
    assert made.mean((0, 2, 3)).abs().max() < 1e-9
    assert all(torch.equal(value, norm.state_dict()[key]) for key, value in before.items())
    hold_statistics(norm, False)
    torch.testing.assert_close(
        norm(x), functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )


def test_small_maps_stay_channel_major_through_a_block() -> None:
    x = torch.randn(2, 6, 5, 13)
    x = depthwise.conv2d(x, torch.randn(6, 1, 7, 7), None, (1, 1), (3, 3), 6)
    assert is_channel_major(x)
    x = depthwise.conv2d(functional.relu6(BatchNorm2d(6)(x)), torch.randn(8, 6, 1, 1))
    assert is_channel_major(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise_convolution_and_mean_of_small_maps_lie_alike(layout: str) -> None:
    x, weight = LAYOUTS[layout](_draw(3, 6, 5, 13)), _draw(4, 6, 1, 1)
    _both(
        x,
        [weight],
        lambda x, w: channel_major.global_mean(depthwise.conv2d(x, w)),
        lambda x, w: functional.conv2d(x, w).mean((2, 3)),
    )
    seen = []
    made = depthwise.conv2d(x, weight.requires_grad_())
    made.register_hook(seen.append)
    channel_major.global_mean(made).square().sum().backward()
    if layout in ("channels_last", "channel_major"):
        assert is_channel_major(made) and is_channel_major(seen[0])


def test_pointwise_convolution_of_large_maps_keeps_channels_last() -> None:
    x = channel_major.channels_last(torch.randn(2, 6, 20, 26))
    assert depthwise.conv2d(x, torch.randn(8, 6, 1, 1)).is_contiguous(memory_format=torch.channels_last)


def test_choice_goes_by_size() -> None:
    assert depthwise.takes_toeplitz((5, 13), (7, 7))
    assert depthwise.takes_toeplitz((5, 13), (5, 5))
    assert not depthwise.takes_toeplitz((5, 13), (3, 3))
    assert not depthwise.takes_toeplitz((10, 26), (7, 7))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(1, 1), (2, 1), (1, 3), (2, 3), (4, 5)])
def test_max_pooling_equals_torch(layout: str, window: tuple[int, int]) -> None:
    """Rows and columns that are left over (of 9 x 7) are dropped."""
    x = LAYOUTS[layout](_draw(4, 3, 9, 7))
    _both(x, [], MaxPool2d(window), nn.MaxPool2d(window))
    assert is_batch_last(MaxPool2d(window)(x)) == (layout == "batch_last")


def test_equal_values_of_a_window_share_its_gradient() -> None:
    x = channel_major.batch_last(torch.ones(3, 2, 4, 2)).requires_grad_()
    MaxPool2d((2, 2))(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 0.25))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_channels_equal_torch(layout: str) -> None:
    x, y = LAYOUTS[layout](_draw(3, 2, 4, 5)), LAYOUTS[layout](_draw(3, 4, 4, 5))
    made = channel_major.joined_channels([x, y])
    assert torch.equal(made, torch.cat([x, y], 1))
    assert is_batch_last(made) == (layout == "batch_last")


def test_a_chain_stays_batch_last() -> None:
    x = channel_major.batch_last(torch.randn(5, 4, 6, 3))
    made = BatchNorm2d(7)(depthwise.conv2d(x, torch.randn(7, 4, 1, 1)))
    assert is_batch_last(torch.relu(made))
