"""A two-stage detector as a graph: from images as they are to detections, with normalisation,
padding, proposals, NMS and masks inside.

Shape letters: N images, H and W of them, P proposals of an image, D detections, K classes. Boxes
are XYXY in pixels of the input. Images with fewer proposals or detections are filled up, so that no
shape of an output depends on what is found.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import ROIHeads
from torch import Tensor

from iou_d2.detectors.iou_net import IoUNetCascadeROIHeads, IoUNetROIHeads, StandaloneIoUNet
from iou_d2.detectors.pooler import PrRoIPooler
from iou_d2.errors import InputError

from .box_heads import Regions, Regressed, box_pooling_of, regress, require_box_heads
from .candidates import Candidates, best, clipped, outputs_of, without_empty
from .fast_rcnn import FastRCNN
from .graph import ImageGraph
from .iou_net_heads import IoUNet
from .mask_heads import masks_of, require_mask_head
from .proposals import propose, require_rpn

ARCHITECTURES = (GeneralizedRCNN, StandaloneIoUNet)


class TwoStageGraph(ImageGraph):
    """images (N, 3, H, W), 0..255 of any dtype, -> the tensors that `names` says, in that order."""

    def __init__(self, detector: GeneralizedRCNN, postprocessor: FastRCNN | IoUNet, outputs: str):
        """
        Args:
            detector: in test mode.
            postprocessor: from what the box head says to detections.
            outputs: one of OUTPUTS: all proposals with all classes, what NMS is given, or what it
                leaves.
        """
        super().__init__(detector, outputs)
        self.postprocessor = postprocessor

    @property
    def exports_program(self) -> bool:
        return not any(isinstance(module, PrRoIPooler) for module in self.detector.modules())

    @property
    def last_opset(self) -> int:
        has_align = any(isinstance(module, ROIAlign) for module in self.detector.modules())
        return 21 if has_align else 22

    @property
    def doubtful(self) -> float:
        return self.postprocessor.doubtful

    @property
    def score_threshold(self) -> float:
        return self.postprocessor.threshold

    def outputs_of_images(self, images: Tensor) -> dict[str, Tensor]:
        size = tuple(images.shape[-2:])
        detector = self.detector
        features = detector.backbone(self.preprocess(images))
        proposals = propose(detector.proposal_generator, features, size)
        there = proposals.scores > 0  # (N, P)
        regions, number = regions_of(proposals, size)
        pooling = box_pooling_of(detector.roi_heads, features)
        regressed = regress(detector.roi_heads, pooling, regions)
        regressed = Regressed(*(values[number] for values in regressed))
        if self.outputs == "raw":
            scores = regressed.probabilities[:, :-1] * there.reshape(-1)[:, None]
            count, length = there.shape
            return {
                "boxes": regressed.boxes.view(count, length, -1, 4),
                "scores": scores.view(count, length, -1),
            }
        found = self.postprocessor.candidates(regressed, regions, there, pooling)
        if self.outputs == "candidates":
            return outputs_of(best(found, found.scores.shape[1]))
        found = self.postprocessor.detect(found, size, pooling)
        # As Detectron2's `detector_postprocess`, behind the limit.
        found = best(without_empty(clipped(found, size)), found.scores.shape[1])
        if not detector.roi_heads.mask_on:
            return outputs_of(found)
        return {**outputs_of(found), "masks": self.masks(features, found)}

    def masks(self, features: dict[str, Tensor], found: Candidates) -> Tensor:
        """(N, D, M, M) probabilities, 0 behind those that there are."""
        there = found.scores > 0
        masks = masks_of(
            self.detector.roi_heads,
            features,
            found.boxes.reshape(-1, 4),
            numbers_of_images(there),
            found.classes.reshape(-1),
        )
        masks = masks.view(*there.shape, *masks.shape[1:])
        return masks * there[..., None, None]


def regions_of(proposals: Candidates, size: tuple[int, int]) -> tuple[Regions, Tensor]:
    """The proposals (N, P) that there are, one after another, behind them one that is none, and the
    number (NP,) of each proposal among these: box heads look at no padding."""
    there = proposals.scores > 0
    images, flat = numbers_of_images(there), there.reshape(-1)
    index = torch.nonzero(flat).squeeze(1)
    boxes = F.pad(proposals.boxes.reshape(-1, 4)[index], (0, 0, 0, 1))
    number = torch.where(flat, flat.long().cumsum(0) - 1, flat.sum())
    return Regions(boxes, F.pad(images[index], (0, 1)), size), number


def numbers_of_images(of_images: Tensor) -> Tensor:
    """(N, M) -> (NM,) int64, the image of each."""
    count, length = of_images.shape
    return torch.arange(count)[:, None].expand(-1, length).reshape(-1)


def two_stage_graph(detector: GeneralizedRCNN, outputs: str) -> TwoStageGraph:
    """The graph of a detector. Raises InputError, with the key to change, where there is none."""
    if type(detector) not in ARCHITECTURES:
        raise InputError(
            f"MODEL.META_ARCHITECTURE {type(detector).__name__} cannot be exported: of the "
            "two-stage detectors only GeneralizedRCNN and StandaloneIoUNet can."
        )
    heads = detector.roi_heads
    require_rpn(detector.proposal_generator)
    require_box_heads(heads)
    if heads.mask_on:
        require_mask_head(heads)
    if getattr(heads, "keypoint_on", False):  # which heads with res5 never have
        raise InputError(
            "Keypoints cannot be exported: MODEL.KEYPOINT_ON False exports the boxes alone."
        )
    return TwoStageGraph(detector, postprocessor_of(heads), outputs)


def postprocessor_of(heads: ROIHeads) -> FastRCNN | IoUNet:
    """What makes detections of what `heads`, which `require_box_heads` has seen, say."""
    is_iou_net = isinstance(heads, (IoUNetROIHeads, IoUNetCascadeROIHeads))
    return IoUNet(heads) if is_iou_net else FastRCNN(heads)
