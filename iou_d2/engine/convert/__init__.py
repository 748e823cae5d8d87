"""Checkpoints of mmdetection, torchvision and Detectron2 into one another, by the names of tensors.

A layout is one of LAYOUTS; "detectron2" is that of the models of iou_d2 and of Detectron2. Two
layouts are translated into one another through Detectron2's names. A network is a file here:
`NETWORKS` lists them.
"""

from iou_d2.choices import LAYOUTS

from .fcos import settings_of_mmdet
from .layouts import (
    DETECTRON2_PIXELS,
    WITH_DETECTRON2_PIXELS,
    PixelFormat,
    has_linear_p7,
    pixel_format_of_mmdet,
    swap_red_and_blue,
)
from .resnet import backbone_prefix
from .translate import Translated, recognise, translate, translate_tensors

__all__ = [
    "DETECTRON2_PIXELS",
    "LAYOUTS",
    "WITH_DETECTRON2_PIXELS",
    "PixelFormat",
    "Translated",
    "backbone_prefix",
    "has_linear_p7",
    "pixel_format_of_mmdet",
    "recognise",
    "settings_of_mmdet",
    "swap_red_and_blue",
    "translate",
    "translate_tensors",
]
