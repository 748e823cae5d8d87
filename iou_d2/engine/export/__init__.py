"""Dense detectors as files for ONNX Runtime, TorchScript and torch.export.

A two-stage detector needs a graph of its own, with the `names`, the `detector` and the outputs of a
DetectorGraph, beside that in `build_graph`; all else serves it too.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from iou_d2.detectors.dense import DenseDetector
from iou_d2.errors import InputError

from .candidates import suppress_in_onnx, suppress_in_torch
from .deform import with_operator_stars
from .graph import OUTPUTS, DetectorGraph
from .readers import reader_of

FORMATS = ("onnx", "torchscript", "pt2")

__all__ = ["FORMATS", "OUTPUTS", "build_graph"]


def build_graph(
    cfg: CfgNode,
    detector: nn.Module,
    outputs: str = "detections",
    format: str = "onnx",
    deform_conv: str = "GridSample",
) -> DetectorGraph:
    """The graph of `detector`, the model of `cfg` on the CPU, that the writers in files.py take.

    Args:
        outputs: one of OUTPUTS.
        format: one of FORMATS.
        deform_conv: "GridSample" or "DeformConv", what the star convolutions become in ONNX.

    Raises:
        InputError: a detector that cannot be exported, with the key to change.
    """
    if not isinstance(detector, DenseDetector):
        raise InputError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} cannot be exported: only the "
            "dense detectors can, BoxLossRetinaNet, IoUAwareRetinaNet, PointDetector and UnitBox."
        )
    if format == "onnx" and deform_conv == "DeformConv":
        detector = with_operator_stars(detector)
    suppress = suppress_in_onnx if format == "onnx" else suppress_in_torch
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    return DetectorGraph(detector, reader_of(detector), num_classes, outputs, suppress).eval()
