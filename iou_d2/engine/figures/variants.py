"""The kinds of NMS that the figures compare. Each sees the same candidates of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor

from iou_d2.detectors.iou_net_inference import Postprocessor
from iou_d2.detectors.iou_net_nms import GuidedNMS, PlainNMS, SoftNMS

# What they are called in figures.json and in figures.
VARIANTS = {
    "none": "none",
    "nms": "NMS",
    "soft_nms": "Soft-NMS",
    "iou_nms": "IoU-guided NMS",
}


@dataclass(frozen=True)
class NoNMS:
    """All candidates are kept."""

    needs_ious = False

    def __call__(self, candidates: Instances) -> tuple[Tensor, Tensor]:
        scores = candidates.scores
        return torch.arange(len(scores), device=scores.device), scores


def suppressors(threshold: float, max_detections: int) -> dict[str, Postprocessor]:
    """The names of VARIANTS -> what has the kind of NMS.

    Args:
        threshold: an IoU over it suppresses; Soft-NMS is the Gaussian one, which has none.
        max_detections: that NMS leaves of an image; "none" leaves all.
    """
    return {
        "none": Postprocessor(NoNMS(), max_detections=-1),
        "nms": Postprocessor(PlainNMS(threshold), max_detections),
        "soft_nms": Postprocessor(SoftNMS("gaussian", threshold), max_detections),
        "iou_nms": Postprocessor(GuidedNMS(threshold), max_detections),
    }


def variants_of(candidates: Instances, kinds: dict[str, Postprocessor]) -> dict[str, Instances]:
    """What each of the `suppressors` leaves of the candidates of an image, best first; without
    those that need an IoU which the candidates do not have."""
    has_ious = candidates.has("pred_ious")
    return {
        name: kind.suppress(candidates)
        for name, kind in kinds.items()
        if has_ious or not kind.nms.needs_ious
    }
