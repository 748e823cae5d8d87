"""Whether what a file detects is what its model detects.

Shape letters: D detections of an image. Boxes are XYXY in pixels of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn

# By how much the score of a detection may differ that only one of both has, because the other put
# it behind the last one or below the threshold.
AT_THE_EDGE = 1e-4
# Two boxes are one detection if no side is so many pixels apart, nor the scores by so much.
SAME_BOX, SAME_SCORE = 0.5, 0.01


class Agreement(NamedTuple):
    """How two sets of detections agree, over some images."""

    pairs: int  # detections that both have
    missing: int  # that only the model has, without those at the edge
    extra: int  # that only the file has, without those at the edge
    boxes: float  # the largest difference of a pair in pixels
    scores: float  # and of its scores, its other fields and the probabilities of its mask

    def joined(self, other: Agreement) -> Agreement:
        """Of both sets of images."""
        return Agreement(
            self.pairs + other.pairs,
            self.missing + other.missing,
            self.extra + other.extra,
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
        )

    def __str__(self) -> str:
        return (
            f"boxes within {self.boxes:.1e} px, scores within {self.scores:.1e}, {self.missing} "
            f"missing, {self.extra} more"
        )

    def holds(self, doubtful: float = 0.0, pixels: float = 0.05, scores: float = 1e-4) -> bool:
        """Whether all differences are within these, and no more than the share `doubtful` of the
        detections are in one set alone."""
        alone = self.missing + self.extra
        return (
            alone <= doubtful * (2 * self.pairs + alone)
            and self.boxes <= pixels
            and self.scores <= scores
        )


NOTHING = Agreement(0, 0, 0, 0.0, 0.0)


@torch.no_grad()
def detections_of_model(detector: nn.Module, images: Tensor) -> list[dict[str, np.ndarray]]:
    """What `detector`, in test mode, makes of images (N, 3, H, W): for each "boxes" (D, 4),
    "scores", "classes", its other fields (D,) and of Mask R-CNN "masks" (D, M, M)."""
    inputs = [{"image": image} for image in images]
    return [arrays_of(instances) for instances in _instances_of_model(detector, inputs)]


def arrays_of(instances: Instances) -> dict[str, np.ndarray]:
    """The fields of detections, as `detections_of_model` has them."""
    fields = instances.to("cpu").get_fields()
    if "pred_masks" in fields:
        fields["masks"] = fields.pop("pred_masks").squeeze(1)
    boxes, classes = fields.pop("pred_boxes").tensor, fields.pop("pred_classes")
    fields = {"boxes": boxes, "classes": classes, **fields}
    return {name: value.numpy() for name, value in fields.items()}


def _instances_of_model(detector: nn.Module, inputs: list[dict]) -> list[Instances]:
    """With masks as probabilities in their box, which the model itself draws into the image."""
    if not (isinstance(detector, GeneralizedRCNN) and detector.roi_heads.mask_on):
        return [output["instances"] for output in detector(inputs)]
    found = detector.inference(inputs, do_postprocess=False)
    return [instances[instances.pred_boxes.nonempty()] for instances in found]


def detections_of_outputs(
    names: Sequence[str], outputs: Sequence[np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """The outputs of a file with detections, named `names`, in the same form."""
    named = dict(zip(names, outputs))
    counts = named.pop("counts")
    return [
        {name: value[image][:count] for name, value in named.items()}
        for image, count in enumerate(counts)
    ]


def agreement(
    expected: Sequence[dict[str, np.ndarray]],
    found: Sequence[dict[str, np.ndarray]],
    limit: int,
    threshold: float,
) -> Agreement:
    """Match the detections of each image, whose order may differ where scores are equal.

    Args:
        expected: of the model.
        found: of the file.
        limit: detections of an image at most; negative for all.
        threshold: of the scores.
    """
    total = NOTHING
    for ours, theirs in zip(expected, found, strict=True):
        total = total.joined(_agreement_of_image(ours, theirs, limit, threshold))
    return total


def _agreement_of_image(ours: dict, theirs: dict, limit: int, threshold: float) -> Agreement:
    if ours.keys() != theirs.keys():
        raise ValueError(f"The model gives {sorted(ours)}, but the file {sorted(theirs)}.")
    free = np.ones(len(theirs["scores"]), dtype=bool)
    boxes = scores = 0.0
    missing = []
    for index in range(len(ours["scores"])):
        distance = _distances(ours, index, theirs, free)
        if not len(distance) or not np.isfinite(distance.min()):
            missing.append(ours["scores"][index])
            continue
        match = distance.argmin()
        free[match] = False
        boxes = max(boxes, float(np.abs(ours["boxes"][index] - theirs["boxes"][match]).max()))
        for name in ours.keys() - {"boxes", "classes"}:
            difference = np.abs(ours[name][index] - theirs[name][match]).max()
            scores = max(scores, float(difference))
    edges = [threshold]
    if 0 <= limit <= max(len(ours["scores"]), len(theirs["scores"])):
        edges += [min(x["scores"].min(initial=np.inf) for x in (ours, theirs))]
    extra = theirs["scores"][free]
    pairs = len(ours["scores"]) - len(missing)
    return Agreement(pairs, _inner(missing, edges), _inner(extra, edges), boxes, scores)


def _distances(ours: dict, index: int, theirs: dict, free: np.ndarray) -> np.ndarray:
    """How far each free detection of the same class and score is from one of ours, in pixels."""
    distance = np.abs(theirs["boxes"] - ours["boxes"][index]).max(axis=1, initial=0)
    same = theirs["classes"] == ours["classes"][index]
    same &= np.abs(theirs["scores"] - ours["scores"][index]) < SAME_SCORE
    return np.where(free & same & (distance < SAME_BOX), distance, np.inf)


def _inner(scores: Sequence[float], edges: Sequence[float]) -> int:
    """How many scores are at none of the edges."""
    return sum(all(abs(score - edge) > AT_THE_EDGE for edge in edges) for score in scores)
