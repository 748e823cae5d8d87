"""IoU-Net of thisisi3/OpenMMLab-IoUNet, a Faster R-CNN of mmdetection 2.14 with an IoU head.

Its smooth L1 learns (IoU - 0.5) / 0.5, its SimpleGFLLoss (binary cross-entropy) the IoU after a
sigmoid: as MODEL.IOU_NET.LOSS_TYPE "smooth_l1" and "bce" here, so that no number changes.
"""

from __future__ import annotations

from .network import Network
from .rcnn import as_it_is, mmdet_box_head_rows, mmdet_rows
from .rows import Change, Row

_BRANCH = "roi_heads.iou_branch"


LOSS = Change(
    as_it_is,
    as_it_is,
    'no number, but MODEL.IOU_NET.LOSS_TYPE is "bce" for a loss_iou SimpleGFLLoss and "smooth_l1" '
    "for SmoothL1Loss: that and more is in the configs mmdet/iou_net_*",
)


def iou_net_rows() -> list[Row]:
    return [
        *mmdet_rows(),
        *mmdet_box_head_rows("roi_head.iou_head", f"{_BRANCH}.head"),
        Row("roi_head.iou_head.fc_iou.*", f"{_BRANCH}.iou_pred.*", LOSS),
    ]


# Before RCNN, whose names it has too.
IOU_NET = Network(
    title="IoU-Net",
    signs={"mmdet": r"^roi_head\.iou_head\.fc_iou\.", "detectron2": r"^roi_heads\.iou_branch\."},
    rows={"mmdet": iou_net_rows},
)
