"""COCO AP with AP50..AP90, VOC AP, and how well confidence ranks boxes."""

from iou_d2.analysis.average_precision import (
    IOU_THRESHOLDS,
    ap_by_iou,
    coco_precision,
    summarize_ap,
)

from .build import VOCEvaluator, build_evaluator
from .coco import COCOLocalizationEvaluator

__all__ = [
    "IOU_THRESHOLDS",
    "COCOLocalizationEvaluator",
    "VOCEvaluator",
    "ap_by_iou",
    "build_evaluator",
    "coco_precision",
    "summarize_ap",
]
