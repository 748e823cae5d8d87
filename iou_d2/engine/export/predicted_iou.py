"""The IoU branch of IoU-Net as a graph: the predicted IoU of boxes and, without autograd, its
gradient in their coordinates.

Shape letters: N images, R boxes of all images, K classes, C channels, L levels. Boxes are XYXY in
pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import Tensor, nn

from iou_d2.detectors.iou_branch import IOU_CODES, IoUBranch
from iou_d2.detectors.pooler import PrRoIPooler
from iou_d2.errors import InputError

from .prroi_graph import (
    FeatureTable,
    assigned_levels,
    bins_of,
    box_gradient,
    feature_table,
    place,
    pool,
    pool_with_slopes,
)

# What decodes an output -> from decoded IoUs (R,), its derivative (R,).
SLOPES: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    IOU_CODES["smooth_l1"].decode: lambda iou: torch.full_like(iou, 0.5),
    IOU_CODES["bce"].decode: lambda iou: iou * (1 - iou),
}


class PredictedIoU(nn.Module):
    """What `IoUBranch.predict` says of boxes, given with the number of their image each.

    Attributes:
        num_outputs: K, or 1 for an IoU that knows no class.
    """

    def __init__(self, branch: IoUBranch):
        """Raises InputError where the branch pools or is made of something else than PrRoI pooling,
        convolutions without norm and FC layers."""
        super().__init__()
        _require_known_parts(branch)
        self.pooler = branch.pooler
        self.bins = bins_of(branch.pooler)
        self.head = branch.head
        self.iou_pred = branch.iou_pred
        self.decode = branch.code.decode
        self.num_outputs = branch.iou_pred.out_features

    def table(self, features: Sequence[Tensor]) -> FeatureTable:
        """What the other methods look L maps (N, C, H, W) up in."""
        return feature_table(features, [x.spatial_scale for x in self.pooler.level_poolers])

    def levels(self, boxes: Tensor) -> Tensor:
        """(R,) int64: the level that boxes (R, 4) are pooled from, by their area."""
        return assigned_levels(self.pooler, boxes)

    def forward(
        self,
        table: FeatureTable,
        boxes: Tensor,
        image: Tensor,
        classes: Tensor,
        level: Tensor | None = None,
    ) -> Tensor:
        """Predicted IoU (R,); by smooth L1 it may leave [0, 1].

        Args:
            table: of the images.
            boxes: (R, 4); R may be 0.
            image, classes: (R,) int64.
            level: (R,) int64, by default that of `levels`.
        """
        level = self.levels(boxes) if level is None else level
        rois = self._place(table, boxes, image, level)
        return self.decode(self._of_class(self.head(pool(table, rois)), classes))

    def with_gradient(
        self,
        table: FeatureTable,
        boxes: Tensor,
        image: Tensor,
        classes: Tensor,
        level: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicted IoU (R,) and its gradient (R, 4) in the boxes, whose level is fixed."""
        level = self.levels(boxes) if level is None else level
        rois = self._place(table, boxes, image, level)
        pooled, slopes = pool_with_slopes(table, rois)
        values = [pooled]
        for layer in self.head:
            values.append(layer(values[-1]))
        ious = self.decode(self._of_class(values[-1], classes))
        gradient = SLOPES[self.decode](ious)[:, None] * self._weights_of(classes)
        for layer, before, after in zip(
            reversed(self.head), reversed(values[:-1]), reversed(values[1:])
        ):
            gradient = _before(layer, gradient, before, after)
        return ious, box_gradient(rois, slopes, gradient)

    def _place(self, table: FeatureTable, boxes: Tensor, image: Tensor, level: Tensor):
        aligned = self.pooler.level_poolers[0].aligned
        return place(table, boxes, image, level, self.bins, aligned)

    def _of_class(self, hidden: Tensor, classes: Tensor) -> Tensor:
        outputs = self.iou_pred(hidden)
        if self.num_outputs == 1:
            return outputs[:, 0]
        return outputs.gather(1, classes[:, None]).squeeze(1)

    def _weights_of(self, classes: Tensor) -> Tensor:
        """(R, channels), or (1, channels) where the IoU knows no class."""
        weight = self.iou_pred.weight
        return weight if self.num_outputs == 1 else weight[classes]


def _before(layer: nn.Module, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The gradient in what `layer` was given, `before`, from that in what it made, `after`."""
    if isinstance(layer, nn.Linear):
        return gradient @ layer.weight
    if isinstance(layer, nn.Flatten):
        return gradient.reshape(-1, *before.shape[1:])
    gradient = gradient * (after > 0)
    if isinstance(layer, nn.ReLU):
        return gradient
    # A convolution with a ReLU, of stride 1.
    return F.conv_transpose2d(gradient, layer.weight, padding=layer.padding)


def _require_known_parts(branch: IoUBranch) -> None:
    if not isinstance(branch.pooler, PrRoIPooler):
        raise InputError(
            "An IoU branch is exported with precise RoI pooling alone: MODEL.ROI_BOX_HEAD."
            "POOLER_TYPE 'PrRoIPool' or 'PrRoIPoolLegacy', as the model was trained."
        )
    if type(branch.head) is not FastRCNNConvFCHead:
        raise InputError(
            f"MODEL.ROI_BOX_HEAD.NAME {type(branch.head).__name__} cannot be exported with an IoU "
            "branch: only FastRCNNConvFCHead can."
        )
    if any(getattr(layer, "norm", None) is not None for layer in branch.head):
        raise InputError("An IoU branch with a norm, MODEL.ROI_BOX_HEAD.NORM, cannot be exported.")
    if branch.code.decode not in SLOPES:
        raise InputError(f"Of the IoU code {branch.code} the exporter knows no derivative.")
