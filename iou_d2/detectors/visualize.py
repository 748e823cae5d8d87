"""Pictures of detections: boxes with class, score and predicted IoU.

Boxes are (R, 4) XYXY in pixels of the picture; images are (H, W, 3) uint8 BGR, as OpenCV has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.events import get_event_storage
from detectron2.utils.visualizer import Visualizer

READABLE_SIDE = 800  # pixels; smaller images are enlarged, or their labels would hide the objects
DRAWN = 20  # detections in a picture of the training, as in Detectron2


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


def is_time_to_draw(period: int) -> bool:
    """Whether VIS_PERIOD asks for a picture of this iteration; 0 never does."""
    return period > 0 and get_event_storage().iter % period == 0


def visualize_training(image: dict, detections: Instances, image_format: str) -> None:
    """Log a picture of a training image: its ground truth to the left, its best detections to the
    right.

    Args:
        image: one of Detectron2's standard inputs, with "image" and "instances".
        detections: at the size of the network input, best first.
        image_format: INPUT.FORMAT.
    """
    pixels = convert_image_to_rgb(image["image"].permute(1, 2, 0), image_format)
    halves = [
        Visualizer(pixels).overlay_instances(boxes=boxes.tensor.cpu().numpy()).get_image()
        for boxes in (image["instances"].gt_boxes, detections.pred_boxes[:DRAWN])
    ]
    name = f"Left: ground truth, right: the {DRAWN} best detections"
    get_event_storage().put_image(name, np.hstack(halves).transpose(2, 0, 1))
