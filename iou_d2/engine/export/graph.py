"""A dense detector as a graph: from images as they are to raw predictions, candidates or
detections, with normalisation, padding and NMS inside.

Shape letters: N images, H and W of them. Boxes are XYXY in pixels of the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iou_d2.detectors.dense import DenseDetector

from .candidates import Candidates, best, clipped, outputs_of, usable, without_empty
from .readers import Reader

OUTPUTS = ("raw", "candidates", "detections")


class DetectorGraph(nn.Module):
    """images (N, 3, H, W), 0..255 of any dtype, -> the tensors that `names` says, in that order.

    All images of a batch have one size; those of several have to be given one by one.
    """

    def __init__(
        self,
        detector: DenseDetector,
        reader: Reader,
        num_classes: int,
        outputs: str,
    ):
        """
        Args:
            detector, reader: it, and what reads its predictions.
            outputs: one of OUTPUTS: all points or anchors, what NMS is given, or what it leaves.
        """
        super().__init__()
        self.detector = detector
        self.reader = reader
        self.num_classes = num_classes
        self.outputs = outputs
        self.pads = True  # to a size that the backbone divides
        self.names: list[str] = []  # of the outputs of the last call

    @property
    def divisor(self) -> int:
        """What the sides of an image are padded to multiples of."""
        return max(self.detector.backbone.size_divisibility, 1)

    @property
    def coarsest(self) -> int:
        """The stride of the coarsest feature, or the divisor where that is larger."""
        shapes = self.detector.backbone.output_shape().values()
        return max(self.divisor, *(shape.stride for shape in shapes))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = tuple(images.shape[-2:])
        predictions = self.detector.predict(self.preprocess(images))
        if self.outputs == "raw":
            outputs = self.reader.raw(predictions, size)
        else:
            candidates = usable(self.reader.candidates(predictions, size))
            outputs = outputs_of(self.choose(candidates, size))
        self.names = list(outputs)
        return tuple(outputs.values())

    def preprocess(self, images: Tensor) -> Tensor:
        """As DenseDetector's `preprocess_image`, in arithmetic that a graph can hold."""
        detector = self.detector
        images = (images.float() - detector.pixel_mean) / detector.pixel_std
        if not self.pads:
            return images
        height, width = images.shape[-2:]
        below, right = (-height) % self.divisor, (-width) % self.divisor
        return F.pad(images, (0, right, 0, below))

    def choose(self, candidates: Candidates, size: tuple[int, int]) -> Candidates:
        """What the graph puts out of the candidates, best first."""
        count = candidates.scores.shape[1]
        if self.outputs == "candidates":
            return best(candidates, count)
        kept = self.reader.kept(candidates, self.num_classes)
        limit = self.reader.nms.max_detections
        limit = count if limit < 0 else limit
        found = best(candidates._replace(scores=candidates.scores * kept), limit)
        # As Detectron2's `detector_postprocess`, behind the limit.
        return best(without_empty(clipped(found, size)), limit)
