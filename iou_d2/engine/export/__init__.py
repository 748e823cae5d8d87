"""Dense detectors as files for ONNX Runtime, TorchScript and torch.export.

A two-stage detector needs a graph of its own, with the `names`, the `detector` and the outputs of a
DetectorGraph, beside that in `build_graph`; all else serves it too.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from iou_d2.detectors.dense import DenseDetector
from iou_d2.errors import InputError

from .deform import with_operator_stars
from .files import FORMATS
from .graph import OUTPUTS, DetectorGraph
from .readers import reader_of

__all__ = ["FORMATS", "OUTPUTS", "build_graph"]


def build_graph(
    cfg: CfgNode,
    detector: nn.Module,
    outputs: str = "detections",
    deform_conv: str = "GridSample",
) -> DetectorGraph:
    """The graph of `detector`, the model of `cfg` on the CPU, that the writers in files.py take.

    Args:
        outputs: one of OUTPUTS.
        deform_conv: "GridSample" or "DeformConv", what the star convolutions become.

    Raises:
        InputError: a detector that cannot be exported, with the key to change.
    """
    if not isinstance(detector, DenseDetector):
        raise InputError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} cannot be exported: only the "
            "dense detectors can, BoxLossRetinaNet, IoUAwareRetinaNet, PointDetector, UnitBox, SSD "
            "and RefineDet."
        )
    if deform_conv == "DeformConv":
        detector = with_operator_stars(detector)
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    return DetectorGraph(detector, reader_of(detector), num_classes, outputs).eval()
