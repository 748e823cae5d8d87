"""Precise RoI pooling: the mean of the bilinear surface over a bin, in closed form.

Jiang et al., ECCV 2018, arXiv 1807.11590, eq. 2-4. A feature map w is continued to the plane by
f(x, y) = sum_ij max(0, 1 - |x - i|) max(0, 1 - |y - j|) w_ij, which is 0 outside the map. A bin's
value is the integral of f over the bin divided by the bin's area, and so is differentiable in the
box coordinates. It is separable: out = Wy F Wx^T.

The op `torch.ops.iou_d2.prroi_pool` has its schema and kernels in csrc/; shapes without data
("fake") and gradients are registered here. Shape letters: N images, C channels, H x W feature map,
R RoIs, P x Q bins.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn

from .extension import DEVICES, HAS_EXTENSION, WHY_NOT


@functools.cache
def _warn_of_slowness(device: str) -> None:
    why = WHY_NOT or f"it was compiled without {device}"
    warnings.warn(
        f"iou_d2 runs without its compiled operator on {device}: PrRoI pooling uses plain tensor "
        f"operations, which are slow and need much memory ({why}). Installing iou_d2 from its "
        "source with `pip install -v --no-build-isolation --no-cache-dir --no-deps "
        "--force-reinstall` compiles it for this torch, or says why not.",
        stacklevel=3,
    )


def prroi_pool(
    features: torch.Tensor,
    rois: torch.Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    aligned: bool = False,
) -> torch.Tensor:
    """Pools every RoI to a fixed size; differentiable in the features and in the box coordinates.
    It exports to ONNX from torch 2.8 on.

    Args:
        features: (N, C, H, W), float32 or float64, or half precision (summed in float32).
            Contiguous and channels-last maps are read as they are.
        rois: (R, 5), float32 or float64: batch index, then x1, y1, x2, y2 in pixels of the network
            input. Of an index that is no whole number the fraction is cut off; the plain operations
            that stand in for the compiled ones give 0 for it.
        output_size: (P, Q), or one number for both.
        spatial_scale: feature pixels an input pixel, 1 / stride.
        aligned: False is the published operator, with the centre of pixel i at coordinate i. True
            moves the boxes by -0.5 feature pixels, as ROIAlignV2 does, so that maps of different
            strides agree.

    Returns:
        (R, C, P, Q) of the features' dtype and memory format. Pixels outside the map count as 0 and
        the divisor is the whole bin. RoIs with a side of at most 1e-9 feature pixels, inverted ones
        and ones with NaN or infinity give 0, and their gradients are 0. No RoIs: an empty result.
        Tensors on the device "meta" give the shape alone, and nothing in them is checked.

    Raises:
        ValueError, TypeError: on wrong shapes or dtypes, two devices, an output size below 1.
        IndexError: on the CPU, when a batch index is out of range; CUDA asserts on the device.
        RuntimeError: on a second derivative.
    """
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    exporting = torch.onnx.is_in_onnx_export()
    device = features.device.type
    if device in DEVICES and not exporting:
        return torch.ops.iou_d2.prroi_pool(features, rois, spatial_scale, height, width, aligned)
    if not exporting:
        _warn_of_slowness(device)
    return prroi_pool_reference(features, rois, (height, width), spatial_scale, aligned)


class PrRoIPool(nn.Module):
    """:func:`prroi_pool` with its settings, for use where torchvision's ``RoIAlign`` is used."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        aligned: bool = False,
    ):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.aligned = aligned

    def forward(self, features: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), (R, 5) -> (R, C, P, Q)"""
        return prroi_pool(features, rois, self.output_size, self.spatial_scale, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"aligned={self.aligned}"
        )


def prroi_pool_reference(
    features: torch.Tensor,
    rois: torch.Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    aligned: bool = False,
) -> torch.Tensor:
    """:func:`prroi_pool` in plain tensor operations: oracle, export to ONNX, and fallback.

    Memory grows with R * P * C * W. A feature that is not finite spoils all RoIs, and batch indices
    are not checked: a RoI of no image gives 0.
    """
    n, _, h, w = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    boxes = rois[:, 1:].to(torch.promote_types(dtype, rois.dtype))
    boxes = boxes * spatial_scale - (0.5 if aligned else 0.0)
    sides = boxes[:, 2:] - boxes[:, :2]
    valid = (sides > 1e-9).all(1) & boxes.isfinite().all(1)
    boxes = torch.where(valid[:, None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
    wx = _bin_weights(boxes[:, 0], boxes[:, 2], output_size[1], w).to(dtype)  # (R, Q, W)
    wy = _bin_weights(boxes[:, 1], boxes[:, 3], output_size[0], h).to(dtype)  # (R, P, H)
    image = rois[:, :1] == torch.arange(n, dtype=rois.dtype, device=rois.device)
    image = (image & valid[:, None]).to(dtype)  # (R, N)
    with torch.autocast(features.device.type, enabled=False):
        out = torch.einsum("rn,rph,nchw,rqw->rcpq", image, wy, features.to(dtype), wx)
    return out.to(features.dtype)


def _bin_weights(start: torch.Tensor, end: torch.Tensor, bins: int, size: int) -> torch.Tensor:
    """(R,), (R,) -> (R, bins, size): the integral of each pixel's hat over each bin, divided by the
    bin's length."""
    steps = torch.arange(bins + 1, dtype=start.dtype, device=start.device) / bins
    edges = start[:, None] + (end - start)[:, None] * steps  # (R, bins + 1)
    pixels = torch.arange(size, dtype=start.dtype, device=start.device)
    low, high = (e[:, :, None] - pixels for e in (edges[:, :-1], edges[:, 1:]))
    integral = right_half(low, high) + right_half(-high, -low)
    return integral / ((end - start)[:, None, None] / bins)


def right_half(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Integral of 1 - t over the part of [low, high] in [0, 1]: length times height in the middle,
    for a difference of antiderivatives would cancel.

    At 0, where the two halves of a hat meet, each has half of the gradient, as `maximum` shares it.
    """
    zero, one = low.new_zeros(()), low.new_ones(())
    low, high = (x.maximum(zero).minimum(one) for x in (low, high))
    return (high - low) * (1 - (low + high) / 2)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake_forward(features, rois, spatial_scale, pooled_height, pooled_width, aligned):
    shape = (rois.shape[0], features.shape[1], pooled_height, pooled_width)
    memory_format = _memory_format(_is_channels_last(features))
    return torch.empty(
        shape, dtype=features.dtype, device=features.device, memory_format=memory_format
    )


def _fake_backward_features(grad, rois, size, channels_last, spatial_scale, aligned):
    memory_format = _memory_format(channels_last)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def _fake_backward_rois(grad, features, output, rois, spatial_scale, aligned):
    return torch.empty(rois.shape, dtype=rois.dtype, device=rois.device)


def _save(ctx, inputs, output):
    features, rois, ctx.spatial_scale, _, _, ctx.aligned = inputs
    ctx.size, ctx.channels_last = features.shape, _is_channels_last(features)
    for_rois = (features, output) if ctx.needs_input_grad[1] else (None, None)
    ctx.save_for_backward(rois, *for_rois)


def _backward(ctx, grad):
    rois, features, output = ctx.saved_tensors
    settings = (ctx.spatial_scale, ctx.aligned)
    ops, grads = torch.ops.iou_d2, [None, None]
    if ctx.needs_input_grad[0]:
        grads[0] = ops.prroi_pool_backward_features(
            grad, rois, ctx.size, ctx.channels_last, *settings
        )
    if ctx.needs_input_grad[1]:
        grads[1] = ops.prroi_pool_backward_rois(grad, features, output, rois, *settings)
    return (*grads, None, None, None, None)


def _no_second_derivative(ctx, grad):
    raise RuntimeError("prroi_pool has no second derivative: call backward without create_graph.")


if HAS_EXTENSION:
    torch.library.register_fake("iou_d2::prroi_pool", _fake_forward)
    torch.library.register_fake("iou_d2::prroi_pool_backward_features", _fake_backward_features)
    torch.library.register_fake("iou_d2::prroi_pool_backward_rois", _fake_backward_rois)
    torch.library.register_autograd("iou_d2::prroi_pool", _backward, setup_context=_save)
    for _name in ("prroi_pool_backward_features", "prroi_pool_backward_rois"):
        torch.library.register_autograd(f"iou_d2::{_name}", _no_second_derivative)
