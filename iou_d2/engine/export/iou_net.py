"""What IoU-Net does with candidates as a graph: NMS, the best by score, refinement.

Shape letters: N images, M candidates of an image, D detections of one, R boxes of all images. Boxes
are XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iou_d2.detectors.iou_branch import IoUBranch
from iou_d2.detectors.iou_net_inference import GradientAscent, IteratedRegression, Postprocessor
from iou_d2.detectors.iou_net_nms import GuidedNMS, PlainNMS
from iou_d2.errors import InputError

from .ascent import refined
from .candidates import Candidates, best, top, usable
from .guided_nms import guided_nms, plain_nms
from .predicted_iou import PredictedIoU
from .prroi_graph import FeatureTable

# What the box head makes of boxes (R, 4) with the numbers of their image and class, (R,) int64.
Regress = Callable[[Tensor, Tensor, Tensor], Tensor]


class IoUNetInference(nn.Module):
    """A Postprocessor for the candidates of N images of one size, in tensors of one length.

    A detection whose final score is 0 is none.
    """

    def __init__(
        self,
        branch: IoUBranch,
        postprocessor: Postprocessor,
        num_classes: int,
        regress: Regress | None = None,
    ):
        """
        Args:
            branch, postprocessor: what is to be a graph.
            num_classes: K.
            regress: what an IteratedRegression moves boxes by.

        Raises:
            InputError: where that has no graph, with the key to change.
        """
        super().__init__()
        nms, refiner = postprocessor.nms, postprocessor.refiner
        if not isinstance(nms, (PlainNMS, GuidedNMS)):
            raise InputError(
                f"{type(nms).__name__} is a loop that no graph can hold: set MODEL.IOU_NET.NMS "
                "'guided' or 'plain' to export this detector."
            )
        if isinstance(refiner, IteratedRegression) and regress is None:
            raise InputError(
                "Iterated regression is not exported here: set MODEL.IOU_NET.REFINE_BY 'ascent'."
            )
        self.predict = PredictedIoU(branch)
        self.nms = nms
        self.refiner = refiner
        self.max_detections = postprocessor.max_detections
        self.score_times_iou = postprocessor.score_times_iou
        self.num_classes = num_classes
        self.regress = regress

    def forward(
        self, table: FeatureTable, candidates: Candidates, size: tuple[int, int]
    ) -> Candidates:
        """Detections, best first.

        Args:
            table: of the maps that the branch pools from, see PredictedIoU.
            candidates: of which an image has M; boxes that are not finite are left out.
            size: (height, width) of the images without padding.

        Returns:
            Candidates of which an image has D, `max_detections` or else M; with the fields
            "cls_scores", the class score after NMS, and "pred_ious", in [0, 1], of the final box.
        """
        return self._refine(table, self._suppress(table, usable(candidates)), size)

    def _suppress(self, table: FeatureTable, candidates: Candidates) -> Candidates:
        """The best that NMS leaves."""
        slots, image = _those_there(candidates.scores)
        boxes, scores, classes = (x.flatten(0, 1)[slots] for x in candidates[:3])
        keep, scores = self._nms(table, boxes, scores, classes, image)
        boxes, classes, image = boxes[keep], classes[keep], image[keep]
        # Each image chooses among the kept ones of all.
        count, length = candidates.scores.shape
        length = length if self.max_detections < 0 else self.max_detections
        own = (image == torch.arange(count, device=image.device)[:, None]).to(scores.dtype)
        scores, index = top(own * scores, length)  # (N, D)
        slots, _ = _those_there(scores)
        chosen = index.flatten()[slots]
        return Candidates(
            _filled(boxes[chosen], scores), scores, _filled(classes[chosen], scores), {}
        )

    def _nms(
        self, table: FeatureTable, boxes: Tensor, scores: Tensor, classes: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        groups = image * self.num_classes + classes
        num_groups = table.images[0] * self.num_classes
        if isinstance(self.nms, PlainNMS):
            return plain_nms(boxes, scores, groups, num_groups, self.nms.threshold)
        ranks = scores
        if self.nms.ranking is not None:
            ranks = self.nms.ranking(scores, self.predict(table, boxes, image, classes))
        return guided_nms(boxes, scores, ranks, groups, num_groups, self.nms.threshold)

    def _refine(self, table: FeatureTable, found: Candidates, size: tuple[int, int]) -> Candidates:
        slots, image = _those_there(found.scores)
        boxes, classes = found.boxes.flatten(0, 1)[slots], found.classes.flatten()[slots]
        boxes, ious = self._moved(table, boxes, image, classes, size)
        ious = _filled(ious.clamp(0, 1), found.scores)
        scores = found.scores * ious if self.score_times_iou else found.scores
        fields = {"cls_scores": found.scores, "pred_ious": ious}
        boxes = _filled(boxes, found.scores)
        return best(Candidates(boxes, scores, found.classes, fields), scores.shape[1])

    def _moved(
        self,
        table: FeatureTable,
        boxes: Tensor,
        image: Tensor,
        classes: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) where the refiner leaves them, and their predicted IoUs (R,)."""
        if isinstance(self.refiner, GradientAscent):
            one = boxes.new_ones(1)
            limits = torch.stack([one * size[1], one * size[0]], dim=1)
            return refined(self.predict, self.refiner, table, boxes, image, classes, limits)
        for _ in range(self.refiner.steps if self.refiner else 0):
            boxes = self.regress(boxes, image, classes)
        return boxes, self.predict(table, boxes, image, classes)


def _those_there(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Where scores (N, M) are over 0, in one row (R,), and of which image those are (R,)."""
    slots = torch.nonzero(scores.flatten() > 0).squeeze(1)
    image = torch.arange(scores.shape[0], device=scores.device)[:, None].expand_as(scores)
    return slots, image.flatten()[slots]


def _filled(values: Tensor, scores: Tensor) -> Tensor:
    """Values (R, ...) of those that are there, in their places (N, M, ...), and 0 elsewhere."""
    there = (scores.flatten() > 0).to(torch.int64)
    with_none = torch.cat([values.new_zeros((1, *values.shape[1:])), values])
    return with_none[there.cumsum(0) * there].view(*scores.shape, *values.shape[1:])
