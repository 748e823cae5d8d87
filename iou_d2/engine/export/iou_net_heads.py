"""From what a box head says of proposals to the detections of IoU-Net: NMS and refinement.

Shape letters: N images, P proposals of an image, K classes, C the boxes of a proposal, R boxes of
all images. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iou_d2.detectors.iou_net import BOX_CHOICES, IoUNetCascadeROIHeads, IoUNetROIHeads
from iou_d2.detectors.iou_net_inference import GradientAscent, IteratedRegression, Postprocessor
from iou_d2.detectors.iou_net_nms import GuidedNMS, PlainNMS
from iou_d2.errors import InputError

from .ascent import refined
from .box_heads import Regions, Regressed, regress
from .candidates import Candidates, best, clip
from .fast_rcnn import candidates_of
from .guided_nms import guided_nms, plain_nms
from .pooling import PrecisePooling
from .predicted_iou import PredictedIoU


class IoUNet:
    """What the Postprocessor of IoU-Net does at test time."""

    doubtful = 0.0

    def __init__(self, heads: IoUNetROIHeads | IoUNetCascadeROIHeads):
        """Raises InputError, with the key to change, where a part is one that no graph can hold."""
        _require_known_parts(heads.postprocessor)
        self.heads = heads
        self.postprocessor: Postprocessor = heads.postprocessor
        self.predict = PredictedIoU(heads.iou_branch)
        self.num_classes = heads.num_classes
        self.threshold = heads.score_threshold

    @property
    def score(self) -> str:
        """What the scores are."""
        is_product = self.postprocessor.score_times_iou
        return "cls_scores * pred_ious" if is_product else "class probability"

    def candidates(
        self, regressed: Regressed, regions: Regions, there: Tensor, pooling: PrecisePooling
    ) -> Candidates:
        """What NMS is given, see `candidates_of`; with `pred_ious` where it asks for them."""
        if self.heads.box_choice is BOX_CHOICES["best_class"]:
            regressed = regressed._replace(boxes=_of_best_class(*regressed))
        return self.with_ious(candidates_of(regressed, regions, there, self.threshold), pooling)

    def with_ious(self, found: Candidates, pooling: PrecisePooling) -> Candidates:
        """Candidates with the `pred_ious` that `detect` wants of them."""
        if not self.postprocessor.nms.needs_ious:
            return found
        index, boxes, classes, images = self.listed(found)
        predicted = self.predict(pooling.table, boxes, images, classes)
        ious = self.postprocessor.calibration(predicted)
        return found._replace(fields={"pred_ious": _unlisted(ious, index, found.scores)})

    def detect(
        self, candidates: Candidates, size: tuple[int, int], pooling: PrecisePooling
    ) -> Candidates:
        """The best that NMS leaves, moved by the refiner, in the order of their class scores."""
        limit = self.postprocessor.max_detections
        limit = candidates.scores.shape[1] if limit < 0 else limit
        found = best(self.suppress(candidates)._replace(fields={}), limit)
        index, boxes, classes, images = self.listed(found)
        boxes, predicted = self.refine(boxes, classes, images, size, pooling)
        ious = self.postprocessor.calibration(predicted.clamp(0, 1))
        ious = _unlisted(ious, index, found.scores)
        boxes = torch.stack([_unlisted(x, index, found.scores) for x in boxes.unbind(1)], dim=-1)
        scores = found.scores * ious if self.postprocessor.score_times_iou else found.scores
        # A score of 0 would say that there is none.
        scores = scores.clamp(min=torch.finfo(scores.dtype).tiny) * (found.scores > 0)
        fields = {"cls_scores": found.scores, "pred_ious": ious}
        return Candidates(boxes, scores, found.classes, fields)

    def suppress(self, candidates: Candidates) -> Candidates:
        """With the new scores of those that NMS keeps; the others are made none."""
        nms = self.postprocessor.nms
        index, boxes, classes, images = self.listed(candidates)
        scores = candidates.scores.reshape(-1)[index]
        groups = images * self.num_classes + classes
        number = candidates.scores.shape[0] * self.num_classes
        if isinstance(nms, PlainNMS):
            keep, scores = plain_nms(boxes, scores, groups, number, nms.threshold)
        else:
            ranks = scores
            if nms.ranking is not None:
                ranks = nms.ranking(scores, candidates.fields["pred_ious"].reshape(-1)[index])
            keep, scores = guided_nms(boxes, scores, ranks, groups, number, nms.threshold)
        return candidates._replace(scores=_unlisted(scores, index[keep], candidates.scores))

    def refine(
        self,
        boxes: Tensor,
        classes: Tensor,
        images: Tensor,
        size: tuple[int, int],
        pooling: PrecisePooling,
    ) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) of these classes and images (R,), moved, and their predicted IoUs (R,)."""
        refiner = self.postprocessor.refiner
        if isinstance(refiner, GradientAscent):
            one = torch.ones_like(boxes[:, :1])
            limits = torch.cat([one * size[1], one * size[0]], dim=1)
            return refined(self.predict, refiner, pooling.table, boxes, images, classes, limits)
        for _ in range(refiner.steps if refiner else 0):
            regressed = regress(self.heads, pooling, Regions(boxes, images, size)).boxes
            boxes = clip(_of_class(regressed, classes), size)
        return boxes, self.predict(pooling.table, boxes, images, classes)

    def listed(self, candidates: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of N images that there are, one after another: their index (R,) among all, boxes
        (R, 4), classes (R,) and images (R,)."""
        index = torch.nonzero(candidates.scores.reshape(-1) > 0).squeeze(1)
        images = torch.div(index, candidates.scores.shape[1], rounding_mode="floor")
        return (
            index,
            candidates.boxes.reshape(-1, 4)[index],
            candidates.classes.reshape(-1)[index],
            images,
        )


def _unlisted(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """`values` (R,) at the places `index` of a tensor of the shape of `like`, 0 elsewhere."""
    return torch.zeros_like(like).reshape(-1).scatter(0, index, values).view_as(like)


def _of_best_class(boxes: Tensor, probabilities: Tensor) -> Tensor:
    """(R, C, 4), (R, K + 1) -> (R, 1, 4)"""
    if boxes.shape[1] == 1:
        return boxes
    return _of_class(boxes, probabilities[:, :-1].argmax(dim=1))[:, None]


def _of_class(boxes: Tensor, classes: Tensor) -> Tensor:
    """(R, C, 4), (R,) -> (R, 4)"""
    if boxes.shape[1] == 1:
        return boxes[:, 0]
    return boxes.gather(1, classes[:, None, None].expand(-1, 1, 4)).squeeze(1)


def _require_known_parts(postprocessor: Postprocessor) -> None:
    if type(postprocessor.nms) not in (PlainNMS, GuidedNMS):
        raise InputError(
            f"{type(postprocessor.nms).__name__} is a loop that no graph can hold: set "
            "MODEL.IOU_NET.NMS guided or plain to export this detector."
        )
    if type(postprocessor.refiner) not in (type(None), GradientAscent, IteratedRegression):
        raise InputError(f"{type(postprocessor.refiner).__name__} cannot be exported.")
