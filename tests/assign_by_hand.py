"""ATSS and FCOS assignment in loops over plain numbers, and random cases for them."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import torch


def sides_of(point, box):
    return point[0] - box[0], point[1] - box[1], box[2] - point[0], box[3] - point[1]


def area_of(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def iou_by_hand(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height / (area_of(a) + area_of(b) - width * height)


def squared_distance(point, box):
    return (point[0] - (box[0] + box[2]) / 2) ** 2 + (point[1] - (box[1] + box[3]) / 2) ** 2


def candidate_choices(level, box, topk):
    """Every set of the `topk` nearest points: those before the last distance, and any of a tie."""
    distances = [squared_distance(point, box) for point in level]
    topk = min(topk, len(level))
    last = sorted(distances)[topk - 1] if topk else math.inf
    sure = [i for i, distance in enumerate(distances) if distance < last]
    tied = [i for i, distance in enumerate(distances) if distance == last]
    return [sure + list(rest) for rest in itertools.combinations(tied, topk - len(sure))]


def atss_positives(candidates, box):
    """{point: IoU} from [(index of the point, point, side of its anchor)] of one ground truth."""
    anchors = [(x - s / 2, y - s / 2, x + s / 2, y + s / 2) for _, (x, y), s in candidates]
    ious = [iou_by_hand(anchor, box) for anchor in anchors]
    if not ious:
        return {}
    # Of equal numbers these two are exact, so that equal IoUs reach their threshold.
    threshold = statistics.mean(ious) + (statistics.stdev(ious) if len(ious) > 1 else 0.0)
    return {
        index: iou
        for (index, point, _), iou in zip(candidates, ious)
        if iou >= threshold and min(sides_of(point, box)) > 0.01
    }


def atss_outcomes(points, strides, box, topk, scale):
    """What ATSS may make of one ground truth: [{point: IoU}], several where distances are equal."""
    outcomes = []
    for choice in itertools.product(*(candidate_choices(level, box, topk) for level in points)):
        candidates, start = [], 0
        for level, stride, chosen in zip(points, strides, choice):
            candidates += [(start + i, level[i], scale * stride) for i in chosen]
            start += len(level)
        outcomes.append(atss_positives(candidates, box))
    return outcomes


def atss_oracle(points, strides, boxes, topk, scale):
    """ATSS in Python floats, where no two points are equally near."""
    best = {}
    for number, box in enumerate(boxes):
        (positives,) = atss_outcomes(points, strides, box, topk, scale)
        for index, iou in positives.items():
            if index not in best or iou > best[index][0]:
                best[index] = (iou, number)
    return [best[i][1] if i in best else -1 for i in range(sum(map(len, points)))]


def fcos_oracle(points, strides, boxes, ranges, radius):
    matches = []
    for level, stride, (low, high) in zip(points, strides, ranges):
        for point in level:
            best, match = math.inf, -1
            for number, box in enumerate(boxes):
                region = box
                if radius is not None:
                    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    reach = radius * stride
                    region = (
                        *(max(x - reach, box[0]), max(y - reach, box[1])),
                        *(min(x + reach, box[2]), min(y + reach, box[3])),
                    )
                taken = min(sides_of(point, region)) > 0
                taken = taken and low <= max(sides_of(point, box)) <= high
                if taken and area_of(box) < best:
                    best, match = area_of(box), number
            matches.append(match)
    return matches


def random_atss_case(generator):
    """Points anywhere or of a grid, of levels of 0 to 40, and boxes of which some are the same.

    Quarters of pixels, so that the areas of the anchors are exact, and equal IoUs are equal.
    """
    levels = int(generator.integers(1, 5))
    strides = [int(stride) for stride in generator.integers(2, 33, levels)]
    points = []
    for stride in strides:
        if generator.random() < 0.5:
            level = generator.integers(-80, 480, (int(generator.integers(0, 41)), 2)) / 4
        else:
            rows, columns = generator.integers(1, 7, 2)
            level = [((j + 0.5) * stride, i * stride) for i in range(rows) for j in range(columns)]
        points.append(torch.tensor(level, dtype=torch.float32).reshape(-1, 2))
    count = int(generator.integers(0, 9))
    center = generator.uniform(-20, 120, (count, 2))
    half = 2 ** generator.uniform(-1, 6, (count, 2))
    boxes = torch.tensor(np.concatenate([center - half, center + half], 1), dtype=torch.float32)
    if count > 2:
        boxes[-1] = boxes[0]
    topk, scale = int(generator.integers(1, 12)), float(generator.choice([1.0, 4.0, 8.0]))
    return points, strides, boxes, topk, scale
