"""Views of an image by Pillow and NumPy alone, and boxes that come back from them in float64."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(3, H, W) uint8 -> (3, *size)."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    pixels = np.asarray(pixels.resize(size[::-1], Image.BILINEAR))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def views_of(image: torch.Tensor, sizes: list[tuple[int, int]], mirrors: bool):
    """[(view, whether it is mirrored)]."""
    views = []
    for size in sizes:
        view = resized(image, size)
        views.append((view, False))
        if mirrors:
            views.append((view.flip(2), True))
    return views


def to_image(boxes: torch.Tensor, view: torch.Tensor, mirrored: bool, image: torch.Tensor):
    """Boxes (R, 4) of a view -> those in the image, in float64."""
    boxes = boxes.double().clone()
    if mirrored:
        boxes[:, [0, 2]] = view.shape[2] - boxes[:, [2, 0]]
    boxes[:, 0::2] *= image.shape[2] / view.shape[2]
    boxes[:, 1::2] *= image.shape[1] / view.shape[1]
    return boxes


def rows(boxes, scores, classes, image: torch.Tensor) -> torch.Tensor:
    """What is left of detections in an image: (S, 6) by falling score, those without area out."""
    boxes = boxes.double().clone()
    boxes[:, 0::2].clamp_(0, image.shape[2])
    boxes[:, 1::2].clamp_(0, image.shape[1])
    found = torch.cat([boxes, scores.double()[:, None], classes.double()[:, None]], dim=1)
    found = found[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
    return found[found[:, 4].argsort(descending=True, stable=True)]


def nms_rows(boxes, scores, classes, image, threshold: float, limit: int) -> torch.Tensor:
    """`rows` of what torchvision's NMS keeps in float64."""
    keep = batched_nms(boxes.double(), scores.double(), classes, threshold)[:limit]
    return rows(boxes[keep], scores[keep], classes[keep], image)


def rows_of(instances, image: torch.Tensor) -> torch.Tensor:
    return rows(instances.pred_boxes.tensor, instances.scores, instances.pred_classes, image)


def mirrored_rows(found: torch.Tensor, width: int) -> torch.Tensor:
    found = found.clone()
    found[:, [0, 2]] = width - found[:, [2, 0]]
    return found


def sorted_rows(found: torch.Tensor) -> torch.Tensor:
    """In an order that does not depend on that of equal scores."""
    return torch.tensor(sorted([round(x, 3) for x in row] for row in found.tolist()))


def nms_by_loops(boxes, ranks, scores, classes, threshold: float) -> list:
    """NMS of each class by `ranks`: [(index, the best score that it suppresses or its own)]."""
    left, kept = ranks.argsort(descending=True).tolist(), []
    while left:
        best = left[0]
        suppressed = [
            i
            for i in left
            if classes[i] == classes[best]
            and (i == best or iou(boxes[i].tolist(), boxes[best].tolist()) > threshold)
        ]
        kept.append((best, max(scores[i].item() for i in suppressed)))
        left = [i for i in left if i not in suppressed]
    return kept


def vote_by_loops(boxes, scores, classes, threshold: float, soft: float | None = None) -> list:
    """RefineDet's box voting in Python floats: [(box, score, class)] by falling score."""
    left = [
        (s, b, c) for b, s, c in zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True)
    ]
    left.sort(key=lambda x: -x[0])
    found = []
    while left:
        score, box, class_ = left[0]
        others = [x for x in left[1:] if x[2] == class_ and iou(box, x[1]) >= threshold]
        joins = [left[0], *others]
        left = [x for x in left if not any(x is y for y in joins)]
        total = sum(x[0] for x in joins)
        mean = [sum(x[0] * x[1][i] for x in joins) / total for i in range(4)]
        found.append((mean, score, class_))
        if soft is not None and len(joins) > 1:
            softer = [(x[1], x[0] * (1 - iou(box, x[1])), x[2]) for x in joins]
            found += [x for x in softer if x[1] >= soft]
    return sorted(found, key=lambda x: -x[1])


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / union if union else 0.0
