"""The head of VarifocalNet (Zhang et al., CVPR 2021, arXiv 2008.13367).

Every point predicts a box. Nine points of that box, its centre, corners and the middles of its
sides, say what is in it and how to refine it: a deformable convolution looks there. The class score
learns the IoU of the refined box by the varifocal loss, so that it alone ranks detections.

Shape letters: N images, K classes, C channels. Distances are those from a point to the left, top,
right and bottom of its box, in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from iou_d2.layers.deform_conv import deform_conv, is_compiled_for
from iou_d2.layers.over_maps import over_maps
from iou_d2.ops.box_codec import exp_distances

from .dense import part_named
from .point_heads import (
    POINT_HEAD_REGISTRY,
    PointPrediction,
    TwoTowerHead,
    conv3x3,
    conv_norm_relu,
    distance_units,
    level_scales,
)


def star_offsets(distances: Tensor, gradient_factor: float = 0.1) -> Tensor:
    """Where the star convolution looks, as offsets from the 3x3 grid of a plain convolution.

    Args:
        distances: (N, 4, H, W) in cells of the feature.
        gradient_factor: share of the gradient that reaches `distances`; 0.1 in the authors' code.

    Returns:
        (N, 18, H, W), (dy, dx) of the nine points row by row, as deform_conv2d takes them.
    """
    distances = (1 - gradient_factor) * distances.detach() + gradient_factor * distances
    left, top, right, bottom = distances.unbind(dim=1)
    middle = torch.zeros_like(left)
    rows, columns = (1 - top, middle, bottom - 1), (1 - left, middle, right - 1)
    return torch.stack([axis for dy in rows for dx in columns for axis in (dy, dx)], dim=1)


def sampled_conv(feature: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """`deform_conv` of a 3x3 kernel with padding 1, as nine bilinear look-ups and a 1x1
    convolution.

    For graphs, and for the CPU where iou_d2 runs without its compiled operators: torchvision's op
    works on one thread there and takes four times as long, forward and backward.

    Args:
        feature: (N, C, H, W).
        offsets: (N, 18, H, W), (dy, dx) of each tap in cells.
        weight: (C_out, C, 3, 3).

    Returns:
        (N, C_out, H, W) in the dtype of `feature`, computed in at least float32.
    """
    dtype = torch.promote_types(feature.dtype, torch.float32)
    n, channels, height, width = feature.shape
    rows, columns, taps = (
        torch.arange(size, dtype=dtype, device=feature.device) for size in (height, width, 3)
    )
    dy, dx = offsets.to(dtype).view(n, 3, 3, 2, height, width).unbind(dim=3)
    y = dy + rows[:, None] + taps.view(3, 1, 1, 1) - 1  # (N, 3, 3, H, W)
    x = dx + columns + taps.view(3, 1, 1) - 1
    # grid_sample counts from -1 at one edge of the map to 1 at the other.
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    with torch.autocast(feature.device.type, enabled=False):
        seen = F.grid_sample(
            feature.to(dtype), grid.view(n, 9 * height, width, 2), align_corners=False
        )
        # Not as a product of matrices: runtimes compute a convolution in 8 bits.
        output = F.conv2d(
            seen.view(n, channels * 9, height, width), weight.to(dtype).flatten(1)[..., None, None]
        )
    return output.to(feature.dtype)


def small_normal_(weight: Tensor) -> Tensor:
    """Fills `weight` with normal numbers of deviation 0.01, as the authors' code does."""
    return nn.init.normal_(weight, std=0.01)


def kaiming_(weight: Tensor) -> Tensor:
    """Fills `weight` so that a ReLU behind it keeps the size of its input: mmdetection's star
    convolutions, which come with the default of mmcv's DeformConv2d."""
    return nn.init.kaiming_uniform_(weight, nonlinearity="relu")


STAR_INITS = {"normal": small_normal_, "kaiming": kaiming_}


class StarConv(nn.Module):
    """The 3x3 deformable convolution, without bias, that looks where `star_offsets` says."""

    def __init__(
        self,
        channels: int,
        init: Callable[[Tensor], Tensor] = small_normal_,
        norm: nn.Module | None = None,
    ):
        """
        Args:
            init: fills the weights (channels, channels, 3, 3).
            norm: what follows the convolution.
        """
        super().__init__()
        self.weight = nn.Parameter(init(torch.empty(channels, channels, 3, 3)))
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, feature: Tensor, offsets: Tensor) -> Tensor:
        """(N, C, H, W) and (N, 18, H, W) -> (N, C, H, W)."""
        return self.norm(self.convolve(feature, offsets))

    def convolve(self, feature: Tensor, offsets: Tensor) -> Tensor:
        """The convolution alone."""
        if feature.is_cuda or is_compiled_for(feature):
            return deform_conv(feature, offsets, self.weight, padding=1)
        return sampled_conv(feature, offsets, self.weight)


def star_maker(node: CfgNode) -> Callable[[int], StarConv]:
    """StarConv as STAR_INIT and STAR_NORM of MODEL.POINT_DETECTOR have it, of so many channels."""
    init = part_named(STAR_INITS, node.STAR_INIT, "MODEL.POINT_DETECTOR.STAR_INIT")

    def make(channels: int) -> StarConv:
        norm = nn.GroupNorm(node.NUM_GROUPS, channels) if node.STAR_NORM else None
        return StarConv(channels, init, norm)

    return make


@POINT_HEAD_REGISTRY.register()
class StarHead(TwoTowerHead):
    """VarifocalNet without refinement: the class is seen through the star of the box."""

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        strides: Sequence[int],
        units: Sequence[float],
        num_groups: int,
        make_star: Callable[[int], StarConv] = StarConv,
        **kwargs,
    ):
        """
        Args:
            units: pixels that a distance of 1 means, for each level.
            make_star: a star convolution of so many channels.
            kwargs: those of TwoTowerHead.
        """
        super().__init__(channels=channels, strides=strides, num_groups=num_groups, **kwargs)
        self.units = list(units)
        self.initial_conv = conv_norm_relu(channels, num_groups)
        self.initial_pred = conv3x3(channels, 4)
        self.initial_scales = level_scales(len(strides))
        self.cls_star = make_star(channels)

    @classmethod
    def from_config(cls, cfg, input_shapes: list[ShapeSpec]):
        return {
            **super().from_config(cfg, input_shapes),
            "units": distance_units(cfg, len(input_shapes)),
            "make_star": star_maker(cfg.MODEL.POINT_DETECTOR),
        }

    def predict(
        self, cls_features: list[Tensor], box_features: list[Tensor]
    ) -> list[PointPrediction]:
        raw = over_maps(self.initial_pred, over_maps(self.initial_conv, box_features))
        initial = [
            exp_distances(x, scale, unit)
            for x, scale, unit in zip(raw, self.initial_scales, self.units)
        ]
        offsets = [star_offsets(x / stride) for x, stride in zip(initial, self.strides)]
        seen = [F.relu(self.cls_star(*each)) for each in zip(cls_features, offsets)]
        logits = over_maps(self.cls_pred, seen)
        return [
            PointPrediction(said, self.stages(*each, level))
            for level, (said, *each) in enumerate(zip(logits, box_features, initial, offsets))
        ]

    def stages(
        self, box_feature: Tensor, initial: Tensor, offsets: Tensor, level: int
    ) -> tuple[Tensor, ...]:
        """Distances of all stages of a level."""
        return (initial,)


@POINT_HEAD_REGISTRY.register()
class VFNetHead(StarHead):
    """StarHead that refines its boxes through their stars too."""

    num_stages = 2

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        strides: Sequence[int],
        make_star: Callable[[int], StarConv] = StarConv,
        **kwargs,
    ):
        super().__init__(channels=channels, strides=strides, make_star=make_star, **kwargs)
        self.refine_star = make_star(channels)
        self.refine_pred = conv3x3(channels, 4)
        self.refine_scales = level_scales(len(strides))

    def stages(
        self, box_feature: Tensor, initial: Tensor, offsets: Tensor, level: int
    ) -> tuple[Tensor, ...]:
        """The initial distances and the refined ones, which have no gradient to the initial."""
        raw = self.refine_pred(F.relu(self.refine_star(box_feature, offsets)))
        return initial, exp_distances(raw, self.refine_scales[level], initial.detach())
