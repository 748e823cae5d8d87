"""The multiply-adds of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision  # noqa: F401  (registers its operators)
from torch.utils.flop_counter import FlopCounterMode

import iou_d2.layers  # noqa: F401  (registers ours)


def count_deform_conv(x, offset, mask, weight, *_, out_val) -> int:
    """Operations of the matrix product; twice the multiply-adds, as the library counts."""
    return 2 * out_val[:, 0].numel() * weight.numel()


def count_deform_conv_backward(grad, x, offset, mask, weight, *_, out_val) -> int:
    return 2 * 2 * grad[:, 0].numel() * weight.numel()


def count_conv_backward(grad, x, weight, *settings, out_val) -> int:
    """Of convolutions with groups too, for which the library's count is too high. The last of the
    settings says which of the gradients of input and weight are wanted."""
    return 2 * sum(settings[-1][:2]) * grad[:, 0].numel() * weight.numel()


def count_torchvision(x, weight, *_, out_val) -> int:
    return 2 * out_val[:, 0].numel() * weight.numel()


def count_torchvision_backward(grad, x, weight, *_, out_val) -> int:
    return 2 * 2 * grad[:, 0].numel() * weight.numel()


def count_conv_and_more(x, weight, *_, out_val) -> int:
    """Of oneDNN's operators for a convolution with what follows it."""
    return 2 * out_val[:, 0].numel() * weight.numel()


def count_conv_onto(onto, x, weight, *_, out_val) -> int:
    return 2 * out_val[:, 0].numel() * weight.numel()


def count_conv3x3(xs, weight, *_, out_val) -> int:
    """Of the convolutions of maps that share weights, as if they were plain ones: ours take fewer
    products."""
    return 2 * sum(y[:, 0].numel() for y in out_val) * weight.numel()


def count_conv3x3_of_input(grads, weight, padding, *, out_val) -> int:
    return 2 * sum(grad[:, 0].numel() for grad in grads) * weight.numel()


def count_conv3x3_of_weight(grads, xs, padding, *, out_val) -> int:
    return 2 * sum(grad[:, 0].numel() for grad in grads) * out_val.numel()


OUR_COUNTS = {
    torch.ops.mkldnn._convolution_pointwise: count_conv_and_more,
    torch.ops.mkldnn._convolution_pointwise_: count_conv_onto,
    torch.ops.iou_d2.conv3x3: count_conv3x3,
    torch.ops.iou_d2.conv3x3_of_input: count_conv3x3_of_input,
    torch.ops.iou_d2.conv3x3_of_weight: count_conv3x3_of_weight,
    torch.ops.iou_d2.deform_conv: count_deform_conv,
    torch.ops.iou_d2.deform_conv_backward: count_deform_conv_backward,
    torch.ops.torchvision.deform_conv2d: count_torchvision,
    torch.ops.torchvision._deform_conv2d_backward: count_torchvision_backward,
    torch.ops.aten.convolution_backward: count_conv_backward,
}
for _count in OUR_COUNTS.values():
    _count._get_raw = True  # is called with tensors, not with shapes


def multiply_adds(run: Callable) -> float:
    with FlopCounterMode(display=False, custom_mapping=OUR_COUNTS) as counter:
        run()
    return counter.get_total_flops() / 2
