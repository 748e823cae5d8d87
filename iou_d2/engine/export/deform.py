"""Deformable convolution in graphs: as GridSample, which is in every runtime, or as one operator.

Shape letters: N images, C channels, H and W of the input, h and w of the output, G offset groups,
T the taps of the kernel (9 of a 3x3), row-major.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  (for its operator)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from iou_d2.detectors.vfnet import StarConv
from iou_d2.layers.deform_conv import deform_conv

OPERATOR = torch.ops.torchvision.deform_conv2d
# Since which opset ONNX has DeformConv.
DEFORM_CONV_OPSET = 19


def sampled_deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *geometry: int,
) -> Tensor:
    """torchvision's operator `deform_conv2d` as bilinear look-ups and a 1x1 convolution.

    Args:
        x: (N, C, H, W).
        weight: (C_out, C / groups, kernel height, kernel width).
        offset: (N, 2GT, h, w), (dy, dx) of each tap in cells.
        mask: (N, GT, h, w), used where the last of `geometry` says so.
        bias: (C_out,).
        geometry: stride, padding and dilation, each in y and in x, groups, G, whether there is a
            mask.

    Returns:
        (N, C_out, h, w).
    """
    strides, paddings, dilations = (geometry[i : i + 2] for i in (0, 2, 4))
    groups, offset_groups, use_mask = geometry[6:]
    count, channels, height, width = x.shape
    rows, columns = offset.shape[-2:]
    kernel = weight.shape[-2:]
    taps = kernel[0] * kernel[1]
    y, x_ = (
        torch.arange(size, dtype=x.dtype) * stride - padding
        for size, stride, padding in zip((rows, columns), strides, paddings)
    )
    tap_y, tap_x = (
        torch.arange(size, dtype=x.dtype) * dilation for size, dilation in zip(kernel, dilations)
    )
    shift = offset.view(count * offset_groups, *kernel, 2, rows, columns)
    y = shift[:, :, :, 0] + y[:, None] + tap_y.view(-1, 1, 1, 1)  # (NG, kh, kw, h, w)
    x_ = shift[:, :, :, 1] + x_ + tap_x.view(-1, 1, 1)
    # grid_sample counts from -1 at one edge of the map to 1 at the other.
    grid = torch.stack([(2 * x_ + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    seen = F.grid_sample(
        x.reshape(count * offset_groups, channels // offset_groups, height, width),
        grid.view(count * offset_groups, taps * rows, columns, 2),
        align_corners=False,
    ).view(count, offset_groups, channels // offset_groups, taps, rows * columns)
    if use_mask:
        seen = seen * mask.view(count, offset_groups, 1, taps, rows * columns)
    seen = seen.reshape(count, channels * taps, rows, columns)
    return F.conv2d(seen, weight.flatten(1)[..., None, None], bias, groups=groups)


class SampledDeformConv(TorchFunctionMode):
    """Within it torchvision's operator is `sampled_deform_conv`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is OPERATOR or function is OPERATOR.default:
            return sampled_deform_conv(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def deform_conv_symbolic(g: Any, x: Any, weight: Any, offset: Any, mask: Any, bias: Any, *numbers):
    """torchvision's operator as ONNX's DeformConv, for the exporter that works on TorchScript."""
    from torch.onnx import symbolic_helper

    values = [symbolic_helper._maybe_get_const(number, "i") for number in numbers]
    strides, pads, dilations = (list(values[i : i + 2]) for i in (0, 2, 4))
    groups, offset_groups, use_mask = values[6:]
    kernel = symbolic_helper._get_tensor_sizes(weight)[2:]
    return g.op(
        "DeformConv",
        *(x, weight, offset, bias, *([mask] if use_mask else [])),
        kernel_shape_i=kernel,
        strides_i=strides,
        pads_i=pads * 2,
        dilations_i=dilations,
        group_i=groups,
        offset_group_i=offset_groups,
    )


class OperatorStar(nn.Module):
    """A StarConv that keeps to the operator also on the CPU."""

    def __init__(self, star: StarConv):
        super().__init__()
        self.weight, self.norm = star.weight, star.norm

    def forward(self, feature: Tensor, offsets: Tensor) -> Tensor:
        return self.norm(deform_conv(feature, offsets, self.weight, padding=1))


def with_operator_stars(model: nn.Module) -> nn.Module:
    """A copy of `model`, of the same weights, whose star convolutions are OperatorStars."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, StarConv):
                setattr(parent, name, OperatorStar(child))
    return model
