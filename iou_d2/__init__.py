"""Detectors that know how well their boxes fit, on Detectron2."""

# For what they register.
from . import (  # noqa: F401
    deform,
    faster_rcnn,
    iou_net,
    point_detector,
    resnet10,
    retinanet,
    unitbox,
    vfnet,
    vgg,
)
from .config import add_iou_config, load_config

__version__ = "0.1.0"
__all__ = ["add_iou_config", "load_config"]
