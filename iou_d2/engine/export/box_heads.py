"""What R-CNN heads say of boxes, for the boxes of all images in one tensor.

Shape letters: N images, R boxes of all images, K classes, C the boxes of a proposal: K, or 1 where
one serves all classes. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
)
from torch import Tensor

from iou_d2.detectors.faster_rcnn import (
    BoxLossCascadeROIHeads,
    BoxLossOutputLayers,
    BoxLossROIHeads,
    mean_of_probabilities,
    probabilities_of_mean,
)
from iou_d2.detectors.iou_net import IoUNetCascadeROIHeads, IoUNetROIHeads
from iou_d2.detectors.res5_heads import BoxLossRes5ROIHeads, MeanOfRes5
from iou_d2.errors import InputError

from .candidates import clip
from .pooling import Pooling, pooling_of, require_pooler

STANDARD = (StandardROIHeads, BoxLossROIHeads, IoUNetROIHeads)
CASCADE = (CascadeROIHeads, BoxLossCascadeROIHeads, IoUNetCascadeROIHeads)
RES5 = (Res5ROIHeads, BoxLossRes5ROIHeads)
KNOWN = STANDARD + CASCADE + RES5


class Regions(NamedTuple):
    """Boxes of images to pool from."""

    boxes: Tensor  # (R, 4)
    images: Tensor  # (R,) int64, of which image each is
    size: tuple[int, int]  # height and width of the images without padding


class Regressed(NamedTuple):
    """What a box head says of R regions."""

    boxes: Tensor  # (R, C, 4), not cut at the edges
    probabilities: Tensor  # (R, K + 1), the background last


class BoxParts(NamedTuple):
    """Of ROI heads."""

    in_features: Sequence[str]
    pooler: ROIPooler
    heads: Sequence[Callable[[Tensor], Tensor]]  # of each stage, what is pooled -> what predicts
    predictors: Sequence[FastRCNNOutputLayers]  # of each stage


# Logits (R, K + 1) of the stages of a cascade -> probabilities (R, K + 1).
MEANS: dict[Callable, Callable[[Sequence[Tensor]], Tensor]] = {
    mean_of_probabilities: lambda logits: sum(x.softmax(dim=-1) for x in logits) / len(logits),
    probabilities_of_mean: lambda logits: (sum(logits) / len(logits)).softmax(dim=-1),
}


def require_box_heads(heads: ROIHeads) -> None:
    """Raise an InputError where `regress` does not know what `heads` do."""
    if type(heads) not in KNOWN:
        known = ", ".join(kind.__name__ for kind in KNOWN)
        raise InputError(
            f"MODEL.ROI_HEADS.NAME {type(heads).__name__} cannot be exported: only {known} can."
        )
    parts = box_parts_of(heads)
    for predictor in parts.predictors:
        if type(predictor) not in (FastRCNNOutputLayers, BoxLossOutputLayers):
            raise InputError(f"The predictor {type(predictor).__name__} cannot be exported.")
        if getattr(predictor, "use_sigmoid_ce", False):
            raise InputError(
                "Class scores by a sigmoid cannot be exported: MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE."
            )
    require_pooler(parts.pooler, "MODEL.ROI_BOX_HEAD.POOLER_TYPE")


def box_parts_of(heads: ROIHeads) -> BoxParts:
    """The parts of heads of a kind that is in KNOWN."""
    if type(heads) in RES5:
        box_heads = [MeanOfRes5(heads.res5)]
        return BoxParts(heads.in_features, heads.pooler, box_heads, [heads.box_predictor])
    where = heads.box_in_features, heads.box_pooler
    if type(heads) in CASCADE:
        return BoxParts(*where, list(heads.box_head), list(heads.box_predictor))
    return BoxParts(*where, [heads.box_head], [heads.box_predictor])


def box_pooling_of(heads: ROIHeads, features: dict[str, Tensor]) -> Pooling:
    """What the box heads pool from the features of the backbone."""
    parts = box_parts_of(heads)
    return pooling_of(parts.pooler, [features[name] for name in parts.in_features])


def regress(heads: ROIHeads, pooling: Pooling, regions: Regions) -> Regressed:
    """As the `regress` of the heads of detectors/faster_rcnn.py."""
    parts = box_parts_of(heads)
    boxes, stages = regions.boxes[:, None], []
    for box_head, predictor in zip(parts.heads, parts.predictors):
        if stages:
            boxes = clip(boxes, regions.size)
        proposals = boxes[:, 0]
        logits, deltas = predictor(box_head(pooling(proposals, regions.images)))
        boxes = predictor.box2box_transform.apply_deltas(deltas, proposals)
        boxes = boxes.view(deltas.shape[0], deltas.shape[1] // 4, 4)
        stages.append(logits)
    # Detectron2's own cascade has no such part.
    mean = getattr(heads, "score_mean", mean_of_probabilities)
    return Regressed(boxes, MEANS[mean](stages))
