"""RoI pooling over a pyramid for the boxes of all images in one tensor.

Shape letters: N images, R boxes of all images, C channels, L levels, P x Q bins. Boxes are XYXY in
pixels of the network input.
"""

from __future__ import annotations

from typing import Protocol

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor

from iou_d2.detectors.pooler import PrRoIPooler
from iou_d2.errors import InputError

from .prroi_graph import assigned_levels, bins_of, feature_table, place, pool


class Pooling(Protocol):
    """Pools from the maps that it was made of."""

    def __call__(self, boxes: Tensor, images: Tensor) -> Tensor:
        """Boxes (R, 4) of `images` (R,) int64, in any order -> (R, C, P, Q)."""


class AlignPooling:
    """What a ROIPooler of ROIAligns does."""

    def __init__(self, pooler: ROIPooler, features: list[Tensor]):
        """
        Args:
            features: L maps (N, C, H, W).
        """
        self.pooler = pooler
        self.features = features

    def __call__(self, boxes: Tensor, images: Tensor) -> Tensor:
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
        pools, features = self.pooler.level_poolers, self.features
        if len(features) == 1:
            return pools[0](features[0], rois)
        levels = self.levels(boxes)
        of_level = [torch.nonzero(levels == level).squeeze(1) for level in range(len(features))]
        parts = zip(pools, features, of_level)
        pooled = torch.cat([of_map(x, rois[index]) for of_map, x, index in parts])
        order = torch.cat(of_level)
        # Of the length of the boxes, which torch.export knows.
        where = torch.zeros_like(levels).scatter(0, order, torch.arange(order.shape[0]))
        return pooled[where]

    def levels(self, boxes: Tensor) -> Tensor:
        """(R,) int64: the level of each box by its area."""
        pooler = self.pooler
        return assign_boxes_to_levels(
            [Boxes(boxes)],
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )


class PrecisePooling:
    """What a PrRoIPooler does."""

    def __init__(self, pooler: PrRoIPooler, features: list[Tensor]):
        """
        Args:
            features: L maps (N, C, H, W).
        """
        self.pooler = pooler
        self.bins = bins_of(pooler)
        self.aligned = pooler.level_poolers[0].aligned
        scales = [level.spatial_scale for level in pooler.level_poolers]
        self.table = feature_table(features, scales)

    def __call__(self, boxes: Tensor, images: Tensor) -> Tensor:
        levels = assigned_levels(self.pooler, boxes)
        rois = place(self.table, boxes, images, levels, self.bins, self.aligned)
        return pool(self.table, rois)


def require_pooler(pooler: ROIPooler, key: str) -> None:
    """Raise an InputError with the `key` that chooses it where no graph can hold a pooler."""
    if type(pooler) is PrRoIPooler:
        bins_of(pooler)
        return
    kinds = {type(level) for level in pooler.level_poolers}
    if type(pooler) is not ROIPooler or kinds != {ROIAlign}:
        names = ", ".join(sorted(kind.__name__ for kind in {type(pooler), *kinds}))
        raise InputError(
            f"A pooler of {names} cannot be exported: {key} has to be 'ROIAlignV2', 'ROIAlign', "
            "'PrRoIPool' or 'PrRoIPoolLegacy'."
        )


def pooling_of(pooler: ROIPooler, features: list[Tensor]) -> Pooling:
    """What pools as `pooler` does, which `require_pooler` has seen."""
    is_precise = isinstance(pooler, PrRoIPooler)
    return PrecisePooling(pooler, features) if is_precise else AlignPooling(pooler, features)
