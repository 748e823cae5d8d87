"""VarifocalNet, of mmdetection and of its authors, whose code is an mmdetection."""

from __future__ import annotations

from .network import Network
from .resnet import conv_module
from .rows import Row


def mmdet_rows() -> list[Row]:
    return [
        *conv_module("bbox_head.cls_convs.#", "head.cls_tower.#"),
        *conv_module("bbox_head.reg_convs.#", "head.box_tower.#"),
        *conv_module("bbox_head.vfnet_reg_conv", "head.initial_conv"),
        Row("bbox_head.vfnet_reg.*", "head.initial_pred.*"),
        Row("bbox_head.scales.#.scale", "head.initial_scales.#"),
        Row("bbox_head.vfnet_reg_refine_dconv.weight", "head.refine_star.weight"),
        Row("bbox_head.vfnet_reg_refine.*", "head.refine_pred.*"),
        Row("bbox_head.scales_refine.#.scale", "head.refine_scales.#"),
        Row("bbox_head.vfnet_cls_dconv.weight", "head.cls_star.weight"),
        Row("bbox_head.vfnet_cls.*", "head.cls_pred.*"),
    ]


VFNET = Network(
    title="VarifocalNet",
    signs={"mmdet": r"^bbox_head\.vfnet_", "detectron2": r"^head\.cls_star\."},
    rows={"mmdet": mmdet_rows},
)
