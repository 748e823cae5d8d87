"""Pictures of detections: boxes with class, score and predicted IoU.

Boxes are (R, 4) XYXY in pixels of the picture; images are (H, W, 3) uint8 BGR, as OpenCV has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

READABLE_SIDE = 800  # pixels; smaller images are enlarged, or their labels would hide the objects


def detection_label(name: str, score: float, pred_iou: float | None = None) -> str:
    """Such as "star 0.93", or "star 0.93 IoU 0.88" where the detector predicts the IoU."""
    label = f"{name} {score:.2f}"
    return label if pred_iou is None else f"{label} IoU {pred_iou:.2f}"


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, classes: Sequence[int], labels: Sequence[str]
) -> np.ndarray:
    """A copy of `image`, enlarged to READABLE_SIDE where it is smaller, with the boxes drawn.

    A class has the same colour in every picture. No boxes give the picture alone.
    """
    scale = max(1.0, READABLE_SIDE / max(image.shape[:2]))
    visualizer = Visualizer(image[:, :, ::-1], scale=scale)
    palette = colormap(rgb=True, maximum=1)
    colors = [palette[index % len(palette)] for index in classes]
    drawn = visualizer.overlay_instances(
        boxes=np.asarray(boxes).reshape(-1, 4), labels=list(labels), assigned_colors=colors
    )
    return drawn.get_image()[:, :, ::-1]
