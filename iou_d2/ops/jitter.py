"""Boxes drawn around ground truth, uniform in their IoU with it (arXiv 1807.11590, section 3.1).

The offsets are drawn once, for a box of side 1, and scaled to every ground-truth box: to draw one
with a given IoU takes up to hundreds of tries. Shape letters: M offsets, G ground-truth boxes,
R RoIs. Boxes are XYXY in absolute pixels.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .boxes import aligned_iou

_STEP = 0.01


def jitter_offsets(min_iou: float = 0.5, per_step: int = 200, seed: int = 0) -> Tensor:
    """Offsets of the sides x1, y1, x2, y2, in widths and heights of a box.

    After a script posted for the authors (PreciseRoIPooling, issue 36): for L = `min_iou`,
    `min_iou` + 0.01, ..., 0.99 the sides are drawn uniformly from all that leaves an IoU of L
    possible, 1 - L inwards and (1 - L) / L outwards, until the IoU is in [L, L + 0.01). The
    script's bounds favour the right and the bottom; here left and top mirror them.

    Args:
        min_iou: multiple of 0.01 in (0, 1).
        per_step: offsets for each L.
        seed: of the random numbers.

    Returns:
        (M, 4) float32, M = (1 - min_iou) / 0.01 * per_step, in no order.
    """
    return _offsets(min_iou, per_step, seed).clone()


@cache  # to draw them takes a fifth of a second, and each model has them
def _offsets(min_iou: float, per_step: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = []
    for step in range(round(min_iou / _STEP), round(1 / _STEP)):
        low, found = step * _STEP, []
        while sum(map(len, found)) < per_step:
            found.append(_draw(low, 8192, generator))
        table.append(torch.cat(found)[:per_step])
    table = torch.cat(table)
    return table[torch.randperm(len(table), generator=generator)].float()


def _draw(low: float, tries: int, generator: torch.Generator) -> Tensor:
    """Those of `tries` random offsets that have an IoU in [low, low + 0.01)."""
    inwards, outwards = 1 - low, (1 - low) / low
    sides = torch.rand(tries, 4, generator=generator, dtype=torch.float64)
    offsets = sides * (inwards + outwards) - outwards  # of x1 and y1, where outwards is negative
    offsets[:, 2:] *= -1
    unit = offsets.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(tries, 4)
    iou = aligned_iou(unit + offsets, unit)
    return offsets[(iou >= low) & (iou < low + _STEP)]


def jittered_boxes(
    gt_boxes: Tensor,
    image_size: tuple[int, int],
    offsets: Tensor,
    *,
    per_gt: int,
    per_image: int,
    min_iou: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random RoIs around the ground truth of one image.

    Args:
        gt_boxes: (G, 4).
        image_size: (height, width), to which the RoIs are clipped.
        offsets: (M, 4) of `jitter_offsets`, on the device of the boxes.
        per_gt: RoIs for each box ...
        per_image: ... and for the image, of which as many are chosen at random.
        min_iou: RoIs with a lower IoU after clipping are dropped: rounding makes some around tiny
            boxes, and clipping around boxes that stick out of the image.

    Returns:
        boxes: (R, 4), R <= min(G * per_gt, per_image).
        gt_index: (R,) ground truth of each.
        ious: (R,) IoU with it after clipping, in [min_iou, 1].
        All are empty without ground truth.
    """
    gt_index = torch.arange(len(gt_boxes), device=gt_boxes.device).repeat_interleave(per_gt)
    if len(gt_index) > per_image:
        gt_index = gt_index[torch.randperm(len(gt_index), device=gt_index.device)[:per_image]]
    chosen = torch.randint(len(offsets), gt_index.shape, device=gt_index.device)

    matched = gt_boxes[gt_index].float()
    size = (matched[:, 2:] - matched[:, :2]).repeat(1, 2)
    height, width = image_size
    boxes = (matched + offsets[chosen] * size).clamp(min=0)
    boxes = boxes.minimum(boxes.new_tensor([width, height, width, height]))
    ious = aligned_iou(boxes, matched)
    good = ious >= min_iou
    return boxes[good], gt_index[good], ious[good]
