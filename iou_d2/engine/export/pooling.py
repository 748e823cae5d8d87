"""RoI pooling over a pyramid for the boxes of all images in one tensor.

Shape letters: N images, R boxes of all images, C channels, L levels, P x Q bins.
"""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor

from iou_d2.errors import InputError


def require_pooler(pooler: ROIPooler, key: str) -> None:
    """Raise an InputError with the `key` that chooses it where no graph can hold a pooler."""
    kinds = {type(level) for level in pooler.level_poolers}
    if kinds != {ROIAlign}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(
            f"{names} cannot be exported: set {key} to 'ROIAlignV2', 'ROIAlign', 'PrRoIPool' or "
            "'PrRoIPoolLegacy', as the model was trained."
        )


def levels_of(pooler: ROIPooler, boxes: Tensor) -> Tensor:
    """(R,) int64: the level of each box (R, 4) by its area, in [0, L)."""
    return assign_boxes_to_levels(
        [Boxes(boxes)],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )


def pool(pooler: ROIPooler, features: list[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
    """What `pooler` makes of boxes that need not be sorted by image.

    Args:
        features: L maps (N, C, H, W).
        boxes, images: (R, 4), and (R,) int64 of which image each is.

    Returns:
        (R, C, P, Q).
    """
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
    if len(features) == 1:
        return pooler.level_poolers[0](features[0], rois)
    levels = levels_of(pooler, boxes)
    of_level = [torch.nonzero(levels == level).squeeze(1) for level in range(len(features))]
    parts = zip(pooler.level_poolers, features, of_level)
    pooled = torch.cat([level_pooler(x, rois[index]) for level_pooler, x, index in parts])
    order = torch.cat(of_level)
    place = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]))
    return pooled[place]
