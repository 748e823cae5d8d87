"""What the dense detectors share: their input, and the way from the scores of every point to the
detections of an image.

Shape letters: N images, K classes, A anchors a cell, L levels, R the anchors of one level (HWA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from detectron2.layers import batched_nms
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor


def normalized_images(
    batched_inputs: list[dict], mean: Tensor, std: Tensor, size_divisibility: int
) -> ImageList:
    """The N images of Detectron2's standard input on the device of `mean`, normalised by channel
    and padded with 0 to one size that `size_divisibility` divides."""
    images = [(x["image"].to(mean.device) - mean) / std for x in batched_inputs]
    return ImageList.from_tensors(images, size_divisibility)


class Selection(NamedTuple):
    """The entries of an (R, K) score matrix that go on to NMS, best first: each (S,)."""

    scores: Tensor
    anchors: Tensor
    classes: Tensor


def select_candidates(scores: Tensor, threshold: float, topk: int) -> Selection:
    """The `topk` highest entries of `scores` (R, K) above `threshold`, best first."""
    above = scores > threshold
    anchors, classes = torch.nonzero(above, as_tuple=True)
    scores, order = scores[above].topk(min(topk, len(anchors)))
    return Selection(scores, anchors[order], classes[order])


def detections_of_image(
    levels: Sequence[Instances],
    nms_threshold: float,
    max_detections: int,
    class_agnostic: bool = False,
) -> Instances:
    """Candidates of all levels of one image -> NMS, class-wise or not -> the `max_detections`
    best."""
    candidates = Instances.cat(list(levels))
    classes = candidates.pred_classes
    keep = batched_nms(
        candidates.pred_boxes.tensor,
        candidates.scores,
        torch.zeros_like(classes) if class_agnostic else classes,
        nms_threshold,
    )
    return candidates[keep[:max_detections]]


def postprocess(
    detections: Sequence[Instances], batched_inputs: list[dict], image_sizes: list[tuple[int, int]]
) -> list[dict]:
    """Detectron2's standard output: boxes scaled to the size that each input asks for."""
    outputs = []
    for instances, image, (height, width) in zip(detections, batched_inputs, image_sizes):
        resized = detector_postprocess(
            instances, image.get("height", height), image.get("width", width)
        )
        outputs.append({"instances": resized})
    return outputs


def reduce_mean(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes, without gradient."""
    value = value.detach().clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
