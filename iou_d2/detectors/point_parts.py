"""Parts of PointDetector that need more of the config than a name.

Shape letters: P positive points of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from iou_d2.errors import InputError
from iou_d2.ops.assign import ATSSAssigner, FCOSAssigner
from iou_d2.ops.losses import focal_loss, quality_focal_loss, varifocal_loss

from .dense import part_named, reduce_mean

# (points, strides, boxes) -> ground truth of each point: see ops/assign.py.
Assigner = Callable[[Sequence[Tensor], Sequence[int], Tensor], Tensor]

# (logits, targets) -> sum: see ops/losses.py.
ClassLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BoxLossMean:
    """From the losses of positive boxes to that of a batch.

    Args:
        weighted: whether a box counts by its quality, and not all alike.
        min_divisor: of the sum of qualities or the number of boxes, whichever divides; a mean over
            processes.
    """

    weighted: bool = True
    min_divisor: float = 1.0

    def __call__(self, losses: Tensor, quality: Tensor) -> Tensor:
        """Losses and qualities (P,) -> a scalar; 0, with gradients, where P is 0."""
        weights = quality if self.weighted else torch.ones_like(quality)
        divisor = reduce_mean(weights.sum()).clamp(min=self.min_divisor)
        return (weights * losses).sum() / divisor


def point_offset(cfg) -> float:
    """Where a cell has its point: MODEL.POINT_DETECTOR.POINT_OFFSET, or that of the method."""
    node = cfg.MODEL.POINT_DETECTOR
    if node.POINT_OFFSET is not None:
        return node.POINT_OFFSET
    return 0.5 if node.ASSIGNER == "fcos" else 0.0


def build_box_loss_mean(cfg) -> BoxLossMean:
    """The mean that MODEL.POINT_DETECTOR.BOX_LOSS_MEAN names."""
    node = cfg.MODEL.POINT_DETECTOR
    means = {"weighted": BoxLossMean(True, node.MIN_QUALITY_SUM), "plain": BoxLossMean(False)}
    return part_named(means, node.BOX_LOSS_MEAN, "MODEL.POINT_DETECTOR.BOX_LOSS_MEAN")


def build_class_loss(cfg) -> ClassLoss:
    """The loss that MODEL.POINT_DETECTOR.CLS_LOSS names, with its constants."""
    node, dense = cfg.MODEL.POINT_DETECTOR, cfg.MODEL.RETINANET
    constants = {
        "MODEL.POINT_DETECTOR.VARIFOCAL_ALPHA": node.VARIFOCAL_ALPHA,
        "MODEL.POINT_DETECTOR.VARIFOCAL_GAMMA": node.VARIFOCAL_GAMMA,
        "MODEL.POINT_DETECTOR.QUALITY_FOCAL_BETA": node.QUALITY_FOCAL_BETA,
    }
    for key, value in constants.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{key} is at least 0 and finite, but it is {value}.")
    losses = {
        "varifocal": partial(
            varifocal_loss,
            alpha=node.VARIFOCAL_ALPHA,
            gamma=node.VARIFOCAL_GAMMA,
            iou_weighted=node.VARIFOCAL_IOU_WEIGHTED,
        ),
        "quality_focal": partial(quality_focal_loss, beta=node.QUALITY_FOCAL_BETA),
        "focal": partial(focal_loss, alpha=dense.FOCAL_LOSS_ALPHA, gamma=dense.FOCAL_LOSS_GAMMA),
    }
    return part_named(losses, node.CLS_LOSS, "MODEL.POINT_DETECTOR.CLS_LOSS")


def build_assigner(cfg) -> Assigner:
    """The assigner that MODEL.POINT_DETECTOR.ASSIGNER names."""
    builders = {"atss": _build_atss, "fcos": _build_fcos}
    name = cfg.MODEL.POINT_DETECTOR.ASSIGNER
    return part_named(builders, name, "MODEL.POINT_DETECTOR.ASSIGNER")(cfg)


def _build_atss(cfg) -> ATSSAssigner:
    return ATSSAssigner(anchor_scale=cfg.MODEL.POINT_DETECTOR.ANCHOR_SCALE)


def _build_fcos(cfg) -> FCOSAssigner:
    node, levels = cfg.MODEL.POINT_DETECTOR, len(cfg.MODEL.RETINANET.IN_FEATURES)
    if len(node.MAX_DISTANCES) != levels:
        raise InputError(
            f"MODEL.POINT_DETECTOR.MAX_DISTANCES has {len(node.MAX_DISTANCES)} entries for "
            f"{levels} levels."
        )
    lowest = [-1, *node.MAX_DISTANCES[:-1]]
    highest = [*node.MAX_DISTANCES[:-1], 1e8]
    if node.OPEN_RANGES:
        lowest, highest = _next_float32(lowest, math.inf), _next_float32(highest, -math.inf)
    return FCOSAssigner(
        ranges=tuple(zip(lowest, highest)),
        center_sampling_radius=node.CENTER_SAMPLING_RADIUS or None,
    )


def _next_float32(values: Sequence[float], towards: float) -> list[float]:
    """The nearest numbers that a float32 distance can be: a range without its limits."""
    values = torch.tensor(values, dtype=torch.float32)
    return torch.nextafter(values, torch.full_like(values, towards)).tolist()


def weights_of_stages(weights: Sequence[float], stages: int) -> Sequence[float]:
    """The weights of the last `stages` stages."""
    if len(weights) < stages:
        raise InputError(
            f"MODEL.POINT_DETECTOR.BOX_LOSS_WEIGHTS is {list(weights)}, but the head has boxes of "
            f"{stages} stages."
        )
    return weights[-stages:]
