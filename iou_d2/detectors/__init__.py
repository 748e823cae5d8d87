"""Detectors, heads and proposal generators, which register themselves by name."""

from . import (  # noqa: F401
    faster_rcnn,
    iou_net,
    iou_retinanet,
    point_detector,
    retinanet,
    unitbox,
    vfnet,
)
