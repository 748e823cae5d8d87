"""Batch norm in training, and the ReLU behind it, by a compiled operator on the CPU.

PyTorch has an operator for each, which read and write the map eight times forward and backward
where one needs five, and keep it twice. The sums here are partly in float64, so that means and
variances are more exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .extension import HAS_EXTENSION


def batch_norm(
    x: Tensor, norm: nn.BatchNorm2d, low: float = -math.inf, high: float = math.inf
) -> Tensor:
    """`norm(x).clamp(low, high)` of a `norm` in training, whose statistics it updates, too.

    Args:
        x: (N, C, H, W), for which `norm` `is_compiled_for`.
        low, high: 0 and 6 of a ReLU6, 0 and infinity of a ReLU.

    Raises:
        RuntimeError: on a second derivative.
    """
    y, mean, variance = _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps, low, high)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        # The default of nn.BatchNorm2d without a momentum is the mean over all batches.
        share = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        pixels = x.numel() / x.shape[1]
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (pixels / (pixels - 1)), share)
    return y


def is_compiled_for(norm: nn.Module, x: Tensor) -> bool:
    """Whether `batch_norm` takes `norm` and `x`."""
    return (
        HAS_EXTENSION
        and type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and x.device.type == "cpu"
        and x.dtype == norm.weight.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > x.shape[1]  # PyTorch refuses a single pixel, in a sentence
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
    )


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, low, high):
        y, mean, variance = torch.ops.iou_d2.batch_norm(x, weight, bias, eps, low, high)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.numbers = eps, low, high
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *none):
        gradients = torch.ops.iou_d2.batch_norm_backward(grad, *ctx.saved_tensors, *ctx.numbers)
        return *gradients, None, None, None


def _fake_forward(x, weight, bias, eps, low, high):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _fake_backward(grad, x, weight, bias, mean, variance, eps, low, high):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


if HAS_EXTENSION:
    torch.library.register_fake("iou_d2::batch_norm", _fake_forward)
    torch.library.register_fake("iou_d2::batch_norm_backward", _fake_backward)
