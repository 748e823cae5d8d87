"""Detectors as graphs: from images as they are to raw predictions, candidates or detections, with
normalisation, padding and NMS inside. The graph of dense ones is here, that of others in two_stage.

Shape letters: N images, H and W of them. Boxes are XYXY in pixels of the input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iou_d2.detectors.dense import DenseDetector

from .agreement import detections_of_model
from .candidates import Candidates, best, clipped, outputs_of, usable, without_empty
from .readers import Reader


class ImageGraph(nn.Module, ABC):
    """images (N, 3, H, W), 0..255 of any dtype, -> the tensors that `names` says, in that order.

    All images of a batch have one size; those of several have to be given one by one.
    """

    # The first of which are images.
    input_names: tuple[str, ...] = ("images",)
    # Whether torch.export can follow it.
    exports_program = True
    # The last opset of ONNX of which ONNX Runtime has all operators.
    last_opset = 22
    # Share of the detections that may be others in another runtime.
    doubtful: float
    # What the scores of detections are over.
    score_threshold: float

    def __init__(self, detector: nn.Module, outputs: str):
        """
        Args:
            detector: with a `backbone`, a `pixel_mean` and a `pixel_std`.
            outputs: one of OUTPUTS: all points, anchors or proposals, what NMS is given, what it
                leaves, or what becomes of boxes that are given.
        """
        super().__init__()
        self.detector = detector
        self.outputs = outputs
        self.pads = True  # to a size that the backbone divides
        self.names: list[str] = []  # of the outputs of the last call

    def inputs_with(self, images: Tensor) -> tuple[Tensor, ...]:
        """An example of all inputs, of which these are the first."""
        return (images,)

    def expected(self, images: Tensor, *others: Tensor) -> list[dict[str, np.ndarray]]:
        """What the detector, which knows nothing of graphs, makes of the inputs."""
        return detections_of_model(self.detector, images)

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
    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        outputs = self.outputs_of_images(images, *others)
        self.names = list(outputs)
        return tuple(outputs.values())

    @abstractmethod
    def outputs_of_images(self, images: Tensor, *others: Tensor) -> dict[str, Tensor]:
        """The outputs by their names, of all inputs."""

    def preprocess(self, images: Tensor) -> Tensor:
        """As Detectron2's `preprocess_image`, in arithmetic that a graph can hold."""
        detector = self.detector
        images = (images.float() - detector.pixel_mean) / detector.pixel_std
        if not self.pads:
            return images
        height, width = images.shape[-2:]
        below, right = (-height) % self.divisor, (-width) % self.divisor
        return F.pad(images, (0, right, 0, below))


class DetectorGraph(ImageGraph):
    """The graph of a dense detector."""

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
            outputs: one of OUTPUTS.
        """
        super().__init__(detector, outputs)
        self.reader = reader
        self.num_classes = num_classes

    @property
    def doubtful(self) -> float:
        return self.reader.doubtful

    @property
    def score_threshold(self) -> float:
        return self.reader.nms.score_threshold

    def outputs_of_images(self, images: Tensor) -> dict[str, Tensor]:
        size = tuple(images.shape[-2:])
        predictions = self.detector.predict(self.preprocess(images))
        if self.outputs == "raw":
            return self.reader.raw(predictions, size)
        candidates = usable(self.reader.candidates(predictions, size))
        return outputs_of(self.choose(candidates, size))

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
