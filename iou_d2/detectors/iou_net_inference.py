"""From the candidates of IoU-Net to detections: NMS on all, the best by score, refinement.

Shape letters: N images, R candidates of an image, K classes, S kept ones, C channels. Boxes are
XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from iou_d2.errors import InputError
from iou_d2.ops.calibration import Calibration, as_predicted
from iou_d2.ops.refine import Observer, leave_inference_mode, refine_boxes

from .calibration import build_calibration
from .dense import first, part_named
from .iou_net_nms import NMS, build_nms
from .pooler import LayerPooler


def select_boxes(
    boxes: Tensor, probabilities: Tensor, image_size: tuple[int, int], threshold: float
) -> Instances:
    """The boxes of one image whose class score is over `threshold`, as Detectron2 selects them.

    Args:
        boxes: (M, 4) or (M, 4K). Rows that are not finite are left out.
        probabilities: (M, K + 1), the background last.
        image_size: (height, width), to which boxes are clipped.
        threshold: of the class score.

    Returns:
        R instances with `pred_boxes`, `scores` and `pred_classes`; a box counts once a class.
    """
    finite = boxes.isfinite().all(dim=1) & probabilities.isfinite().all(dim=1)
    boxes, probabilities = boxes[finite], probabilities[finite, :-1]
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(image_size)
    clipped = clipped.tensor.view(len(boxes), boxes.shape[1] // 4, 4)  # (M, 1 or K, 4)
    row, classes = (probabilities > threshold).nonzero(as_tuple=True)
    return Instances(
        image_size,
        pred_boxes=Boxes(clipped[row, classes if clipped.shape[1] > 1 else 0]),
        scores=probabilities[row, classes],
        pred_classes=classes,
    )


# Replaces the `pred_boxes` of the detections of N images by what the box head makes of them.
Regress = Callable[[list[Instances]], None]


class Refiner(Protocol):
    """Moves the boxes of the detections of N images, and sets their `pred_ious`, in place."""

    def __call__(
        self,
        detections: list[Instances],
        branch: Branch,
        features: list[Tensor],
        regress: Regress | None = None,
    ) -> None:
        """The arguments are those of Postprocessor."""


@dataclass(frozen=True)
class GradientAscent:
    """Ascent on the predicted IoU (Algorithm 2); a box keeps its class and its pyramid level.

    Args:
        steps, step_size, early_stop, max_drop, roll_back, observe: see `refine_boxes`.
    """

    steps: int = 5
    step_size: float = 0.5
    early_stop: float = 0.001
    max_drop: float = -0.01
    roll_back: bool = False
    observe: Observer | None = None

    def __call__(self, detections, branch, features, regress=None) -> None:
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
            some = len(index) < len(image)
            shares = image[index].bincount(minlength=len(counts)).tolist() if some else counts
            lists = [Boxes(x) for x in moved.split(shares)]
            return branch.predict(features, lists, classes[index], levels[index])

        boxes, ious = refine_boxes(
            boxes,
            score,
            sizes[image],
            steps=self.steps,
            step_size=self.step_size,
            early_stop=self.early_stop,
            max_drop=self.max_drop,
            roll_back=self.roll_back,
            observe=self.observe,
        )
        _distribute(detections, pred_boxes=boxes, pred_ious=ious)


@dataclass(frozen=True)
class IteratedRegression:
    """The box head applied `steps` times again: the rival of the ascent in the paper."""

    steps: int

    def __call__(self, detections, branch, features, regress) -> None:
        for _ in range(self.steps):
            regress(detections)
        predict_ious(detections, branch, features)


class Branch(Protocol):
    """What predicts IoUs: see IoUBranch. GradientAscent needs its `pooler` to keep levels."""

    pooler: LayerPooler

    def predict(
        self,
        features: list[Tensor],
        boxes: list[Boxes],
        classes: Tensor,
        levels: Tensor | None = None,
    ) -> Tensor: ...


def predict_ious(instances: list[Instances], branch: Branch, features: list[Tensor]) -> None:
    """Set `pred_ious` of the instances of N images, which have `pred_boxes` and `pred_classes`."""
    boxes = [x.pred_boxes for x in instances]
    classes = torch.cat([x.pred_classes for x in instances])
    _distribute(instances, pred_ious=branch.predict(features, boxes, classes))


@dataclass(frozen=True)
class Postprocessor:
    """NMS -> the best by score -> refinement, for all images of a batch.

    With a PlainNMS, without a refiner and with `score_times_iou=False` the boxes, scores and
    classes are those of Detectron2's Fast R-CNN inference, to the last bit.

    Args:
        nms: which candidates are kept.
        max_detections: boxes that an image keeps after NMS; negative for all.
        refiner: what moves them then; None leaves them where they are.
        score_times_iou: multiply the final score by the predicted IoU.
        calibration: what a predicted IoU counts for in NMS and in detections; refinement is by the
            IoU as it is predicted.
    """

    nms: NMS
    max_detections: int = 100
    refiner: Refiner | None = None
    score_times_iou: bool = False
    calibration: Calibration = as_predicted

    @torch.no_grad()
    def __call__(
        self,
        candidates: list[Instances],
        branch: Branch,
        features: list[Tensor],
        regress: Regress | None = None,
    ) -> list[Instances]:
        """The detections of N images, best first.

        Args:
            candidates: N times `pred_boxes`, `scores` (class scores) and `pred_classes`.
            branch: predicts IoUs.
            features: maps of the levels that the branch pools from, (N, C, H, W) each.
            regress: what an IteratedRegression moves boxes by.

        Returns:
            N Instances with the fields of `candidates`, `cls_scores` (the score after NMS: of
            the class, but for a SoftNMS of products) and `pred_ious` (in [0, 1], of the final box).
        """
        if self.nms.needs_ious:
            self.judge(candidates, branch, features)
        detections = [self.suppress(instances) for instances in candidates]
        self.refine(detections, branch, features, regress)
        return [self.score(instances) for instances in detections]

    def judge(self, candidates: list[Instances], branch: Branch, features: list[Tensor]) -> None:
        """Set the `pred_ious` of the candidates of N images, calibrated; 0 where it does not matter
        to what `suppress` returns, so that only few boxes are pooled. On a GPU all are: choosing
        launches more than it saves."""
        if any(x.pred_boxes.device.type == "cuda" for x in candidates):
            needed = [slice(None)] * len(candidates)
        else:
            needed = [self.nms.needs_iou(x, self.max_detections) for x in candidates]
        judged = [x[index] for x, index in zip(candidates, needed)]
        predict_ious(judged, branch, features)
        for x, index, some in zip(candidates, needed, judged):
            x.pred_ious = some.pred_ious.new_zeros(len(x))
            x.pred_ious[index] = self.calibration(some.pred_ious)

    def suppress(self, candidates: Instances) -> Instances:
        """The candidates of one image that stay, best first."""
        keep, scores = self.nms(candidates)
        best = scores.sort(descending=True, stable=True).indices
        detections = candidates[keep[best]]
        detections.scores = scores[best]
        return first(detections, self.max_detections)

    def refine(
        self,
        detections: list[Instances],
        branch: Branch,
        features: list[Tensor],
        regress: Regress | None = None,
    ) -> None:
        """Move the boxes of N images, where there is a refiner, and set their `pred_ious`."""
        if self.refiner is None:
            predict_ious(detections, branch, features)
        else:
            self.refiner(detections, branch, features, regress)

    def score(self, detections: Instances) -> Instances:
        """The detections of one image with their final scores, best first."""
        detections.cls_scores = detections.scores
        detections.pred_ious = self.calibration(detections.pred_ious.clamp(0, 1))
        if not self.score_times_iou:
            return detections
        detections.scores = detections.scores * detections.pred_ious
        return detections[detections.scores.sort(descending=True, stable=True).indices]


def build_postprocessor(cfg) -> Postprocessor:
    """The Postprocessor that MODEL.IOU_NET asks for."""
    return Postprocessor(
        nms=build_nms(cfg),
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        refiner=_build_refiner(cfg.MODEL.IOU_NET),
        score_times_iou=cfg.MODEL.IOU_NET.SCORE_TIMES_IOU,
        calibration=build_calibration(cfg),
    )


def _build_refiner(node) -> Refiner | None:
    if node.REFINE_STEPS < 0:
        raise InputError(
            f"MODEL.IOU_NET.REFINE_STEPS is at least 0, but it is {node.REFINE_STEPS}."
        )
    ascent = GradientAscent(
        steps=node.REFINE_STEPS,
        step_size=node.REFINE_STEP_SIZE,
        early_stop=node.REFINE_EARLY_STOP,
        max_drop=node.REFINE_MAX_DROP,
        roll_back=node.REFINE_ROLL_BACK,
    )
    parts = {"ascent": ascent, "regression": IteratedRegression(node.REFINE_STEPS)}
    refiner = part_named(parts, node.REFINE_BY, "MODEL.IOU_NET.REFINE_BY")
    return refiner if node.REFINE_STEPS else None


def _distribute(instances: Sequence[Instances], **fields: Tensor) -> None:
    """Set fields of the instances of all images from tensors that hold them one after another."""
    counts = [len(x) for x in instances]
    for name, value in fields.items():
        for x, part in zip(instances, value.split(counts)):
            x.set(name, Boxes(part) if name == "pred_boxes" else part)
