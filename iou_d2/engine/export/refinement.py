"""IoU-Net for the detections of any detector as a graph: what `iou-d2 refine` does.

Shape letters: N images, H and W of them, M boxes given for an image, D detections, K classes. Boxes
are XYXY in pixels of the input.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from iou_d2.detectors.iou_net import IoUNetCascadeROIHeads, IoUNetROIHeads
from iou_d2.errors import InputError

from .agreement import arrays_of
from .box_heads import box_pooling_of, require_box_heads
from .candidates import Candidates, best, clipped, outputs_of, usable, without_empty
from .graph import ImageGraph
from .iou_net_heads import IoUNet


class RefinementGraph(ImageGraph):
    """images (N, 3, H, W), 0..255 of any dtype, with the detections of any detector in them, before
    its NMS, -> those that IoU-Net's NMS leaves, where it moves them; the tensors that `names` says.

    The detections are boxes (N, M, 4), class scores (N, M), 0 where there is none, and classes
    (N, M) int64; one of a class that there is not is left out. M may be 0. What the graph of a
    detector puts out as candidates is of this form.
    """

    # Other names than those of the outputs, of which a file in ONNX has each but once.
    input_names = ("images", "given_boxes", "given_scores", "given_classes")
    exports_program = False
    doubtful = 0.0

    def __init__(self, detector: GeneralizedRCNN, postprocessor: IoUNet):
        """
        Args:
            detector: in test mode, with the ROI heads of IoU-Net.
            postprocessor: of these heads.
        """
        super().__init__(detector, "refinement")
        self.postprocessor = postprocessor

    @property
    def score_threshold(self) -> float:
        return self.postprocessor.threshold

    def outputs_of_images(
        self, images: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor
    ) -> dict[str, Tensor]:
        size, postprocessor = tuple(images.shape[-2:]), self.postprocessor
        features = self.detector.backbone(self.preprocess(images))
        pooling = box_pooling_of(self.detector.roi_heads, features)
        there = (scores > self.score_threshold) & (classes >= 0)
        there = there & (classes < postprocessor.num_classes)
        scores = torch.where(there, scores, 0.0)
        # One more, which is none: ONNX Runtime does not compare boxes that have no M.
        boxes = F.pad(boxes, (0, 0, 0, 1))
        given = Candidates(boxes, F.pad(scores, (0, 1)), F.pad(classes, (0, 1)), {})
        given = postprocessor.with_ious(clipped(usable(given), size), pooling)
        found = postprocessor.detect(given, size, pooling)
        # As Detectron2's `detector_postprocess`.
        return outputs_of(best(without_empty(clipped(found, size)), found.scores.shape[1]))

    def inputs_with(self, images: Tensor) -> tuple[Tensor, ...]:
        """Random boxes, some of which overlap."""
        generator = torch.Generator().manual_seed(0)
        height, width = images.shape[-2:]
        shape = (images.shape[0], 40)
        middle = torch.rand(*shape, 2, generator=generator) * torch.tensor([width, height])
        half = torch.rand(*shape, 2, generator=generator) * min(height, width) / 3 + 2
        return (
            images,
            torch.cat([middle - half, middle + half], dim=2),
            torch.rand(shape, generator=generator),
            torch.randint(self.detector.roi_heads.num_classes, shape, generator=generator),
        )

    @torch.no_grad()
    def expected(
        self, images: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor
    ) -> list[dict[str, np.ndarray]]:
        size, detector = tuple(images.shape[-2:]), self.detector
        batch = detector.preprocess_image([{"image": image} for image in images])
        given = []
        for of_image in zip(boxes, scores, classes):
            there = of_image[1] > self.score_threshold
            own_boxes, own_scores, own_classes = (x[there] for x in of_image)
            own_boxes = Boxes(own_boxes.clone())
            own_boxes.clip(size)
            given.append(
                Instances(size, pred_boxes=own_boxes, scores=own_scores, pred_classes=own_classes)
            )
        found = detector.roi_heads.detect(detector.backbone(batch.tensor), given)
        return [arrays_of(detector_postprocess(instances, *size)) for instances in found]


def refinement_graph(detector: GeneralizedRCNN) -> RefinementGraph:
    """The graph of a detector with IoU-Net heads. Raises InputError, with the key to change, where
    there is none."""
    heads = getattr(detector, "roi_heads", None)
    if not isinstance(heads, (IoUNetROIHeads, IoUNetCascadeROIHeads)):
        raise InputError(
            f"{type(heads or detector).__name__} has no IoU branch to refine boxes with: "
            "MODEL.ROI_HEADS.NAME is not IoUNetROIHeads or IoUNetCascadeROIHeads."
        )
    require_box_heads(heads)
    return RefinementGraph(detector, IoUNet(heads))
