"""Refinement of boxes by gradient ascent on the predicted IoU as a graph.

Shape letters: N images, R boxes of all images. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iou_d2.detectors.iou_net_inference import GradientAscent
from iou_d2.ops.refine import clip_boxes

from .predicted_iou import PredictedIoU
from .prroi_graph import FeatureTable


def refined(
    predict: PredictedIoU,
    ascent: GradientAscent,
    table: FeatureTable,
    boxes: Tensor,
    image: Tensor,
    classes: Tensor,
    limits: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `ascent` makes of boxes; the steps are unrolled, and what would end one stands in masks.

    Args:
        predict: whose gradient the boxes follow.
        table: of the images.
        boxes: (R, 4) finite; R may be 0.
        image, classes: (R,) int64.
        limits: (R, 2) or (1, 2), width and height of the image without padding.

    Returns:
        (R, 4) boxes inside the limits, and their predicted IoUs (R,).
    """
    level = predict.levels(boxes)
    boxes = clip_boxes(boxes, limits)
    where = image, classes, level
    if ascent.steps == 0:
        return boxes, predict(table, boxes, *where)
    ious, gradient = predict.with_gradient(table, boxes, *where)
    moving = torch.ones_like(ious, dtype=torch.bool)
    for step in range(ascent.steps):
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        moved = boxes + ascent.step_size * gradient * sides
        moving = moving & moved.isfinite().all(dim=1)
        moved = clip_boxes(moved, limits)
        moving = moving & (moved[:, 2:] > moved[:, :2]).all(dim=1)
        moved = torch.where(moving[:, None], moved, boxes)
        if step + 1 < ascent.steps:
            new, gradient = predict.with_gradient(table, moved, *where)
        else:
            new = predict(table, moved, *where)
        change = new - ious
        moving = moving & ((change >= 0) if ascent.roll_back else change.isfinite())
        boxes = torch.where(moving[:, None], moved, boxes)
        ious = torch.where(moving, new, ious)
        moving = moving & (change.abs() >= ascent.early_stop) & (change >= ascent.max_drop)
    return boxes, ious
