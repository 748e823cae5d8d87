"""Detectors that know how well their boxes fit, on Detectron2."""

from . import iou_net, resnet10, retinanet  # noqa: F401  for what they register
from .config import add_iou_config, load_config

__version__ = "0.1.0"
__all__ = ["add_iou_config", "load_config"]
