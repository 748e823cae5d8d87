"""Detectors, heads and proposal generators, which register themselves by name, as the backbones do
of which configs build them."""

from iou_d2 import backbones  # noqa: F401

from . import (  # noqa: F401
    anchors,
    cascade_masks,
    faster_rcnn,
    iou_net,
    iou_retinanet,
    point_detector,
    refinedet,
    res5_heads,
    retinanet,
    ssd,
    unitbox,
    vfnet,
)
