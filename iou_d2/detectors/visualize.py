"""Pictures of a training: its ground truth beside its detections, as Detectron2 draws them."""

from __future__ import annotations

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage

DRAWN = 20  # detections in a picture of the training, as in Detectron2


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
    # It loads Matplotlib, which few trainings need and all commands would wait for.
    from detectron2.utils.visualizer import Visualizer

    pixels = convert_image_to_rgb(image["image"].permute(1, 2, 0), image_format)
    halves = [
        Visualizer(pixels).overlay_instances(boxes=boxes.tensor.cpu().numpy()).get_image()
        for boxes in (image["instances"].gt_boxes, detections.pred_boxes[:DRAWN])
    ]
    name = f"Left: ground truth, right: the {DRAWN} best detections"
    get_event_storage().put_image(name, np.hstack(halves).transpose(2, 0, 1))
