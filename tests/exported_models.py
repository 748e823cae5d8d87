"""Small models with random weights, whose scores differ, and the files that they are written to."""

from __future__ import annotations

import torch
from detectron2.modeling import build_model
from torch import nn

from iou_d2 import get_config
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.agreement import NOTHING, Agreement
from iou_d2.engine.export.check import compare
from iou_d2.engine.export.describe import describe
from iou_d2.engine.export.files import InputSpec, write

SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RETINANET.NUM_CLASSES", "3"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("MODEL.POINT_DETECTOR.NUM_GROUPS", "8", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.01"),
)


SMALL_TWO_STAGE = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "60", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
)
# Of four or five levels of features two: writing a file takes time for each.
TWO_LEVELS = (
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p3', 'p4']", "MODEL.RPN.IN_FEATURES", "['p3', 'p4']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[24], [48]]"),
)
TWO_DENSE_LEVELS = (
    *("MODEL.RETINANET.IN_FEATURES", "['p3', 'p5']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[12, 15, 19], [48, 60, 76]]"),
    *("MODEL.POINT_DETECTOR.MAX_DISTANCES", "[24, 96]"),
    *("MODEL.POINT_DETECTOR.DISTANCE_UNITS", "[24, 96]"),
)
# For configs/faster_rcnn_R_50_C4_1x.yaml, whose random weights let features grow by thousands.
SMALL_C4 = (
    *("MODEL.PIXEL_STD", "[20000.0, 20000.0, 20000.0]"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32, 64]]"),
)


def small_two_stage(config_file: str, *overrides: str) -> tuple:
    """A config and its model in test mode, with objects of each size and scores of each height."""
    cfg = get_config(config_file, [*SMALL_TWO_STAGE, *overrides])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    rpn, heads = model.proposal_generator.rpn_head, model.roi_heads
    for name, parameter in [*rpn.named_parameters(), *heads.named_parameters()]:
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
            is_box = "bbox_pred" in name or "anchor_deltas" in name
            parameter.data *= 0.2 if is_box else 1.0
    return cfg, model


def small_model(config_file: str, *overrides: str) -> tuple:
    """A config and its model in test mode. Heads as they start give all points nearly one score,
    which rounding would sort."""
    cfg = get_config(config_file, [*SMALL, *overrides])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.head.named_parameters():
        if parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)
            parameter.data *= 0.3 if "box" in name and "pred" in name else 1.0
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.02)
    return cfg, model


def write_model(
    cfg,
    model,
    path,
    *,
    format: str = "onnx",
    outputs: str = "detections",
    spec: InputSpec | None = None,
    opset: int = 17,
    deform_conv: str = "GridSample",
):
    """Write `model`, and return the graph that was written."""
    graph = build_graph(cfg, model, outputs, deform_conv)
    description = describe(cfg, model, outputs)
    write(format, graph, path, spec or InputSpec(), description, opset, deform_conv)
    return graph


def noise(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + height + width)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def agreement_at(shapes, run, graph, cfg) -> Agreement:
    """What a written file, `run`, and the model of its graph say of noise of each shape."""
    total = NOTHING
    for shape in shapes:
        total = total.joined(compare(run, graph, noise(*shape), cfg))
    return total
