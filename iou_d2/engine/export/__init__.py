"""Detectors as files for ONNX Runtime, TorchScript and torch.export."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import nn

from iou_d2.choices import FORMATS, OUTPUTS
from iou_d2.detectors.dense import DenseDetector
from iou_d2.errors import InputError

from .deform import with_operator_stars
from .graph import DetectorGraph, ImageGraph
from .readers import reader_of
from .refinement import refinement_graph
from .two_stage import two_stage_graph

__all__ = ["FORMATS", "OUTPUTS", "build_graph"]


def build_graph(
    cfg: CfgNode,
    detector: nn.Module,
    outputs: str = "detections",
    deform_conv: str = "GridSample",
) -> ImageGraph:
    """The graph of `detector`, the model of `cfg` on the CPU, that the writers in files.py take.

    Args:
        outputs: one of OUTPUTS.
        deform_conv: "GridSample" or "DeformConv", what the star convolutions become.

    Raises:
        InputError: a detector that cannot be exported, with the key to change.
    """
    if outputs == "refinement":
        return refinement_graph(detector).eval()
    if isinstance(detector, GeneralizedRCNN):
        return two_stage_graph(detector, outputs).eval()
    if not isinstance(detector, DenseDetector):
        raise InputError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} cannot be exported: only the "
            "dense detectors BoxLossRetinaNet, IoUAwareRetinaNet, PointDetector, UnitBox, SSD and "
            "RefineDet can, and the two-stage ones, GeneralizedRCNN and StandaloneIoUNet."
        )
    if deform_conv == "DeformConv":
        detector = with_operator_stars(detector)
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    return DetectorGraph(detector, reader_of(detector), num_classes, outputs).eval()
