"""POOLER_TYPE of the R-CNN heads: more kinds of pooling than Detectron2's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, build_box_head

from iou_d2.errors import InputError
from iou_d2.layers import PrRoIPool
from iou_d2.layers.spp import RoIMaxPool

from .pooler import LayerPooler, PrRoIPooler, SPPPooler, scales_of

# POOLER_TYPE -> pooler of an output size, scales and two more arguments, as PrRoIPooler has them.
POOLERS: dict[str, Callable[..., LayerPooler]] = {
    "PrRoIPool": partial(PrRoIPooler, aligned=True),
    "PrRoIPoolLegacy": partial(PrRoIPooler, aligned=False),
    "ROIPool": lambda size, *levels: LayerPooler(partial(RoIMaxPool, size), size, *levels),
}
# POOLER_TYPE -> the layer of each level of a spatial pyramid: the maximum, as in SPP-net (arXiv
# 1406.4729), or the mean that has gradients for boxes (ours).
PYRAMIDS = {"SPP": RoIMaxPool, "PrRoISPP": partial(PrRoIPool, aligned=True)}


class AnyPooler:
    """Stands before Detectron2's ROI heads: POOLER_TYPE of ROI_BOX_HEAD, ROI_MASK_HEAD and
    ROI_KEYPOINT_HEAD may also be "PrRoIPool" or "PrRoIPoolLegacy" (not aligned), beside "ROIPool",
    "ROIAlign" (not aligned) and "ROIAlignV2"; that of ROI_BOX_HEAD "SPP" or "PrRoISPP" with
    MODEL.ROI_BOX_HEAD.SPP_LEVELS too."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        require_box_head(cfg)
        _require_no_convolutions(cfg)
        parts = with_pooler(super()._init_box_head, cfg, input_shape, "ROI_BOX_HEAD", "box_pooler")
        if isinstance(parts["box_pooler"], SPPPooler):
            _fit_box_heads(parts, cfg, input_shape)
        return parts

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        _require_no_pyramid(cfg, "ROI_MASK_HEAD", cfg.MODEL.MASK_ON)
        names = "ROI_MASK_HEAD", "mask_pooler"
        return with_pooler(super()._init_mask_head, cfg, input_shape, *names)

    @classmethod
    def _init_keypoint_head(cls, cfg, input_shape):
        _require_no_pyramid(cfg, "ROI_KEYPOINT_HEAD", cfg.MODEL.KEYPOINT_ON)
        names = "ROI_KEYPOINT_HEAD", "keypoint_pooler"
        return with_pooler(super()._init_keypoint_head, cfg, input_shape, *names)


def with_pooler(init: Callable, cfg, input_shape, node: str, name: str) -> dict:
    """What `init`, one of Detectron2's, makes of `cfg`, with the pooler that POOLER_TYPE names.

    The box heads that come with a spatial pyramid are as for a single bin."""
    kind = cfg.MODEL[node].POOLER_TYPE
    if kind not in POOLERS and kind not in PYRAMIDS:
        return init(cfg, input_shape)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL[node].POOLER_TYPE = "ROIAlignV2"
    if kind in PYRAMIDS:
        cfg.MODEL[node].POOLER_RESOLUTION = 1
    parts = init(cfg, input_shape)
    if name in parts:
        parts[name] = _build_pooler(cfg, kind, parts[name])
    return parts


def _build_pooler(cfg, kind: str, like: ROIPooler) -> LayerPooler:
    """The pooler that `kind` names, with the levels of `like`."""
    levels = scales_of(like), like.canonical_box_size, like.canonical_level
    if kind in PYRAMIDS:
        return SPPPooler(PYRAMIDS[kind], _spp_levels(cfg), *levels)
    return POOLERS[kind](like.output_size, *levels)


def _spp_levels(cfg) -> tuple[int, ...]:
    levels = cfg.MODEL.ROI_BOX_HEAD.SPP_LEVELS
    if not levels or not all(isinstance(x, int) and x > 0 for x in levels):
        raise InputError(
            "MODEL.ROI_BOX_HEAD.SPP_LEVELS is bins a side of each level, whole numbers from 1 on "
            f"such as [4, 2, 1], but it is {levels!r}."
        )
    return tuple(levels)


def _fit_box_heads(parts: dict, cfg, input_shape) -> None:
    """Build the box heads of `parts` again, for what its SPPPooler puts out."""
    height, width = parts["box_pooler"].output_size
    channels = input_shape[parts["box_in_features"][0]].channels
    shape = ShapeSpec(channels=channels, height=height, width=width)
    if "box_heads" in parts:
        parts["box_heads"] = [build_box_head(cfg, shape) for _ in parts["box_heads"]]
    else:
        parts["box_head"] = build_box_head(cfg, shape)


def require_box_head(cfg) -> None:
    """Raise an InputError where MODEL.ROI_BOX_HEAD.NAME is no box head; Detectron2's default is
    empty."""
    name = cfg.MODEL.ROI_BOX_HEAD.NAME
    names = sorted(known for known, _ in ROI_BOX_HEAD_REGISTRY)
    if name not in names:
        raise InputError(
            f"MODEL.ROI_BOX_HEAD.NAME is one of {', '.join(names)}, but it is {name!r}; "
            f"{cfg.MODEL.ROI_HEADS.NAME} needs one, with NUM_FC 1 or more."
        )


def _require_no_convolutions(cfg) -> None:
    node = cfg.MODEL.ROI_BOX_HEAD
    if node.POOLER_TYPE in PYRAMIDS and (node.NUM_CONV > 0 or node.NUM_FC < 1):
        raise InputError(
            f"MODEL.ROI_BOX_HEAD.POOLER_TYPE {node.POOLER_TYPE!r} puts out bins of several sizes, "
            "which fully connected layers read and convolutions cannot: set NUM_CONV 0 and NUM_FC "
            f"to 1 or more, but they are {node.NUM_CONV} and {node.NUM_FC}."
        )


def _require_no_pyramid(cfg, node: str, is_on: bool) -> None:
    kind = cfg.MODEL[node].POOLER_TYPE
    if is_on and kind in PYRAMIDS:
        raise InputError(
            f"MODEL.{node}.POOLER_TYPE is {kind!r}, whose bins of several sizes make no map: "
            "only box heads take it. Set 'PrRoIPool' or 'ROIAlignV2'."
        )
