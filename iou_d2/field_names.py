"""What detections may have beside box, score and class: field of Instances -> key in result
files."""

from __future__ import annotations

OPTIONAL_FIELDS = {
    "cls_scores": "cls_score",
    "pred_ious": "pred_iou",
    "pred_centernesses": "centerness",
}
