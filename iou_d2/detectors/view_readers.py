"""What kinds of detectors say of a view of an image, and what they make of all views together.

Shape letters: R proposals of a view, K classes, S candidates. Boxes are XYXY in pixels of a view.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor, nn

from iou_d2.errors import InputError

from .dense import DenseDetector
from .faster_rcnn import BoxLossCascadeROIHeads, BoxLossROIHeads
from .iou_net import IoUNetCascadeROIHeads, IoUNetRes5ROIHeads, IoUNetROIHeads
from .iou_net_inference import predict_ious, select_boxes
from .res5_heads import BoxLossRes5ROIHeads
from .views import View

# Heads whose boxes and class scores are known before NMS; those of IoU-Net are among them.
HEADS = (BoxLossROIHeads, BoxLossCascadeROIHeads, BoxLossRes5ROIHeads)
IOU_NET_HEADS = (IoUNetROIHeads, IoUNetCascadeROIHeads, IoUNetRes5ROIHeads)


@dataclass(frozen=True)
class Reading:
    """What a detector says of a view, before NMS.

    Args:
        view: it.
        candidates: what goes on to NMS, scored as the method scores, in pixels of the view.
        features: what the heads of an R-CNN pool from, where they will.
    """

    view: View
    candidates: list[Instances]
    features: dict[str, Tensor] = field(default_factory=dict)


class Reader(Protocol):
    """A detector, as test-time augmentation uses it."""

    def read(self, view: View, is_own: bool) -> Reading:
        """One view, as if it were an image of its own; `is_own`: detections will be in it."""

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        """NMS of the method over candidates in pixels of one view -> detections, best first."""

    def finish(self, detections: Instances, own: Reading, readings: Sequence[Reading]) -> Instances:
        """What follows NMS, for detections in pixels of the view of `own`, one of `readings`."""


class DenseReader:
    """Of a DenseDetector."""

    def __init__(self, detector: DenseDetector):
        self.detector = detector

    def read(self, view: View, is_own: bool) -> Reading:
        images = self.detector.preprocess_image([{"image": view.image}])
        predictions = self.detector.predict(images.tensor)
        (candidates,) = self.detector.image_candidates(predictions, images.image_sizes)
        return Reading(view, candidates)

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        return self.detector.suppress(candidates)

    def finish(self, detections: Instances, own: Reading, readings: Sequence[Reading]) -> Instances:
        return detections


class RCNNReader:
    """Of Faster, Mask and Cascade R-CNN: each view has its own proposals, of which the box head
    makes boxes and scores; masks are the mean over the views."""

    def __init__(self, detector: GeneralizedRCNN):
        self.detector = detector
        self.heads = detector.roi_heads

    @property
    def predictor(self) -> FastRCNNOutputLayers:
        """What has the thresholds; of a cascade, the last one."""
        layers = self.heads.box_predictor
        return layers[-1] if isinstance(self.heads, CascadeROIHeads) else layers

    def read(self, view: View, is_own: bool) -> Reading:
        images = self.detector.preprocess_image([{"image": view.image}])
        features = self.detector.backbone(images.tensor)
        proposals, _ = self.detector.proposal_generator(images, features, None)
        candidates = self.candidates(features, proposals)
        # Features of all views at once are many: only masks need them.
        return Reading(view, candidates, features if is_own or self.heads.mask_on else {})

    def candidates(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        regressed = self.heads.regress(features, proposals)
        sizes = [x.image_size for x in proposals]
        threshold = self.predictor.test_score_thresh
        return [select_boxes(*of_image, threshold) for of_image in zip(*regressed, sizes)]

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        found = Instances.cat(list(candidates))
        # Rows of one class each: `select` takes boxes (S, 4) and probabilities (S, K + 1).
        probabilities = found.scores.new_zeros(len(found), self.predictor.num_classes + 1)
        probabilities.scatter_(1, found.pred_classes[:, None], found.scores[:, None])
        boxes = [found.pred_boxes.tensor]
        (kept,), _ = self.predictor.select(boxes, [probabilities], [found.image_size])
        return kept

    def finish(self, detections: Instances, own: Reading, readings: Sequence[Reading]) -> Instances:
        if self.heads.mask_on:
            masks = [self.masks(own.view.instances_in(x.view, detections), x) for x in readings]
            detections.pred_masks = torch.stack(masks).mean(dim=0)
        return detections

    def masks(self, detections: Instances, reading: Reading) -> Tensor:
        """Probabilities (S, 1, M, M) of detections in pixels of a view, as if not mirrored."""
        (found,) = self.heads.forward_with_given_boxes(reading.features, [detections])
        masks = found.pred_masks
        return masks.flip(dims=[3]) if reading.view.is_mirrored else masks


class IoUNetReader(RCNNReader):
    """Of IoU-Net. A view predicts the IoUs of its own candidates, by which NMS ranks those of all.

    What is left is refined on one view, that of the size that the network was trained for: the mean
    of the predicted IoUs of all views would cost a gradient through each of them a step.
    """

    def candidates(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        candidates = self.heads.candidates(features, proposals)
        postprocessor = self.heads.postprocessor
        if postprocessor.nms.needs_ious:
            # Of all of them: which ones matter is known where the views are together.
            predict_ious(candidates, self.heads.iou_branch, self.heads.levels(features))
            for x in candidates:
                x.pred_ious = postprocessor.calibration(x.pred_ious)
        return candidates

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        return self.heads.postprocessor.suppress(Instances.cat(list(candidates)))

    def finish(self, detections: Instances, own: Reading, readings: Sequence[Reading]) -> Instances:
        heads, levels = self.heads, self.heads.levels(own.features)
        regress = functools.partial(heads.regress_again, own.features)
        heads.postprocessor.refine([detections], heads.iou_branch, levels, regress)
        return super().finish(heads.postprocessor.score(detections), own, readings)


def reader_of(detector: nn.Module) -> Reader:
    """The Reader of a detector. Raises an InputError for one whose views cannot be merged."""
    if isinstance(detector, DenseDetector):
        return DenseReader(detector)
    if not isinstance(detector, GeneralizedRCNN):
        raise InputError(
            f"TEST.AUG.ENABLED is True, but the views of a {type(detector).__name__} cannot be "
            "merged: set it to False."
        )
    heads = detector.roi_heads
    if not isinstance(heads, HEADS):
        raise InputError(
            f"TEST.AUG.ENABLED is True, but MODEL.ROI_HEADS.NAME is {type(heads).__name__}, whose "
            f"candidates are not known before NMS. {', '.join(x.__name__ for x in HEADS)} take the "
            "weights of Detectron2's own."
        )
    has_keypoints = getattr(heads, "keypoint_on", False)  # Res5ROIHeads knows none
    if detector.proposal_generator is None or has_keypoints:
        what = "keypoints" if has_keypoints else "precomputed proposals"
        raise InputError(
            f"TEST.AUG.ENABLED is True, but {what} are those of one view: set it to False."
        )
    if isinstance(heads, IOU_NET_HEADS):
        return IoUNetReader(detector)
    return RCNNReader(detector)
