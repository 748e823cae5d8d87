"""Who suppresses whom in IoU-guided NMS, by a compiled operator on the CPU.

Shape letters: R boxes of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iou_d2.ops import nms

from .extension import HAS_EXTENSION


def first_suppressors(boxes: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """`iou_d2.ops.nms.first_suppressors`, on the CPU in one pass where the operator is compiled.

    There a box is handed to the one that suppressed it by the very comparison that did, so that R
    is never among the indices.
    """
    if HAS_EXTENSION and boxes.device.type == "cpu" and len(boxes):
        compared = nms.compared_boxes(boxes, classes)
        if compared is not None:
            return torch.ops.iou_d2.first_suppressors(compared, classes.long(), threshold)
    return nms.first_suppressors(boxes, classes, threshold)


def _fake(boxes, classes, threshold):
    return torch.empty_like(classes)


if HAS_EXTENSION:
    torch.library.register_fake("iou_d2::first_suppressors", _fake)
