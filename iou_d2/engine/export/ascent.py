"""Refinement of boxes by gradient ascent on the predicted IoU as a graph.

Shape letters: N images, R boxes of all images. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from torch import Tensor

from iou_d2.detectors.iou_net_inference import GradientAscent
from iou_d2.ops.refine import ascend_together, clip_boxes

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
    """What `ascent` makes of boxes; the steps are unrolled.

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

    def evaluate(moved: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if with_gradient:
            return predict.with_gradient(table, moved, *where)
        return predict(table, moved, *where), None

    return ascend_together(
        evaluate,
        boxes,
        limits,
        steps=ascent.steps,
        step_size=ascent.step_size,
        early_stop=ascent.early_stop,
        max_drop=ascent.max_drop,
        roll_back=ascent.roll_back,
    )
