"""Deformable convolution on the CPU by an operator of our own, elsewhere by torchvision's.

torchvision's runs on one thread of the CPU. Unlike Detectron2's, both run there forward and
backward and need no compiled Detectron2. Parameters are named as in Detectron2's
DeformBottleneckBlock, whose checkpoints load.

Shape letters: N images, C channels, H and W of the input, h and w of the output, G offset groups,
T the taps of the kernel (9 of a 3x3), row-major.
"""

from __future__ import annotations

import torch
import torchvision
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .extension import HAS_EXTENSION


def deform_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Dai et al., arXiv 1703.06211, and with a mask Zhu et al., arXiv 1811.11168, eq. 1: what
    `torchvision.ops.deform_conv2d` computes, safe under autocast and where training diverges.

    Args:
        x: (N, C, H, W). Half precision is computed in float32, as the CPU has no bfloat16.
        offset: (N, 2GT, h, w), a (dy, dx) for each tap, in cells of `x`.
        weight, bias: as of a convolution; groups follow from the shapes.
        mask: (N, GT, h, w), a factor of each tap; None is deformable convolution v1.

    Returns:
        (N, C_out, h, w) in the dtype of `x`; N may be 0. NaN where an offset is not finite.

    Raises:
        ValueError: on the CPU, shapes do not fit each other. torchvision raises RuntimeError.
        RuntimeError: on a second derivative.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = (None if part is None else part.to(dtype) for part in (offset, weight, bias, mask))
    offset, weight, bias, mask = parts
    places = (_pair(stride), _pair(padding), _pair(dilation))
    with torch.autocast(x.device.type, enabled=False):
        if is_compiled_for(x):
            y = torch.ops.iou_d2.deform_conv(x.to(dtype), offset, mask, weight, *places)
            return (y if bias is None else y + bias[:, None, None]).to(x.dtype)
        # The op reads outside of its memory where an offset is NaN.
        y = torchvision.ops.deform_conv2d(
            x.to(dtype), offset.nan_to_num(), weight, bias, *places, mask
        )
    nan_or_zero = (0 * offset.detach()).sum(dim=1, keepdim=True)
    return (y + nan_or_zero).to(x.dtype)


def is_compiled_for(x: Tensor) -> bool:
    """Whether `deform_conv` of `x` runs on the operator of iou_d2. In a graph that is to run
    elsewhere it does not, for that operator is not there."""
    becomes_graph = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return HAS_EXTENSION and x.device.type == "cpu" and not becomes_graph


def split_offsets(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3GT, h, w) of an offset convolution -> offsets (N, 2GT, h, w), mask (N, GT, h, w).

    The layout of Detectron2 and mmcv: the first two thirds are offsets as they stand, and the
    sigmoid of the last third is the mask.
    """
    taps = prediction.shape[1] // 3
    return prediction[:, : 2 * taps], prediction[:, 2 * taps :].sigmoid()


class ModulatedDeformConv(Conv2d):
    """Deformable convolution v2 (arXiv 1811.11168) which predicts its own offsets and mask.

    Takes the place of `detectron2.layers.Conv2d`, norm and activation included. Its `offset`, a
    convolution of the same geometry, starts at zero: a plain convolution times sigmoid(0) = 1/2.
    """

    def __init__(self, *args, offset_groups: int = 1, **kwargs):
        """
        Args:
            args, kwargs: those of `detectron2.layers.Conv2d`.
            offset_groups: groups of input channels that share their offsets.
        """
        super().__init__(*args, **kwargs)
        self.offset = offset_conv(self, 3, offset_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, h, w)."""
        offset, mask = split_offsets(self.offset(x))
        x = deform_conv(x, offset, self.weight, self.bias, mask=mask, **geometry(self))
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def geometry(conv: nn.Conv2d) -> dict:
    """Where a convolution looks: its stride, padding and dilation, by name."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}


def offset_conv(conv: nn.Conv2d, values: int, groups: int) -> nn.Conv2d:
    """The convolution that predicts `values` numbers, at first 0, for each tap of `conv`."""
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    offset = nn.Conv2d(conv.in_channels, values * groups * taps, conv.kernel_size, **geometry(conv))
    nn.init.zeros_(offset.weight)
    nn.init.zeros_(offset.bias)
    return offset


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


# Code that torch.compile makes of these results reads memory in the order that they have.
def _fake_forward(x, offset, mask, weight, stride, padding, dilation):
    shape = (x.shape[0], weight.shape[0], *offset.shape[-2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _fake_backward(grad, x, offset, mask, weight, stride, padding, dilation):
    grad_x = torch.empty_like(x, memory_format=_memory_format(x))
    grad_mask = x.new_empty(0) if mask is None else x.new_empty(mask.shape)
    filters, inputs, *kernel = weight.shape
    grad_weight = x.new_empty(filters, kernel[0] * kernel[1], inputs).transpose(1, 2)
    return grad_x, x.new_empty(offset.shape), grad_mask, grad_weight.reshape(weight.shape)


def _save(ctx, inputs, output):
    x, offset, mask, weight, *ctx.places = inputs
    ctx.save_for_backward(x, offset, mask, weight)


def _backward(ctx, grad):
    x, offset, mask, weight = ctx.saved_tensors
    grads = torch.ops.iou_d2.deform_conv_backward(grad, x, offset, mask, weight, *ctx.places)
    of_x, of_offset, of_mask, of_weight = grads
    return of_x, of_offset, None if mask is None else of_mask, of_weight, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("deform_conv has no second derivative: call backward without create_graph.")


if HAS_EXTENSION:
    torch.library.register_fake("iou_d2::deform_conv", _fake_forward)
    torch.library.register_fake("iou_d2::deform_conv_backward", _fake_backward)
    torch.library.register_autograd("iou_d2::deform_conv", _backward, setup_context=_save)
    torch.library.register_autograd("iou_d2::deform_conv_backward", _no_second_derivative)
