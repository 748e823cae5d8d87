"""FCOS of mmdetection, torchvision, Detectron2's main branch and AdelaiDet."""

from __future__ import annotations

import re
from typing import Any

from .network import Network
from .resnet import conv_module
from .rows import Change, Row

MAX_CONVS = 8  # of a tower
LAST_CONV = 3  # of the published ones, which have 4

# AdelaiDet has a scale as a vector of one number.
ONE_NUMBER = Change(lambda x, _: x.reshape(()), lambda x, _: x.reshape(1))


def mmdet_rows() -> list[Row]:
    rows = [
        *conv_module("bbox_head.cls_convs.#", "head.cls_tower.#"),
        *conv_module("bbox_head.reg_convs.#", "head.box_tower.#"),
        Row("bbox_head.scales.#.scale", "head.box_scales.#"),
    ]
    # "fcos" until 2.3.
    for prefix in ("conv", "fcos"):
        rows += [
            Row(f"bbox_head.{prefix}_cls.*", "head.cls_pred.*"),
            Row(f"bbox_head.{prefix}_reg.*", "head.box_pred.*"),
            Row(f"bbox_head.{prefix}_centerness.*", "head.quality_pred.*"),
        ]
    return rows


def settings_of_mmdet(config: str) -> dict[str, Any]:
    """Keys of MODEL.POINT_DETECTOR, which names and shapes do not tell, read off the text of an
    mmdetection config; empty where it is none of an FCOS."""
    if not re.search(r"type\s*=\s*['\"]FCOSHead['\"]", config):
        return {}
    on_reg = re.search(r"centerness_on_reg\s*=\s*True", config)
    settings: dict[str, Any] = {"QUALITY_TOWER": "box" if on_reg else "class"}
    if re.search(r"norm_on_bbox\s*=\s*True", config):
        return {**settings, "BOX_CODEC": "relu"}
    return {**settings, "BOX_CODEC": "exp"}


def torchvision_rows() -> list[Row]:
    cls, box = "head.classification_head", "head.regression_head"
    return [
        *_sequential(f"{cls}.conv", "head.cls_tower"),
        *_sequential(f"{box}.conv", "head.box_tower"),
        Row(f"{cls}.cls_logits.*", "head.cls_pred.*"),
        Row(f"{box}.bbox_reg.*", "head.box_pred.*"),
        Row(f"{box}.bbox_ctrness.*", "head.quality_pred.*"),
    ]


def detectron2_main_rows() -> list[Row]:
    return [
        *_sequential("head.cls_subnet", "head.cls_tower"),
        *_sequential("head.bbox_subnet", "head.box_tower"),
        Row("head.cls_score.*", "head.cls_pred.*"),
        Row("head.bbox_pred.*", "head.box_pred.*"),
        Row("head.ctrness.*", "head.quality_pred.*"),
    ]


def adelaidet_rows() -> list[Row]:
    return _adelaidet_rows(None)


def adelaidet_deformable_rows() -> list[Row]:
    return _adelaidet_rows(LAST_CONV)


def _adelaidet_rows(deformable: int | None) -> list[Row]:
    head = "proposal_generator.fcos_head"
    return [
        *_sequential(f"{head}.cls_tower", "head.cls_tower", deformable),
        *_sequential(f"{head}.bbox_tower", "head.box_tower", deformable),
        Row(f"{head}.cls_logits.*", "head.cls_pred.*"),
        Row(f"{head}.bbox_pred.*", "head.box_pred.*"),
        Row(f"{head}.ctrness.*", "head.quality_pred.*"),
        Row(f"{head}.scales.#.scale", "head.box_scales.#", ONE_NUMBER),
    ]


def _sequential(theirs: str, ours: str, deformable: int | None = None) -> list[Row]:
    """A tower that is one list of convolution, norm, ReLU, convolution, ..., with the index of
    AdelaiDet's deformable convolution, a module of two."""
    rows = []
    for index in range(MAX_CONVS):
        conv, norm = f"{theirs}.{3 * index}", f"{theirs}.{3 * index + 1}"
        if index == deformable:
            rows.append(Row(f"{conv}.offset.*", f"{ours}.{index}.offset.*"))
            conv += ".conv"
        rows += [
            Row(f"{conv}.*", f"{ours}.{index}.*"),
            Row(f"{norm}.*", f"{ours}.{index}.norm.*"),
        ]
    return rows


# AdelaiDet's DCN rows; mmdetection names a deformable convolution like a plain one.
FCOS_DEFORMABLE = Network(
    title="FCOS with deformable towers",
    signs={
        "adelaidet": r"^proposal_generator\.fcos_head\.cls_tower\.9\.offset\.",
        "detectron2": r"^head\.cls_tower\.3\.offset\.",
    },
    rows={"mmdet": mmdet_rows, "adelaidet": adelaidet_deformable_rows},
)
FCOS = Network(
    title="FCOS",
    signs={
        "mmdet": r"^bbox_head\.(conv|fcos)_centerness\.",
        "torchvision": r"^head\.regression_head\.bbox_ctrness\.",
        "detectron2_main": r"^head\.ctrness\.",
        "adelaidet": r"^proposal_generator\.fcos_head\.ctrness\.",
        "detectron2": r"^head\.quality_pred\.",
    },
    rows={
        "mmdet": mmdet_rows,
        "torchvision": torchvision_rows,
        "detectron2_main": detectron2_main_rows,
        "adelaidet": adelaidet_rows,
    },
)
