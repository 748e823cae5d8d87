"""The formulas of the IoU losses in Python floats, the oracle of the tests of box_losses.py."""

from __future__ import annotations

import math

import numpy as np

from iou_d2.ops.box_losses import MIN_IOU


def loss_of_pair(a, b, kind):
    """The papers' formulas in Python floats, for two boxes that have an area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0.0) * max(height, 0.0)
    sizes = [(x[2] - x[0], x[3] - x[1]) for x in (a, b)]
    union = sum(w * h for w, h in sizes) - inner
    iou = inner / union
    hull = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    if kind == "iou":
        return 1 - iou
    if kind == "unitbox":
        return -math.log(max(iou, MIN_IOU))
    if kind == "giou":
        return 1 - iou + (hull[0] * hull[1] - union) / (hull[0] * hull[1])
    shift = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    diou = 1 - iou + (shift[0] ** 2 + shift[1] ** 2) / (hull[0] ** 2 + hull[1] ** 2)
    if kind == "diou":
        return diou
    angles = [math.atan(w / h) for w, h in sizes]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return diou + (v * v / (1 - iou + v) if v else 0.0)


def random_boxes(generator, count, spread=60.0):
    corner = generator.uniform(-spread, spread, (count, 2))
    return np.concatenate([corner, corner + generator.uniform(2, 60, (count, 2))], axis=1)


def slope_of(loss, box, i, step=1e-6):
    """Central difference of `loss`, of a list of four numbers, in number `i`."""
    low, high = list(box), list(box)
    low[i] -= step
    high[i] += step
    return (loss(high) - loss(low)) / (2 * step)
