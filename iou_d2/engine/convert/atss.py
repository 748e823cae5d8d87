"""ATSS of mmdetection, whose boxes are deltas of anchors."""

from __future__ import annotations

from .network import Network
from .resnet import conv_module
from .rows import Row


def mmdet_rows() -> list[Row]:
    return [
        *conv_module("bbox_head.cls_convs.#", "head.cls_tower.#"),
        *conv_module("bbox_head.reg_convs.#", "head.box_tower.#"),
        Row("bbox_head.atss_cls.*", "head.cls_pred.*"),
        Row("bbox_head.atss_reg.*", "head.box_pred.*"),
        Row("bbox_head.atss_centerness.*", "head.quality_pred.*"),
        Row("bbox_head.scales.#.scale", "head.delta_scales.#"),
    ]


# Here FCOS has the same names but for the scales: those of distances are `box_scales`.
ATSS = Network(
    title="ATSS",
    signs={"mmdet": r"^bbox_head\.atss_centerness\.", "detectron2": r"^head\.delta_scales\."},
    rows={"mmdet": mmdet_rows},
)
