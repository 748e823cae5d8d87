"""What PointDetector is to compute, by loops over points, and the configs that it is tried with."""

from __future__ import annotations

import math

import torch
from detectron2.modeling import build_model

NAMES = (
    *("vfnet", "vfnet_star", "vfnet_vfl", "vfnet_raw"),
    *("atss", "atss_iou", "atss_points", "fcos"),
)
WITH_QUALITY = ("atss", "atss_iou", "atss_points", "fcos")
CONFIGS = {name: f"configs/{name}_R_50_FPN_1x.yaml" for name in NAMES}


# For objects in images of 96 px, small enough for loops.
SMALL = (
    *("MODEL.POINT_DETECTOR.DISTANCE_UNITS", "[16, 32, 64, 128, 256]"),
    *("MODEL.POINT_DETECTOR.MAX_DISTANCES", "[16, 32, 64, 128, 256]"),
    *("MODEL.POINT_DETECTOR.ANCHOR_SCALE", "3.0", "MODEL.POINT_DETECTOR.NUM_GROUPS", "8"),
)


def predict(model, batch):
    """What the model says of each level, and where its points are."""
    with torch.no_grad():
        predictions = model.predict(model.preprocess_image(batch).tensor)
    return predictions, [prediction.points for prediction in predictions]


def iou_and_giou(a: list[float], b: list[float]) -> tuple[float, float]:
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inner / union, inner / union - (hull - union) / hull


def decode(prediction, stage: int, image: int, cell: tuple[int, int], point) -> list[float]:
    left, top, right, bottom = prediction.distances[stage][(image, slice(None), *cell)].tolist()
    x, y = point.tolist()
    return [x - left, y - top, x + right, y + bottom]


def cells(prediction, points):
    """(index, (row, column), point) of each point of a level."""
    width = prediction.logits.shape[3]
    return [(i, divmod(i, width), point) for i, point in enumerate(points)]


def class_loss(name: str, p: float, q: float) -> float:
    if name in (*WITH_QUALITY, "vfnet_raw"):
        return -0.25 * (1 - p) ** 2 * math.log(p) if q > 0 else -0.75 * p**2 * math.log(1 - p)
    if q > 0:
        return -q * (q * math.log(p) + (1 - q) * math.log(1 - p))
    return -0.75 * p**2 * math.log(1 - p)


def box_loss(kind: str, box: list[float], gt: list[float], stride: int) -> float:
    errors = [abs(x - y) / stride for x, y in zip(box, gt)]
    if kind == "l2":
        return sum(e * e for e in errors)
    if kind == "smooth_l1":
        return sum(e * e / 0.4 if e < 0.2 else e - 0.1 for e in errors)
    iou, giou = iou_and_giou(box, gt)
    if kind == "unitbox":
        return -math.log(max(iou, 1e-6))
    return 1 - giou if kind == "giou" else 1 - iou


def losses_by_hand(name: str, model, batch, kind: str | None = None) -> dict[str, float]:
    kind = kind or ("unitbox" if name == "fcos" else "giou")
    predictions, points = predict(model, batch)
    stages = len(predictions[0].distances)
    box, weights = [0.0] * stages, [0.0] * stages
    cls = quality_loss = positives = 0
    for image, sample in enumerate(batch):
        truth = sample["instances"]
        matches = model.assigner(points, model.grid.strides, truth.gt_boxes.tensor).tolist()
        for prediction, level, stride in zip(predictions, points, model.grid.strides):
            for index, cell, point in cells(prediction, level):
                match, q = matches[index], 0.0
                gt = truth.gt_boxes.tensor[match].tolist() if match >= 0 else None
                for stage in range(stages if gt else 0):
                    decoded = decode(prediction, stage, image, cell, point)
                    q = max(iou_and_giou(decoded, gt)[0], 1e-6)
                    if name in ("atss", "atss_points", "fcos"):
                        x, y = point.tolist()
                        sides = [x - gt[0], gt[2] - x], [y - gt[1], gt[3] - y]
                        q = math.sqrt(math.prod(min(s) / max(s) for s in sides))
                    box[stage] += q * box_loss(kind, decoded, gt, stride)
                    weights[stage] += q
                positives += match >= 0
                for k, logit in enumerate(prediction.logits[(image, slice(None), *cell)].tolist()):
                    own = match >= 0 and truth.gt_classes[match] == k
                    cls += class_loss(name, 1 / (1 + math.exp(-logit)), q if own else 0.0)
                if match >= 0 and prediction.quality_logits is not None:
                    logit = prediction.quality_logits[(image, 0, *cell)].item()
                    quality_loss += math.log(1 + math.exp(-logit)) + (1 - q) * logit
            matches = matches[len(level) :]
    assert positives > 5
    factor = 1 if name == "fcos" else 2
    losses = {"loss_box": factor * box[-1] / weights[-1], "loss_cls": cls / positives}
    if stages == 2:
        losses["loss_box_initial"] = 1.5 * box[0] / weights[0]
    if name in WITH_QUALITY:
        losses["loss_quality"] = quality_loss / positives
    return losses


def point_detector_builder(small_cfg):
    """A function: name of a config -> its model, with random heads that detect something."""

    def build(name: str, *overrides: str):
        torch.manual_seed(0)
        model = build_model(small_cfg(CONFIGS[name], *SMALL, *overrides))
        for part, parameter in model.head.named_parameters():
            if "_pred.weight" in part:
                torch.nn.init.normal_(parameter, std=0.08)
            elif "_pred.bias" in part:
                torch.nn.init.constant_(parameter, -0.5)
        return model

    return build
