"""Convolution with 3 x 3 weights and stride 1 by Winograd's algorithm, compiled for the CPU.

F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308) takes 36 multiplications for each pair of channels
to make 16 pixels, where 144 were; small maps go by F(2x2, 3x3), which takes 16 where 36 were. In
float32 the first is off by 2 to 3e-6 of the largest number, where oneDNN's in channels-last is by 1
to 3e-6, the second by 6e-7. A number that is not finite may spread over all pixels of a tile that
sees it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .extension import HAS_EXTENSION

MULTIPLE = 16  # of channels
# Below, the transforms of the weights cost more than the products save.
LEAST_PIXELS, LEAST_CHANNELS = 256, 64


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1) -> Tensor:
    """The convolution of F.conv2d, in float32 on the CPU.

    Args:
        x: (N, C, H, W).
        weight: (D, C, 3, 3). C and D are multiples of 16.
        bias: (D,).
        padding: 0, 1 or 2.

    Returns:
        (N, D, H + 2 padding - 2, W + 2 padding - 2), channels-last; no images make none.

    Raises:
        ValueError: other shapes.
        TypeError: not float32.
        RuntimeError: on a second derivative.
    """
    return _Conv3x3.apply(_last(x), _last(weight), bias, padding)


@torch.no_grad()
def conv3x3_and_more(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 1,
    addend: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """(conv3x3(x) + addend).clamp(low, high) without gradients; arguments are those of `conv3x3`.

    Args:
        addend: of the output's shape.
        low, high: 0 and 6 of a ReLU6, 0 and infinity of a ReLU.
    """
    addend = None if addend is None else _last(addend)
    return torch.ops.iou_d2.conv3x3(_last(x), _last(weight), bias, addend, padding, low, high)


def is_worth_it(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv3x3` takes what `conv` does with `x`, and is likely to be faster."""
    return (
        suits(conv)
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        and x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.dim() == 4
        # The order that maps are to have: those of pooled boxes come in another one.
        and conv.weight.is_contiguous(memory_format=torch.channels_last)
        and x.numel() >= LEAST_PIXELS * x.shape[1]
        and min(x.shape[2:]) + 2 * conv.padding[0] >= 3
    )


def suits(conv: nn.Conv2d) -> bool:
    """Whether `conv` is one for `conv3x3`, of whatever map."""
    channels = (conv.in_channels, conv.out_channels)
    return (
        HAS_EXTENSION
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in ((0, 0), (1, 1), (2, 2))
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and min(channels) >= LEAST_CHANNELS
        and all(number % MULTIPLE == 0 for number in channels)
    )


def _last(x: Tensor) -> Tensor:
    """What has no four dimensions stays as it is, for the operator to refuse."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return torch.ops.iou_d2.conv3x3(x, weight, bias, None, padding, -math.inf, math.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad = _last(grad)
        return (
            torch.ops.iou_d2.conv3x3_of_input(grad, weight, ctx.padding) if of_x else None,
            torch.ops.iou_d2.conv3x3_of_weight(grad, x, ctx.padding) if of_weight else None,
            grad.sum((0, 2, 3)) if of_bias else None,
            None,
        )


def _fake_forward(x, weight, bias, addend, padding, low, high):
    n, _, height, width = x.shape
    shape = (n, weight.shape[0], height + 2 * padding - 2, width + 2 * padding - 2)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_of_input(grad, weight, padding):
    n, _, height, width = grad.shape
    shape = (n, weight.shape[1], height - 2 * padding + 2, width - 2 * padding + 2)
    return torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )


def _fake_of_weight(grad, x, padding):
    shape = (grad.shape[1], x.shape[1], 3, 3)
    return torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )


if HAS_EXTENSION:
    torch.library.register_fake("iou_d2::conv3x3", _fake_forward)
    torch.library.register_fake("iou_d2::conv3x3_of_input", _fake_of_input)
    torch.library.register_fake("iou_d2::conv3x3_of_weight", _fake_of_weight)
