"""From class scores and boxes to detections: NMS on all, the best by score, refinement.

Shape letters: N images, R boxes of an image, K classes, S candidates of an image, C channels. Boxes
are XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.ops.nms import iou_guided_nms, soft_nms
from iou_d2.ops.refine import leave_inference_mode, refine_boxes

NMS_TYPES = ("plain", "guided", "soft_linear", "soft_gaussian")
RANKINGS = ("iou", "score", "product")


def select_boxes(
    boxes: Tensor, probabilities: Tensor, image_size: tuple[int, int], threshold: float
) -> Instances:
    """The boxes of one image whose class score is over `threshold`, as Detectron2 selects them.

    Args:
        boxes: (R, 4) or (R, 4K). Rows that are not finite are left out.
        probabilities: (R, K + 1), the background last.
        image_size: (height, width), to which boxes are clipped.
        threshold: of the class score.

    Returns:
        S instances with `pred_boxes`, `scores` and `pred_classes`; a box counts once a class.
    """
    finite = boxes.isfinite().all(dim=1) & probabilities.isfinite().all(dim=1)
    boxes, probabilities = boxes[finite], probabilities[finite, :-1]
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(image_size)
    clipped = clipped.tensor.view(len(boxes), boxes.shape[1] // 4, 4)  # (R, 1 or K, 4)
    row, classes = (probabilities > threshold).nonzero(as_tuple=True)
    return Instances(
        image_size,
        pred_boxes=Boxes(clipped[row, classes if clipped.shape[1] > 1 else 0]),
        scores=probabilities[row, classes],
        pred_classes=classes,
    )


class Postprocessor:
    """NMS -> the best by score -> refinement, for all images of a batch.

    With `nms="plain"`, `refine_steps=0` and `score_times_iou=False` the boxes, scores and classes
    are those of Detectron2's Fast R-CNN inference, to the last bit.
    """

    def __init__(
        self,
        *,
        nms: str = "guided",
        rank_by: str = "iou",
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        refine_by: str = "ascent",
        refine_steps: int = 5,
        step_size: float = 0.5,
        early_stop: float = 0.001,
        max_drop: float = -0.01,
        roll_back: bool = False,
        score_times_iou: bool = False,
    ):
        """
        Args:
            nms: "plain", "guided", "soft_linear" or "soft_gaussian".
            rank_by: what ranks boxes in guided NMS: "iou", "score" or "product".
            nms_threshold: IoU over which a box is suppressed, or under linear Soft-NMS demoted.
            max_detections: boxes that an image keeps after NMS; negative for all.
            refine_by: "ascent" on the predicted IoU or, to compare with, "regression": the box head
                applied again.
            refine_steps: how often; 0 for no refinement.
            step_size, early_stop, max_drop, roll_back: of the ascent, see `refine_boxes`.
            score_times_iou: multiply the final score by the predicted IoU.
        """
        if nms not in NMS_TYPES:
            raise ValueError(f"MODEL.IOU_NET.NMS is one of {NMS_TYPES}, but it is {nms!r}.")
        if rank_by not in RANKINGS:
            raise ValueError(f"MODEL.IOU_NET.RANK_BY is one of {RANKINGS}, but it is {rank_by!r}.")
        if refine_by not in ("ascent", "regression"):
            raise ValueError(
                f"MODEL.IOU_NET.REFINE_BY is 'ascent' or 'regression', but it is {refine_by!r}."
            )
        self.nms = nms
        self.rank_by = rank_by
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.refine_by = refine_by
        self.refine_steps = refine_steps
        self.ascent = {
            "step_size": step_size,
            "early_stop": early_stop,
            "max_drop": max_drop,
            "roll_back": roll_back,
        }
        self.score_times_iou = score_times_iou

    @torch.no_grad()
    def __call__(
        self,
        candidates: list[Instances],
        branch: nn.Module,
        features: list[Tensor],
        regress: Callable[[list[Instances]], None],
    ) -> list[Instances]:
        """The detections of N images, best first.

        Args:
            candidates: N times `pred_boxes`, `scores` (class scores) and `pred_classes`.
            branch: predicts IoUs, see IoUBranch.
            features: maps of the levels that the branch pools from, (N, C, H, W) each.
            regress: replaces the `pred_boxes` of N detections by what the box head makes of them.

        Returns:
            N Instances with the fields of `candidates`, `cls_scores` (the class score after NMS)
            and `pred_ious` (in [0, 1], of the final box).
        """
        if self.nms == "guided" and self.rank_by != "score":
            self._predict(candidates, branch, features)
        detections = [self._suppress(instances) for instances in candidates]
        if self.refine_steps and self.refine_by == "ascent":
            self._ascend(detections, branch, features)
        else:
            for _ in range(self.refine_steps):
                regress(detections)
            self._predict(detections, branch, features)
        return [self._score(instances) for instances in detections]

    def _predict(self, candidates: list[Instances], branch, features: list[Tensor]) -> None:
        """Set `pred_ious` of the instances of all images."""
        boxes = [x.pred_boxes for x in candidates]
        classes = torch.cat([x.pred_classes for x in candidates])
        ious = branch.predict(features, boxes, classes)
        _distribute(candidates, pred_ious=ious)

    def _suppress(self, candidates: Instances) -> Instances:
        boxes, classes = candidates.pred_boxes.tensor, candidates.pred_classes
        scores = candidates.scores
        if self.nms == "plain":
            keep = batched_nms(boxes, scores, classes, self.nms_threshold)
            scores = scores[keep]
        elif self.nms == "guided":
            keep, scores = iou_guided_nms(
                boxes, scores, self._rank(candidates), classes, self.nms_threshold
            )
        else:
            method = self.nms[len("soft_") :]
            keep, scores = soft_nms(boxes, scores, classes, method, threshold=self.nms_threshold)
        best = scores.sort(descending=True, stable=True).indices
        if self.max_detections >= 0:
            best = best[: self.max_detections]
        detections = candidates[keep[best]]
        detections.scores = scores[best]
        return detections

    def _rank(self, candidates: Instances) -> Tensor:
        if self.rank_by == "score":
            return candidates.scores
        if self.rank_by == "iou":
            return candidates.pred_ious
        return candidates.scores * candidates.pred_ious.clamp(min=0)

    def _ascend(self, detections: list[Instances], branch, features: list[Tensor]) -> None:
        """Move the boxes of all images, as one tensor; a box keeps its class and pyramid level."""
        features = [leave_inference_mode(feature.float()) for feature in features]
        box_lists = [x.pred_boxes for x in detections]
        levels = leave_inference_mode(branch.pooler.assign_levels(box_lists))
        classes = leave_inference_mode(torch.cat([x.pred_classes for x in detections]))
        boxes = torch.cat([x.tensor for x in box_lists])
        counts = [len(x) for x in detections]
        sizes = boxes.new_tensor([x.image_size[::-1] for x in detections]).view(-1, 2)
        image = torch.arange(len(detections)).repeat_interleave(torch.tensor(counts))
        image = image.to(boxes.device)

        def score(moved: Tensor, index: Tensor) -> Tensor:
            moving = image[index].bincount(minlength=len(detections)).tolist()
            lists = [Boxes(x) for x in moved.split(moving)]
            return branch.predict(features, lists, classes[index], levels[index])

        boxes, ious = refine_boxes(
            boxes, score, sizes[image], steps=self.refine_steps, **self.ascent
        )
        _distribute(detections, pred_boxes=boxes, pred_ious=ious)

    def _score(self, detections: Instances) -> Instances:
        detections.cls_scores = detections.scores
        detections.pred_ious = detections.pred_ious.clamp(0, 1)
        if not self.score_times_iou:
            return detections
        detections.scores = detections.scores * detections.pred_ious
        return detections[detections.scores.sort(descending=True, stable=True).indices]


def _distribute(instances: Sequence[Instances], **fields: Tensor) -> None:
    """Set fields of the instances of all images from tensors that hold them one after another."""
    counts = [len(x) for x in instances]
    for name, value in fields.items():
        for x, part in zip(instances, value.split(counts)):
            x.set(name, Boxes(part) if name == "pred_boxes" else part)
