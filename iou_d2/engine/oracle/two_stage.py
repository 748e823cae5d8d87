"""The editor of R-CNNs, whose points are proposals.

Shape letters: N images, K classes, R proposals of an image, G its objects, S boxes, P proposals
that learn an object. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor

from iou_d2.detectors.iou_net_inference import Postprocessor, select_boxes
from iou_d2.detectors.iou_net_nms import GuidedNMS
from iou_d2.detectors.pooler import LayerPooler
from iou_d2.errors import InputError
from iou_d2.ops.boxes import aligned_iou

from .editors import Editor, Foreground


@dataclass(frozen=True)
class TrueIoU:
    """An IoU branch that makes no mistake: it stands where an IoUBranch does.

    Args:
        truth: the objects of N images.
        pooler: that of the branch, which says on what level a box is; None where nothing asks.
    """

    truth: list[Instances]
    pooler: LayerPooler | None = None

    def predict(
        self,
        features: list[Tensor],
        boxes: list[Boxes],
        classes: Tensor,
        levels: Tensor | None = None,
    ) -> Tensor:
        """The highest IoU (S,) of boxes of N images with an object of their class (S,), 0 without
        one. Differentiable in the boxes."""
        classes = classes.split([len(x) for x in boxes])
        return torch.cat([_best_iou(*of_image) for of_image in zip(boxes, classes, self.truth)])


def _best_iou(boxes: Boxes, classes: Tensor, truth: Instances) -> Tensor:
    """Boxes and classes (S,) of an image -> (S,)."""
    boxes, objects = boxes.tensor, truth.gt_boxes.tensor
    nothing = 0 * boxes.sum(dim=1, keepdim=True)  # (S, 1), with a gradient
    shape = (len(boxes), len(objects), 4)
    ious = aligned_iou(boxes[:, None].expand(shape), objects[None].expand(shape))  # (S, G)
    ious = ious * (classes[:, None] == truth.gt_classes)
    return torch.cat([nothing, ious], dim=1).amax(dim=1)


class RegionPrediction(NamedTuple):
    """What the box head of an R-CNN says of the proposals of N images."""

    features: dict[str, Tensor]
    proposals: list[Instances]
    boxes: list[Tensor]  # (R, 4) or (R, 4K)
    probabilities: list[Tensor]  # (R, K + 1), the background last
    # From these to the detections of N images.
    postprocess: Callable[[RegionPrediction], list[Instances]]


class RegionEditor(Editor):
    """Of Faster, Mask and Cascade R-CNN, and of IoU-Net; masks are left out.

    A proposal learns the object that the matcher of the (first) box head gives it. Objects are not
    among the proposals, and none of these is left out, as training does both.
    """

    has_proposals = True

    def __init__(self, detector: GeneralizedRCNN):
        if not hasattr(detector.roi_heads, "regress"):
            raise InputError(
                "An oracle needs ROI heads of iou_d2: set MODEL.ROI_HEADS.NAME to BoxLossROIHeads, "
                "BoxLossCascadeROIHeads, BoxLossRes5ROIHeads, or to those of IoU-Net."
            )
        if detector.proposal_generator is None:
            raise InputError(
                "An oracle needs an RPN, but MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals."
            )
        self.detector = detector
        self.heads = heads = detector.roi_heads
        self.has_quality = hasattr(heads, "iou_branch")
        is_cascade = not hasattr(heads.box_predictor, "select")
        self.predictor = heads.box_predictor[-1] if is_cascade else heads.box_predictor

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        return self.detector.preprocess_image(batched_inputs)

    def predict(self, images: ImageList) -> RegionPrediction:
        features = self.detector.backbone(images.tensor)
        proposals, _ = self.detector.proposal_generator(images, features, None)
        boxes, probabilities = self.heads.regress(features, proposals)
        postprocess = self.by_score
        if self.has_quality:
            choice = self.heads.box_choice
            boxes = [choice(*of_image) for of_image in zip(boxes, probabilities)]
            postprocess = self.by_branch
        return RegionPrediction(features, proposals, list(boxes), list(probabilities), postprocess)

    def detect(self, predictions, image_sizes) -> list[Instances]:
        return predictions.postprocess(predictions)

    def by_score(self, predictions: RegionPrediction) -> list[Instances]:
        """Detectron2's NMS by class score."""
        sizes = [x.image_size for x in predictions.proposals]
        return self.predictor.select(predictions.boxes, predictions.probabilities, sizes)[0]

    def by_branch(
        self, predictions: RegionPrediction, branch: TrueIoU | None = None
    ) -> list[Instances]:
        """What IoU-Net does with predicted IoUs, those of its own branch or of another."""
        heads, features = self.heads, predictions.features
        branch = heads.iou_branch if branch is None else branch
        regress = partial(heads.regress_again, features)
        candidates = self.candidates(predictions)
        return heads.postprocessor(candidates, branch, heads.levels(features), regress)

    def by_true_rank(
        self, predictions: RegionPrediction, truth: list[Instances]
    ) -> list[Instances]:
        """IoU-guided NMS in which the true IoU ranks; scores stay those of the class."""
        nms = GuidedNMS(self.predictor.test_nms_thresh)
        postprocess = Postprocessor(nms, self.predictor.test_topk_per_image)
        return postprocess(self.candidates(predictions), TrueIoU(truth), [])

    def candidates(self, predictions: RegionPrediction) -> list[Instances]:
        """What NMS is given."""
        threshold = self.predictor.test_score_thresh
        return [
            select_boxes(boxes, probabilities, x.image_size, threshold)
            for boxes, probabilities, x in zip(
                predictions.boxes, predictions.probabilities, predictions.proposals
            )
        ]

    def foreground(self, predictions, image_sizes, truth) -> Foreground:
        images, indices, classes, boxes = [], [], [], []
        for image, (proposals, objects) in enumerate(zip(predictions.proposals, truth)):
            ious = pairwise_iou(objects.gt_boxes, proposals.proposal_boxes)
            matches, labels = self.heads.proposal_matcher(ious)
            (index,) = (labels == 1).nonzero(as_tuple=True)
            images.append(torch.full_like(index, image))
            indices.append(index)
            classes.append(objects.gt_classes[matches[index]])
            boxes.append(objects.gt_boxes.tensor[matches[index]])
        return Foreground(*map(torch.cat, (images, indices, classes, boxes)), truth)

    def boxes(self, predictions, foreground) -> Tensor:
        found = torch.empty_like(foreground.boxes)
        for image, boxes in enumerate(predictions.boxes):
            here = foreground.image == image
            of_class = boxes.view(len(boxes), boxes.shape[1] // 4, 4)  # (R, 1 or K, 4)
            classes = foreground.classes[here].clamp(max=of_class.shape[1] - 1)
            found[here] = of_class[foreground.index[here], classes]
        return found

    def with_boxes(self, predictions, foreground, boxes) -> RegionPrediction:
        """Overwrites the boxes of all classes, as a dense detector has one for all."""
        edited = [x.clone() for x in predictions.boxes]
        for image, of_image in enumerate(edited):
            here = foreground.image == image
            of_image[foreground.index[here]] = boxes[here].repeat(1, of_image.shape[1] // 4)
        return predictions._replace(boxes=edited)

    def with_class_scores(self, predictions, foreground, scores) -> RegionPrediction:
        edited = [x.clone() for x in predictions.probabilities]
        for image, of_image in enumerate(edited):
            here = foreground.image == image
            of_image[foreground.index[here], foreground.classes[here]] = scores[here]
        return predictions._replace(probabilities=edited)

    def with_quality(self, predictions, foreground, quality) -> RegionPrediction:
        """The IoU branch judges boxes, not proposals: the one of `TrueIoU` stands in its place, for
        all boxes, and does all that the branch does."""
        branch = TrueIoU(foreground.truth, self.heads.iou_branch.pooler)
        return predictions._replace(postprocess=lambda x: self.by_branch(x, branch))

    def with_true_rank(self, predictions: RegionPrediction, foreground: Foreground):
        """Predictions whose boxes IoU-guided NMS ranks by their true IoU."""
        truth = foreground.truth
        return predictions._replace(postprocess=lambda x: self.by_true_rank(x, truth))

    def without_quality(self, predictions: RegionPrediction) -> RegionPrediction:
        return predictions._replace(postprocess=self.by_score)
