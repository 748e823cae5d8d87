"""NMS of the three kinds against loops over pairs in float64."""

from __future__ import annotations

import math
from typing import Any

import torch

from iou_d2.ops.nms import batched_nms, iou_guided_nms, soft_nms

from .boxes import _iou
from .judge import READ, REFUSED, Surface, Try, require
from .tensors import boxes, laid_out

_CLOSE = 1e-4  # an IoU so near to the threshold may round to either side


def make(prepared: Any, one: Try) -> dict:
    rng = one.rng
    count = rng.choice((0, 1, 2, 5, 12))
    values = boxes(rng, count).float()
    scores = torch.tensor([rng.random() for _ in range(count)])
    if count and rng.random() < 0.2:
        scores[rng.randrange(count)] = rng.choice((math.nan, 0.0, 1.0, scores[0].item()))
    highest = rng.choice((1, 3, 80, 2**20, 2**40))
    classes = torch.tensor([rng.randrange(highest) for _ in range(count)], dtype=torch.int64)
    if rng.random() < 0.05:
        scores = scores.repeat(2)[: count + 1] if count else scores.new_zeros(1)
    return {
        "boxes": laid_out(rng, values),
        "scores": scores,
        "classes": classes,
        "threshold": rng.choice((0.0, 0.3, 0.5, 0.7, 1.0)),
        "kind": rng.choice(("batched", "guided", "linear", "gaussian")),
    }


def judge(case: dict) -> str:
    values, scores, classes = case["boxes"], case["scores"], case["classes"]
    before = scores.clone()
    try:
        keep, kept_scores = _run(case)
    except ValueError as error:
        require(len(scores) != len(values), f"good arguments are refused: {error}")
        return REFUSED
    require(len(scores) == len(values), "scores that are not as many as the boxes are taken")
    require(torch.equal(before.nan_to_num(-1), scores.nan_to_num(-1)), "the scores were changed")
    usable = values.isfinite().all(dim=1) & ~scores.isnan()
    require(bool(usable[keep].all()), "a box that is not finite is kept")
    require(len(set(keep.tolist())) == len(keep), "a box is kept twice")
    if case["kind"] in ("linear", "gaussian"):
        require(bool((kept_scores <= scores[keep] + 1e-6).all()), "a score has risen")
        falling = kept_scores.diff() <= 1e-6
        require(bool(falling.all()), "the scores do not fall")
        return READ
    expected = _expected(values.double(), scores, classes, case["threshold"], usable)
    if expected is not None:
        require(keep.tolist() == expected, f"kept {keep.tolist()}, not {expected}")
    return READ


def _run(case: dict) -> tuple:
    values, scores, classes = case["boxes"], case["scores"], case["classes"]
    if case["kind"] == "batched":
        return batched_nms(values, scores, classes, case["threshold"]), None
    if case["kind"] == "guided":
        return iou_guided_nms(values, scores, scores, classes, case["threshold"])
    return soft_nms(values, scores, classes, case["kind"], min_score=0.01)


def _expected(values, scores, classes, threshold, usable) -> list[int] | None:
    """None where rounding decides, as with boxes that are not upright."""
    sides = values[usable][:, 2:] - values[usable][:, :2]
    if bool((sides <= 1e-3).any()) or bool((values[usable].abs() > 1e5).any()):
        return None
    order = [i for i in scores.sort(descending=True, stable=True).indices.tolist() if usable[i]]
    keep: list[int] = []
    for row in order:
        rivals = [k for k in keep if classes[k] == classes[row]]
        ious = _iou(values[rivals], values[[row] * len(rivals)]) if rivals else values.new_zeros(0)
        if bool(((ious - threshold).abs() < _CLOSE).any()) and threshold > 0:
            return None
        if threshold == 0 and bool(((ious > 0) & (ious < _CLOSE)).any()):
            return None
        if not bool((ious > threshold).any()):
            keep.append(row)
    return keep


SURFACES = {
    "nms": Surface(
        "nms",
        "three kinds of NMS: against loops in float64, what is kept is finite and there once",
        tries=15_000,
        prepare=lambda folder: None,
        make=make,
        judge=judge,
    )
}
