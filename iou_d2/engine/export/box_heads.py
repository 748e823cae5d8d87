"""What R-CNN heads say of boxes, for the boxes of all images in one tensor.

Shape letters: N images, R boxes of all images, K classes, C the boxes of a proposal: K, or 1 where
one serves all classes. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
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
from iou_d2.errors import InputError

from .candidates import clip
from .pooling import Pooling, pooling_of, require_pooler

STANDARD = (StandardROIHeads, BoxLossROIHeads, IoUNetROIHeads)
CASCADE = (CascadeROIHeads, BoxLossCascadeROIHeads, IoUNetCascadeROIHeads)


class Regions(NamedTuple):
    """Boxes of images to pool from."""

    boxes: Tensor  # (R, 4)
    images: Tensor  # (R,) int64, of which image each is
    size: tuple[int, int]  # height and width of the images without padding


class Regressed(NamedTuple):
    """What a box head says of R regions."""

    boxes: Tensor  # (R, C, 4), not cut at the edges
    probabilities: Tensor  # (R, K + 1), the background last


# Logits (R, K + 1) of the stages of a cascade -> probabilities (R, K + 1).
MEANS: dict[Callable, Callable[[Sequence[Tensor]], Tensor]] = {
    mean_of_probabilities: lambda logits: sum(x.softmax(dim=-1) for x in logits) / len(logits),
    probabilities_of_mean: lambda logits: (sum(logits) / len(logits)).softmax(dim=-1),
}


def require_box_heads(heads: ROIHeads) -> None:
    """Raise an InputError where `regress` does not know what `heads` do."""
    if type(heads) not in STANDARD + CASCADE:
        known = ", ".join(kind.__name__ for kind in STANDARD + CASCADE)
        raise InputError(
            f"MODEL.ROI_HEADS.NAME {type(heads).__name__} cannot be exported: only {known} can."
        )
    for predictor in predictors_of(heads):
        if type(predictor) not in (FastRCNNOutputLayers, BoxLossOutputLayers):
            raise InputError(f"The predictor {type(predictor).__name__} cannot be exported.")
        if getattr(predictor, "use_sigmoid_ce", False):
            raise InputError(
                "Class scores by a sigmoid cannot be exported: MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE."
            )
    require_pooler(heads.box_pooler, "MODEL.ROI_BOX_HEAD.POOLER_TYPE")


def predictors_of(heads: ROIHeads) -> list[FastRCNNOutputLayers]:
    """Of each stage."""
    return list(heads.box_predictor) if type(heads) in CASCADE else [heads.box_predictor]


def box_pooling_of(heads: ROIHeads, features: dict[str, Tensor]) -> Pooling:
    """What the box heads pool from the features of the backbone."""
    return pooling_of(heads.box_pooler, [features[name] for name in heads.box_in_features])


def regress(heads: ROIHeads, pooling: Pooling, regions: Regions) -> Regressed:
    """As the `regress` of the heads of detectors/faster_rcnn.py."""
    box_heads = heads.box_head if type(heads) in CASCADE else [heads.box_head]
    boxes, stages = regions.boxes[:, None], []
    for box_head, predictor in zip(box_heads, predictors_of(heads)):
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
