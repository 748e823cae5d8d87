"""Exported models in the place of trained ones: --model of `iou-d2 eval`."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from iou_d2.commands.exported_file import open_detector


class ExportedPredictor:
    """A Detector of iou_d2/runtime that answers as Detectron2's DefaultPredictor does.

    Attributes:
        detector: the Detector.
    """

    def __init__(self, path: str):
        """Raises InputError where `path` is no exported model, or ONNX Runtime is not installed."""
        self.detector = open_detector(path)

    @property
    def class_names(self) -> list[str]:
        return self.detector.description.class_names

    def __call__(self, image: np.ndarray) -> dict[str, Instances]:
        """(H, W, 3) uint8 BGR -> {"instances": its detections, best first}, with `pred_masks`
        (D, H, W) bool where the model is a Mask R-CNN."""
        from iou_d2.runtime import paste_masks

        found = self.detector(image)
        if "masks" in found:
            masks = found.pop("masks")
            found["pred_masks"] = paste_masks(masks, found["boxes"], image.shape[:2])
        found = {name: torch.from_numpy(x) for name, x in found.items()}
        instances = Instances(image.shape[:2])
        instances.pred_boxes = Boxes(found.pop("boxes"))
        instances.pred_classes = found.pop("classes")
        for name, value in found.items():
            instances.set(name, value)
        return {"instances": instances}
