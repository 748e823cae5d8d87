"""What UnitBox is to compute, in Python floats."""

from __future__ import annotations

import math


def owner_by_hand(boxes, row, column, region):
    x, y, best, smallest = column + 0.5, row + 0.5, -1, math.inf
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        inside = x1 <= x < x2 and y1 <= y < y2
        if inside and region == "ellipse":
            u, v = (x - (x1 + x2) / 2) / (x2 - x1), (y - (y1 + y2) / 2) / (y2 - y1)
            inside = u * u + v * v <= 0.25
        if inside and (x2 - x1) * (y2 - y1) < smallest:
            best, smallest = index, (x2 - x1) * (y2 - y1)
    return best


def regression_loss_by_hand(distances, target, kind):
    differences = [abs(a - b) for a, b in zip(distances, target)]
    if kind == "l2":
        return sum(d * d for d in differences)
    if kind == "smooth_l1":
        return sum(d * d / 2 if d < 1 else d - 0.5 for d in differences)
    inner_sides = [min(x, y) for x, y in zip(distances, target)]
    area, true_area, inner = (
        (top + bottom) * (left + right)
        for top, bottom, left, right in (distances, target, inner_sides)
    )
    iou = inner / (area + true_area - inner)
    return 1 - iou if kind == "iou" else -math.log(iou)
