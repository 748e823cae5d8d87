"""Matching and losses of SSD and RefineDet by loops over Python floats."""

from __future__ import annotations

import math

import torch
from torchvision.ops import box_iou


def match_by_hand(iou: list[list[float]], positive: float, negative: float):
    """Object of each box (None without), and whether it is background."""
    objects, boxes = range(len(iou)), range(len(iou[0]))
    match: dict[int, int] = {}
    left = set(objects)
    while left:
        pairs = [(iou[g][b], g, b) for g in left for b in boxes if b not in match]
        best = max(pairs, default=(0, 0, 0))
        if best[0] <= 1e-6:
            break
        match[best[2]] = best[1]
        left.remove(best[1])
    background = []
    for b in boxes:
        overlap, g = max((iou[g][b], g) for g in objects)
        if b not in match and overlap >= positive:
            match[b] = g
        background.append(b not in match and overlap < negative)
    return [match.get(b) for b in boxes], background


def encode_by_hand(box: list[float], gt: list[float]) -> tuple[float, ...]:
    """The deltas from a box to its object, with the variances 0.1 and 0.2."""
    (ax, ay, bx, by), (gx, gy, hx, hy) = box, gt
    w, h = bx - ax, by - ay
    return (
        ((gx + hx) / 2 - (ax + bx) / 2) / w / 0.1,
        ((gy + hy) / 2 - (ay + by) / 2) / h / 0.1,
        math.log((hx - gx) / w) / 0.2,
        math.log((hy - gy) / h) / 0.2,
    )


def decode_by_hand(box: list[float], deltas: list[float]) -> list[float]:
    (ax, ay, bx, by), (dx, dy, dw, dh) = box, deltas
    w, h = bx - ax, by - ay
    cx, cy = (ax + bx) / 2 + 0.1 * dx * w, (ay + by) / 2 + 0.1 * dy * h
    w, h = w * math.exp(0.2 * dw), h * math.exp(0.2 * dh)
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def loss_by_hand(anchors, logits, deltas, truths, *, ratio=3, without=0, usable=None):
    """Sums of both losses and the number of positives.

    anchors (N, R, 4), logits (N, R, K + 1), deltas (N, R, 4); usable (N, R) where a negative may be
    mined; truths hold gt_boxes and gt_classes.
    """
    cls = box = count = 0.0
    for image, truth in enumerate(truths):
        gt = truth.gt_boxes.tensor.double()
        entropy = []
        for row in logits[image].double().tolist():
            total = math.log(sum(math.exp(x) for x in row))
            entropy.append([total - x for x in row])
        match, background = [None] * len(entropy), [True] * len(entropy)
        if len(gt):
            iou = box_iou(gt, torch.as_tensor(anchors[image]).double()).tolist()
            match, background = match_by_hand(iou, 0.5, 0.5)
        positives = [i for i, g in enumerate(match) if g is not None]
        number = int(ratio * len(positives)) if positives else without
        eligible = [
            i for i in range(len(match)) if background[i] and (usable is None or usable[image][i])
        ]
        cls += sum(sorted((entropy[i][-1] for i in eligible), reverse=True)[:number])
        cls += sum(entropy[i][int(truth.gt_classes[match[i]])] for i in positives)
        count += len(positives)
        for i in positives:
            target = encode_by_hand(anchors[image][i].double().tolist(), gt[match[i]].tolist())
            for x, y in zip(deltas[image, i].double().tolist(), target):
                error = abs(x - y)
                box += 0.5 * error**2 if error < 1 else error - 0.5
    return cls, box, count
