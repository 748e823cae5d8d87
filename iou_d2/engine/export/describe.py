"""What an exported file says of itself: see iou_d2/runtime/description.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import nn

from iou_d2.detectors.iou_retinanet import IoUAwareRetinaNet
from iou_d2.detectors.point_detector import PointDetector
from iou_d2.detectors.ssd import IoUAwareSSD
from iou_d2.detectors.unitbox import UnitBox
from iou_d2.engine.compat import versions
from iou_d2.ops.losses import focal_loss
from iou_d2.runtime.description import Description, Resize, ShortestEdge, Square

from .two_stage import postprocessor_of


def describe(cfg: CfgNode, detector: nn.Module, outputs: str, weights: str = "") -> Description:
    """
    Args:
        cfg: of the detector.
        outputs: one of OUTPUTS in iou_d2/choices.py.
        weights: the file that the detector was filled with; empty for none.
    """
    return Description(
        method=cfg.MODEL.META_ARCHITECTURE,
        class_names=list(cfg.MODEL.CLASS_NAMES),
        pixel_order=cfg.INPUT.FORMAT,
        pixel_mean=[float(value) for value in cfg.MODEL.PIXEL_MEAN],
        size_divisibility=max(detector.backbone.size_divisibility, 1),
        resize=resize_of(cfg),
        outputs=outputs,
        score=kind_of_score(detector),
        version=versions()["iou_d2"],
        weights_sha256=sha256_of(weights) if weights else "",
    )


def resize_of(cfg: CfgNode) -> Resize:
    """What test images are scaled to."""
    if "square" in cfg.INPUT.AUGMENTATIONS:
        return Square(cfg.INPUT.SQUARE_SIZE)
    return ShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def kind_of_score(detector: nn.Module) -> str:
    """What the `scores` of a detector are, in terms of its other outputs."""
    if isinstance(detector, GeneralizedRCNN):
        return postprocessor_of(detector.roi_heads).score
    if isinstance(detector, UnitBox):
        return "confidence of a pixel"
    if isinstance(detector, (IoUAwareRetinaNet, IoUAwareSSD)):
        alpha = detector.iou_awareness.alpha
        return f"cls_scores^{alpha:g} * pred_ious^{1 - alpha:g}"
    if not isinstance(detector, PointDetector):
        return "class probability"
    if hasattr(detector.head, "quality_pred"):
        product = f"cls_scores * {detector.quality.field}"
        return f"sqrt({product})" if detector.inference.root else product
    loss = getattr(detector.cls_loss, "func", detector.cls_loss)  # which constants it has or not
    is_aware = loss is not focal_loss
    return "class probability that knows the IoU" if is_aware else "class probability"


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
