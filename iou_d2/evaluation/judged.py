"""Detections beside their true IoU, gathered while a detector runs.

Shapes: D detections, of one image or of all. Boxes are XYXY in pixels of the original image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from iou_d2.analysis.records import best_iou


class Judged(NamedTuple):
    """Detections, image by image."""

    image: np.ndarray  # (D,), number of the image in the order of the loader
    confidence: np.ndarray  # (D,)
    predicted: np.ndarray  # (D,), predicted IoU
    true: np.ndarray  # (D,), as Records have it

    def part(self, chosen: np.ndarray) -> Judged:
        """Those of a mask (D,)."""
        return Judged(*(values[chosen] for values in self))


class JudgedDetections(DatasetEvaluator):
    """Gathers Judged in one process; inputs have their objects as "instances" at the size of the
    network input, and outputs `pred_ious`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._images: list[Judged] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs):
            found = output["instances"].to("cpu")
            truth = image["instances"].to("cpu")
            self._images.append(
                Judged(
                    np.full(len(found), len(self._images)),
                    found.scores.double().numpy(),
                    found.pred_ious.double().numpy(),
                    true_iou(found, truth),
                )
            )

    def evaluate(self) -> Judged:
        if not self._images:
            return Judged(*(np.zeros(0) for _ in Judged._fields))
        return Judged(*(np.concatenate(values) for values in zip(*self._images)))


def true_iou(found: Instances, truth: Instances) -> np.ndarray:
    """The highest IoU (D,) of detections with an object of their class, whatever the sizes of the
    two images are."""
    boxes = found.pred_boxes.tensor.double().numpy()
    objects = Boxes(truth.gt_boxes.tensor.double())
    height, width = (a / b for a, b in zip(found.image_size, truth.image_size))
    objects.scale(width, height)
    ious = np.zeros(len(found))
    for label in found.pred_classes.unique():
        of_class = (found.pred_classes == label).numpy()
        same = (truth.gt_classes == label).numpy()
        ious[of_class] = best_iou(boxes[of_class], objects.tensor.numpy()[same])
    return ious
