"""What a detector would reach if one of its predictions were true: the oracles of arXiv 2008.13367,
Table 1, for every detector of iou_d2."""

from __future__ import annotations

from functools import singledispatch

from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import nn

from iou_d2.detectors.point_detector import PointDetector
from iou_d2.detectors.refinedet import RefineDet
from iou_d2.detectors.retinanet import BoxLossRetinaNet
from iou_d2.detectors.ssd import SSD
from iou_d2.detectors.unitbox import UnitBox
from iou_d2.errors import InputError

from .dense import AnchorEditor, PixelEditor, PointEditor, RefineDetEditor, SSDEditor
from .editors import Editor
from .oracles import ORACLES
from .two_stage import RegionEditor

__all__ = ["ORACLES", "editor_of"]


@singledispatch
def editor_of(detector: nn.Module) -> Editor:
    """What overwrites the predictions of `detector`. Raises InputError where nothing does."""
    raise InputError(
        f"There is no oracle for MODEL.META_ARCHITECTURE {type(detector).__name__}: only for "
        "PointDetector, BoxLossRetinaNet, IoUAwareRetinaNet, SSD, IoUAwareSSD, RefineDet, UnitBox "
        "and GeneralizedRCNN."
    )


editor_of.register(PointDetector, PointEditor)
editor_of.register(BoxLossRetinaNet, AnchorEditor)
editor_of.register(SSD, SSDEditor)
editor_of.register(RefineDet, RefineDetEditor)
editor_of.register(UnitBox, PixelEditor)
editor_of.register(GeneralizedRCNN, RegionEditor)
