"""RoIAlign (arXiv 1703.06870) by a compiled operator on the CPU, on all threads.

torchvision's, which Detectron2 calls, runs on one thread and copies channels-last maps. Both make
the same numbers but for rounding.
"""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from .extension import HAS_EXTENSION

MULTIPLE = 16  # of channels


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The mean of samples of the bilinear surface in each bin, as torchvision.ops.roi_align has it.

    Args:
        features: (N, C, H, W) in channels-last, C a multiple of 16, float32 or float64.
        rois: (R, 5) of the same type, the index of the image and x1, y1, x2, y2 in pixels of it.
        sampling_ratio: samples along a side of a bin; 0 is one a feature pixel.
        aligned: moves RoIs by -0.5 feature pixels.

    Returns:
        (R, C, *output_size); no RoIs make none. A RoI with a coordinate that is not finite, or of
        1e9 samples a side of a bin, has 0.

    Raises:
        ValueError: other shapes or order of memory.
        TypeError: the types differ.
        IndexError: there is no such image.
        RuntimeError: on a second derivative.
    """
    return _ROIAlign.apply(features, rois, output_size, spatial_scale, sampling_ratio, aligned)


def use_compiled_roi_align(model: nn.Module) -> None:
    """Let Detectron2's ROIAligns in `model` go by `roi_align` where it takes their inputs."""
    for module in model.modules():
        if type(module).forward is ROIAlign.forward:
            module.forward = CompiledROIAlign(module)


class CompiledROIAlign:
    """The forward of an ROIAlign of Detectron2."""

    def __init__(self, align: ROIAlign):
        self.align = align

    def __call__(self, features: Tensor, rois: Tensor) -> Tensor:
        """(N, C, H, W), (R, 5) -> (R, C, *output_size)."""
        align = self.align
        if not is_compiled_for(features, rois):
            return type(align).forward(align, features, rois)
        size = _pair(align.output_size)
        numbers = (align.spatial_scale, align.sampling_ratio, align.aligned)
        return roi_align(features, rois.to(features.dtype), size, *numbers)


def is_compiled_for(features: Tensor, rois: Tensor) -> bool:
    """Whether `roi_align` takes them, and the maps are to be channels-last."""
    return (
        HAS_EXTENSION
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        and features.device.type == rois.device.type == "cpu"
        and features.dtype in (torch.float32, torch.float64)
        and features.dim() == 4
        and features.shape[1] % MULTIPLE == 0
        and features.numel() > 0
        and features.is_contiguous(memory_format=torch.channels_last)
        and rois.shape[1:] == (5,)
    )


class _ROIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, rois, size, scale, ratio, aligned):
        rois = rois.contiguous()
        ctx.save_for_backward(rois)
        ctx.numbers = list(features.shape), scale, ratio, aligned
        return torch.ops.iou_d2.roi_align(features, rois, scale, *size, ratio, aligned)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rois,) = ctx.saved_tensors
        of_features = torch.ops.iou_d2.roi_align_backward(grad.contiguous(), rois, *ctx.numbers)
        return of_features, None, None, None, None, None


def _fake_forward(features, rois, scale, height, width, ratio, aligned):
    return features.new_empty((rois.shape[0], features.shape[1], height, width))


def _fake_backward(grad, rois, size, scale, ratio, aligned):
    return torch.empty(
        size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )


if HAS_EXTENSION:
    torch.library.register_fake("iou_d2::roi_align", _fake_forward)
    torch.library.register_fake("iou_d2::roi_align_backward", _fake_backward)
