"""An exported detector that takes images as they are read and gives boxes in their pixels."""

from __future__ import annotations

import numpy as np

from .model import ImageModel


class Detector(ImageModel):
    """A model that `iou-d2 export` wrote with `--with detections`."""

    outputs = "detections"
    fault = "before NMS"

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """(H, W, 3) uint8 BGR, as OpenCV reads it -> its D detections, best first.

        Returns:
            "boxes" (D, 4) XYXY in pixels of `image`, "scores" (D,), "classes" (D,) int64, and what
            the method has of "cls_scores", "pred_ious" and "pred_centernesses" (D,), and of Mask
            R-CNN "masks" (D, M, M), which `paste_masks` draws into the image. D may be 0.

        Raises:
            InputError: `image` is something else.
        """
        pixels, scale = self.prepare(image)
        return self.run(scale, image.shape, images=pixels)
