"""Convolution with 3 x 3 weights and stride 1 by Winograd's algorithm, compiled for the CPU.

F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308) takes 36 multiplications for each pair of channels
to make 16 pixels, where 144 were; small maps go by F(2x2, 3x3), which takes 16 where 36 were. In
float32 the first is off by 2 to 3e-6 of the largest number, where oneDNN's in channels-last is by 1
to 3e-6, the second by 6e-7. A number that is not finite may spread over all pixels of a tile that
sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .extension import HAS_EXTENSION

MULTIPLE = 16  # of channels
# Below, the transforms of the weights cost more than the products save.
LEAST_PIXELS, LEAST_CHANNELS = 256, 64


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1) -> Tensor:
    """The convolution of F.conv2d, in float32 on the CPU: `conv3x3_of_maps` of one map."""
    return conv3x3_of_maps([x], weight, bias, padding)[0]


def conv3x3_of_maps(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, padding: int = 1
) -> list[Tensor]:
    """The convolutions of maps that share weights, which are transformed once, in float32 on the
    CPU.

    Args:
        xs: at least one map (N, C, H, W), whose N, H and W may differ.
        weight: (D, C, 3, 3). C is a multiple of 16.
        bias: (D,).
        padding: 0, 1 or 2.

    Returns:
        (N, D, H + 2 padding - 2, W + 2 padding - 2) of each, channels-last, and the first D
        channels of more where D is no multiple of 16; no images make none.

    Raises:
        ValueError: other shapes.
        TypeError: not float32.
        RuntimeError: on a second derivative.
    """
    return list(_Conv3x3.apply(_last(weight), bias, padding, *map(_last, xs)))


@torch.no_grad()
def conv3x3_and_more(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 1,
    addends: Sequence[Tensor] = (),
    low: float = -math.inf,
    high: float = math.inf,
) -> list[Tensor]:
    """(conv3x3(x) + addend).clamp(low, high) of each map without gradients.

    Args:
        xs, weight, bias, padding: those of `conv3x3_of_maps`.
        addends: one of its output's shape for each map, or none. With them D is a multiple of 16.
        low, high: 0 and 6 of a ReLU6, 0 and infinity of a ReLU.
    """
    addends = list(map(_last, addends))
    return torch.ops.iou_d2.conv3x3(
        list(map(_last, xs)), _last(weight), bias, addends, padding, low, high
    )


def is_worth_it(conv: nn.Conv2d, xs: Sequence[Tensor]) -> bool:
    """Whether `conv3x3_of_maps` takes what `conv` does with `xs`, and is likely to be faster."""
    return (
        suits(conv)
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        and not torch.is_autocast_enabled("cpu")
        and conv.weight.dtype == torch.float32
        # The order that maps are to have: those of pooled boxes come in another one.
        and conv.weight.is_contiguous(memory_format=torch.channels_last)
        and all(_is_for(conv, x) for x in xs)
        and sum(x.numel() for x in xs) >= LEAST_PIXELS * conv.in_channels
    )


def _is_for(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
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
        and conv.in_channels % MULTIPLE == 0
    )


def _last(x: Tensor) -> Tensor:
    """What has no four dimensions stays as it is, for the operator to refuse."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, padding, *xs):
        ctx.save_for_backward(weight, *xs)
        ctx.padding = padding
        ends = (-math.inf, math.inf)
        return tuple(torch.ops.iou_d2.conv3x3(list(xs), weight, bias, [], padding, *ends))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        weight, *xs = ctx.saved_tensors
        of_weight, of_bias, _, *of_xs = ctx.needs_input_grad
        wide = [_last(_widened(grad)) for grad in grads]
        asked = [grad for grad, is_asked in zip(wide, of_xs) if is_asked]
        operators, channels = torch.ops.iou_d2, len(weight)
        made = iter(operators.conv3x3_of_input(asked, weight, ctx.padding) if asked else ())
        return (
            operators.conv3x3_of_weight(wide, xs, ctx.padding)[:channels] if of_weight else None,
            sum(grad.sum((0, 2, 3)) for grad in grads) if of_bias else None,
            None,
            *(next(made) if is_asked else None for is_asked in of_xs),
        )


def _widened(grad: Tensor) -> Tensor:
    """A gradient of the channels that the operators take, (N, D + some zeros, h, w)."""
    missing = -grad.shape[1] % MULTIPLE
    return F.pad(grad, (0, 0, 0, 0, 0, missing)) if missing else grad


def _fake_forward(xs, weight, bias, addends, padding, low, high):
    channels = weight.shape[0]
    wide = [_fake_map(x, channels + -channels % MULTIPLE, 2 * padding - 2) for x in xs]
    return [y[:, :channels] for y in wide]


def _fake_of_input(grads, weight, padding):
    return [_fake_map(grad, weight.shape[1], 2 - 2 * padding) for grad in grads]


def _fake_of_weight(grads, xs, padding):
    shape = (grads[0].shape[1], xs[0].shape[1], 3, 3)
    return torch.empty(
        shape, dtype=xs[0].dtype, device=xs[0].device, memory_format=torch.channels_last
    )


def _fake_map(x: Tensor, channels: int, larger: int) -> Tensor:
    n, _, height, width = x.shape
    shape = (n, channels, height + larger, width + larger)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


if HAS_EXTENSION:
    torch.library.register_fake("iou_d2::conv3x3", _fake_forward)
    torch.library.register_fake("iou_d2::conv3x3_of_input", _fake_of_input)
    torch.library.register_fake("iou_d2::conv3x3_of_weight", _fake_of_weight)
