"""Convolutions of small maps on the CPU, above all depthwise ones.

PyTorch computes a depthwise convolution of small maps many times slower than a matrix product of the same size. The
native kernels (kestrel/nn/csrc/depthwise.cpp) take images whose clips lie innermost: a kernel element then multiplies a
row of numbers, and places outside the image are left out.

Where they are not built, a map of few positions is taken as a vector and the kernel of a channel as a Toeplitz matrix
T [H W, h w], so that all clips of a channel are one product: Y[c] = X[c] T(w[c]). Its work grows with the area of the map,
that of a convolution with the area of the kernel, so larger maps go through PyTorch in its channels-last layout.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kestrel.nn import native
from kestrel.nn.channel_major import (
    Pair,
    channel_rows,
    channels_last,
    fast_layouts,
    from_rows,
    is_batch_last,
    is_channel_major,
    pointwise_conv2d,
)

# A matrix product does about this many more multiply-adds in the same time as a channels-last convolution.
TOEPLITZ_ADVANTAGE = 5.0
FEWEST_CLIPS = 16  # of a native kernel: the floats of its widest register
LARGEST_KERNEL = (7, 7)  # that a depthwise convolution is likely to have


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """(height, width) of the result of a convolution."""
    (h, kh, sh, ph), (w, kw, sw, pw) = zip(size, kernel, stride, padding, strict=True)
    return (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1


def takes_toeplitz(size: Pair, kernel: Pair) -> bool:
    """Whether a map of this size and kernel is faster as a Toeplitz product."""
    return size[0] * size[1] <= TOEPLITZ_ADVANTAGE * kernel[0] * kernel[1]


def takes_native(x: Tensor) -> bool:
    """Whether the depthwise convolutions of [B, C, H, W] go through the native kernels, batch last in memory."""
    return fast_layouts(x) and x.dtype == torch.float32 and x.shape[0] >= FEWEST_CLIPS and native.available()


class Shape(ctypes.Structure):
    """Mirrors `struct Shape` of the source."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("channels", "batch", "height", "width", "out_height", "out_width", "results"),
            *("kernel_height", "kernel_width", "stride_height", "stride_width", "pad_height", "pad_width"),
        )
    ]


class _NativeDepthwise(torch.autograd.Function):
    """Image [C, H, W, B] and kernel [C results, kh, kw] -> [C results, h, w, B]."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, kernel: Tensor, shape: Shape) -> Tensor:
        image, kernel = image.contiguous(), kernel.contiguous()
        ctx.save_for_backward(image, kernel)
        ctx.shape = shape
        made = image.new_empty(shape.channels, shape.out_height, shape.out_width, shape.batch)
        native.kernels().kestrel_depthwise(ctypes.byref(shape), image.data_ptr(), kernel.data_ptr(), made.data_ptr())
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        image, kernel = ctx.saved_tensors
        library, shape, grad = native.kernels(), ctypes.byref(ctx.shape), grad.contiguous()
        to_image = to_kernel = None
        if ctx.needs_input_grad[0]:
            to_image = image.new_empty(len(kernel), *image.shape[1:])
            library.kestrel_depthwise_to_image(shape, grad.data_ptr(), kernel.data_ptr(), to_image.data_ptr())
            if len(kernel) > len(image):
                to_image = to_image.unflatten(0, (len(image), -1)).sum(1)
        if ctx.needs_input_grad[1]:
            to_kernel = torch.empty_like(kernel)
            library.kestrel_depthwise_to_kernel(shape, grad.data_ptr(), image.data_ptr(), to_kernel.data_ptr())
        return to_image, to_kernel, None


def _native_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    size, kernel = (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3])
    channels, result = len(weight), output_size(size, kernel, stride, padding)
    shape = Shape(channels, x.shape[0], *size, *result, channels // x.shape[1], *kernel, *stride, *padding)
    made: Tensor = _NativeDepthwise.apply(x.permute(1, 2, 3, 0), weight[:, 0], shape)
    return made.permute(3, 0, 1, 2)


@lru_cache(maxsize=64)
def _places(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """Where kernel elements stand in the Toeplitz matrix.

    (source [H W * h w]: the kernel element at each place, K = none; places [K, h w]: the place that multiplies kernel
    element k for each output, H W * h w = none); K = kernel height * width.
    """
    height, width = output_size(size, kernel, stride, padding)
    area, outputs, taps = size[0] * size[1], height * width, kernel[0] * kernel[1]
    tap = torch.arange(taps).view(-1, 1)
    output = torch.arange(outputs).view(1, -1)
    row = output // width * stride[0] - padding[0] + tap // kernel[1]
    column = output % width * stride[1] - padding[1] + tap % kernel[1]
    inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    places = torch.where(inside, (row * size[1] + column) * outputs + output, area * outputs)
    source = torch.full((area * outputs + 1,), taps)
    source[places[inside]] = tap.expand_as(places)[inside]
    return source[:-1], places


class _ToeplitzProduct(torch.autograd.Function):
    """X [C, B, H W] and w [C, K] -> [C, B, h w]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, source: Tensor, places: Tensor) -> Tensor:
        area = x.shape[2]
        matrix = functional.pad(weight, (0, 1)).index_select(1, source).view(len(weight), area, -1)
        ctx.save_for_backward(x, matrix, places)
        return torch.bmm(x, matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, matrix, places = ctx.saved_tensors
        to_x = torch.bmm(grad, matrix.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_matrix = torch.bmm(x.transpose(1, 2), grad).flatten(1)  # [C, H W * h w]
            picked = functional.pad(to_matrix, (0, 1)).index_select(1, places.flatten())
            to_weight = picked.view(len(x), *places.shape).sum(2)
        return to_x, to_weight, None, None


def toeplitz_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Depthwise convolution as a product: [B, C, H, W] and [C, 1, kh, kw] -> [B, C, h, w], channel-major."""
    size, kernel = (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3])
    source, places = _places(size, kernel, stride, padding)
    made = _ToeplitzProduct.apply(channel_rows(x), weight.flatten(1), source.to(x.device), places.to(x.device))
    return from_rows(made, *output_size(size, kernel, stride, padding))


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """Convolution of each channel by itself: [B, C, H, W] and [C n, 1, kh, kw] -> [B, C n, h, w], mostly with n = 1.

    Equal to functional.conv2d with groups = C to rounding, gradients too; the layout of the result is the faster one.
    """
    if takes_native(x):
        return _native_conv2d(x, weight, stride, padding)
    if not fast_layouts(x) or len(weight) > x.shape[1]:
        return functional.conv2d(x, weight, None, stride, padding, 1, x.shape[1])
    if x.shape[3] == 1 or takes_toeplitz((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3])):
        return toeplitz_conv2d(x, weight, stride, padding)
    return functional.conv2d(channels_last(x), weight, None, stride, padding, 1, len(weight))


def unfolded_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """A convolution as one product with shifted copies of the image: [B, C, H, W] -> [B, K, h, w], channel-major.

    For few channels or maps of one column (sequences), where copies are small.
    """
    (kh, kw), (ph, pw) = (weight.shape[2], weight.shape[3]), padding
    height, width = output_size((x.shape[2], x.shape[3]), (kh, kw), stride, padding)
    rows = functional.pad(x.transpose(0, 1), (pw, pw, ph, ph))  # [C, B, H + 2 ph, W + 2 pw]
    ends = (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
    copies = [
        rows[:, :, i : i + ends[0] : stride[0], j : j + ends[1] : stride[1]] for i in range(kh) for j in range(kw)
    ]
    columns = torch.stack(copies, 1).flatten(0, 1).flatten(1)  # [C kh kw, B h w]
    return from_rows((weight.flatten(1) @ columns).view(len(weight), x.shape[0], -1), height, width)


def _in_rows(x: Tensor) -> bool:
    """Whether a 1x1 convolution is one product here: `x` is channel-major or batch last, or small and channels-last.

    What stands behind it then has one layout. Larger maps stay channels-last, for a depthwise convolution that wants it.
    """
    small = takes_toeplitz((x.shape[2], x.shape[3]), LARGEST_KERNEL)
    return is_channel_major(x) or is_batch_last(x) or (small and x.is_contiguous(memory_format=torch.channels_last))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    groups: int = 1,
) -> Tensor:
    """functional.conv2d by the fastest way for small maps on the CPU; equal to it to rounding, of any layout."""
    if not fast_layouts(x):
        return functional.conv2d(x, weight, bias, stride, padding, 1, groups)
    if groups == x.shape[1] and (groups == len(weight) or takes_native(x)):
        made = depthwise_conv2d(x, weight, stride, padding)
    elif groups == 1 and weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0) and _in_rows(x):
        made = pointwise_conv2d(x, weight)
    else:
        x, weight = channels_last(x), channels_last(weight)
        return functional.conv2d(x, weight, bias, stride, padding, 1, groups)
    return made if bias is None else made + bias.view(-1, 1, 1)
