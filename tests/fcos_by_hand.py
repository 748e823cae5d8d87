"""FCOS in float64 from the names of mmdetection's tensors, after its documentation: towers, points,
targets, losses, detections, each apart from the package. AdelaiDet differs in its detections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

STRIDES = (8, 16, 32, 64, 128)
HEAD = "bbox_head."


@dataclass(frozen=True)
class Variant:
    """The switches of mmdetection's FCOSHead, and of AdelaiDet's inference."""

    norm_on_bbox: bool = False
    centerness_on_reg: bool = False
    center_sampling: bool = False
    giou: bool = False
    nms: float = 0.5
    limits: tuple[float, ...] = (64, 128, 256, 512)
    num_groups: int = 32
    adelaidet: bool = False


def tower(state: dict, name: str, x, variant: Variant):
    for index in range(4):
        here = f"{HEAD}{name}.{index}."
        weight, bias = state[here + "conv.weight"], state.get(here + "conv.bias")
        if here + "conv.conv_offset.weight" in state:
            predict = [state[f"{here}conv.conv_offset.{part}"] for part in ("weight", "bias")]
            *offset, mask = F.conv2d(x, *predict, padding=1).chunk(3, dim=1)
            x = deform_conv2d(x, torch.cat(offset, 1), weight, bias, 1, 1, 1, mask.sigmoid())
        else:
            x = F.conv2d(x, weight, bias, padding=1)
        scale, shift = state[here + "gn.weight"], state[here + "gn.bias"]
        x = F.relu(F.group_norm(x, variant.num_groups, scale, shift))
    return x


def outputs(state: dict, features: list, variant: Variant):
    """Of all levels, flat by image: class logits (N, R, K), distances in pixels (N, R, 4),
    centerness logits (N, R), and points (R, 2), level of each (R,)."""
    logits, distances, quality, points, levels = [], [], [], [], []
    for level, feature in enumerate(features):
        cls, box = tower(state, "cls_convs", feature, variant), None
        box = tower(state, "reg_convs", feature, variant)
        predict = {
            part: F.conv2d(x, state[f"{HEAD}{part}.weight"], state[f"{HEAD}{part}.bias"], padding=1)
            for part, x in (
                ("conv_cls", cls),
                ("conv_reg", box),
                ("conv_centerness", box if variant.centerness_on_reg else cls),
            )
        }
        raw = state[f"{HEAD}scales.{level}.scale"] * predict["conv_reg"]
        raw = raw.clamp(min=0) * STRIDES[level] if variant.norm_on_bbox else raw.exp()
        logits.append(predict["conv_cls"].flatten(2).transpose(1, 2))
        distances.append(raw.flatten(2).transpose(1, 2))
        quality.append(predict["conv_centerness"].flatten(1))
        height, width = feature.shape[2:]
        half, stride = STRIDES[level] // 2, STRIDES[level]
        points += [
            (x * stride + half, y * stride + half) for y in range(height) for x in range(width)
        ]
        levels += [level] * (height * width)
    return (torch.cat(logits, 1), torch.cat(distances, 1), torch.cat(quality, 1), points, levels)


def target(point, level: int, boxes: list, variant: Variant) -> int:
    """Index of the smallest box that the point learns, or -1."""
    x, y = point
    limits = [-1, *variant.limits, 1e8]
    best, smallest = -1, math.inf
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        sides = x - x1, y - y1, x2 - x, y2 - y
        region = sides
        if variant.center_sampling:
            radius = 1.5 * STRIDES[level]
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            region = (
                *(x - max(x1, cx - radius), y - max(y1, cy - radius)),
                *(min(x2, cx + radius) - x, min(y2, cy + radius) - y),
            )
        area = (x2 - x1) * (y2 - y1)
        in_range = limits[level] <= max(sides) <= limits[level + 1]
        if min(region) > 0 and in_range and area < smallest:
            best, smallest = index, area
    return best


def corners(point, distances):
    x, y = point
    left, top, right, bottom = distances
    return x - left, y - top, x + right, y + bottom


def overlap(a, b):
    """IoU and GIoU of two boxes, of numbers or of scalars with gradients."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0 * width) * max(height, 0 * height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = inner / max(union, 1e-12)
    return iou, iou - (hull - union) / hull


def losses(predictions, truth: list[tuple[list, list]], variant: Variant) -> dict:
    """mmdetection's losses of a batch; `truth` is (boxes, classes) of each image."""
    logits, distances, quality, points, levels = predictions
    wanted = torch.zeros_like(logits)
    box = centerness = weights = positives = 0
    for image, (boxes, classes) in enumerate(truth):
        for index, (point, level) in enumerate(zip(points, levels)):
            match = target(point, level, boxes, variant)
            if match < 0:
                continue
            gt = boxes[match]
            wanted[image, index, classes[match]] = 1
            sides = (point[0] - gt[0], gt[2] - point[0]), (point[1] - gt[1], gt[3] - point[1])
            q = math.sqrt(math.prod(min(pair) / max(pair) for pair in sides))
            iou, giou = overlap(corners(point, distances[image, index]), gt)
            box = box + q * (1 - giou if variant.giou else -iou.clamp(min=1e-6).log())
            logit = quality[image, index]
            centerness = centerness + F.softplus(-logit) + (1 - q) * logit
            weights, positives = weights + q, positives + 1
    p = logits.sigmoid()
    focal = torch.where(
        wanted > 0, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    ).sum()
    return {
        "loss_cls": focal / max(positives, 1),
        "loss_box": box / max(weights, 1e-6),
        "loss_quality": centerness / max(positives, 1),
    }


def detections(predictions, sizes: list, threshold: float, topk: int, variant: Variant) -> list:
    """(box, score, class) of each image, best first."""
    logits, distances, quality, points, levels = predictions
    results = []
    for image, (height, width) in enumerate(sizes):
        probability, center = logits[image].sigmoid().tolist(), quality[image].sigmoid().tolist()
        found = []
        for level in range(len(STRIDES)):
            in_level = []
            for index in [i for i, x in enumerate(levels) if x == level]:
                for k, p in enumerate(probability[index]):
                    if p > threshold:
                        in_level.append((p, p * center[index], k, index))
            # mmdetection chooses by the class score, AdelaiDet by the product.
            in_level.sort(key=lambda x: -x[1 if variant.adelaidet else 0])
            found += in_level[:topk]
        candidates = []
        for _, product, k, index in found:
            box = corners(points[index], distances[image, index].tolist())
            clipped = clip(box, height, width)
            if variant.adelaidet:
                candidates.append((box, math.sqrt(product), k))
            elif clipped[2] > clipped[0] and clipped[3] > clipped[1]:
                candidates.append((clipped, product, k))
        kept = suppress(candidates, variant.nms)[:100]
        kept = [(clip(box, height, width), score, k) for box, score, k in kept]
        results.append([x for x in kept if x[0][2] > x[0][0] and x[0][3] > x[0][1]])
    return results


def clip(box, height: int, width: int):
    return tuple(min(max(x, 0), (width, height)[i % 2]) for i, x in enumerate(box))


def suppress(candidates: list, threshold: float) -> list:
    kept = []
    for box, score, k in sorted(candidates, key=lambda x: -x[1]):
        if all(c != k or overlap(other, box)[0] <= threshold for other, _, c in kept):
            kept.append((box, score, k))
    return kept
