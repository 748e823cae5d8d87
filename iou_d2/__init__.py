"""Detectors that know how well their boxes fit, on Detectron2."""

# For what they register.
from . import backbones, detectors  # noqa: F401
from .config import add_iou_config, get_config, load_config

__version__ = "0.1.0"
__all__ = ["add_iou_config", "get_config", "load_config"]
