"""Assigners, jittered boxes and refinement: what they promise holds for boxes of all sorts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from iou_d2.ops.assign import ATSSAssigner, FCOSAssigner
from iou_d2.ops.jitter import jitter_offsets, jittered_boxes
from iou_d2.ops.refine import refine_boxes

from .boxes import _iou
from .judge import READ, Surface, Try, require
from .tensors import DTYPES, boxes, laid_out

STRIDES = (8, 16)


def make(prepared: Any, one: Try) -> dict:
    rng = one.rng
    count = rng.choice((0, 1, 2, 6))
    truth = boxes(rng, count).to(rng.choice(DTYPES))
    sides = rng.choice(((8, 4), (5, 3), (1, 1), (16, 8)))
    points = [_grid(side, stride) for side, stride in zip(sides, STRIDES)]
    return {"truth": laid_out(rng, truth), "points": points, "kind": rng.choice(("atss", "fcos"))}


def _grid(side: int, stride: int) -> Tensor:
    steps = (torch.arange(side) + 0.5) * stride
    return torch.cartesian_prod(steps, steps).view(-1, 2).flip(1)


def judge_assigner(case: dict) -> str:
    truth, points = case["truth"], case["points"]
    ranges = ((-1, 32), (32, 1e8))
    assign = ATSSAssigner(topk=3) if case["kind"] == "atss" else FCOSAssigner(ranges)
    index = assign(points, STRIDES, truth)
    everywhere = torch.cat(points).double()
    require(index.shape == everywhere.shape[:1], f"the shape is {tuple(index.shape)}")
    require(bool(((index >= -1) & (index < len(truth))).all()), "an index is out of range")
    taken = index >= 0
    box = truth.double()[index[taken]]
    inside = (everywhere[taken] > box[:, :2]) & (everywhere[taken] < box[:, 2:])
    require(bool(inside.all()), "a point is given a box that it is not inside of")
    if case["kind"] == "fcos":
        expected = _fcos(everywhere, [len(level) for level in points], ranges, truth)
        require(index.tolist() == expected, f"FCOS assigns {index.tolist()}, not {expected}")
    return READ


def _fcos(points: Tensor, sizes: list[int], ranges: tuple, truth: Tensor) -> list[int]:
    dtype = torch.promote_types(truth.dtype, torch.float32)
    levels = [level for level, size in enumerate(sizes) for _ in range(size)]
    rows = truth.to(dtype)
    areas = (rows[:, 2:] - rows[:, :2]).prod(dim=1)
    found = []
    for (x, y), level in zip(points.to(dtype), levels):
        best = -1
        for row, (x1, y1, x2, y2) in enumerate(rows):
            distances = torch.stack([x - x1, y - y1, x2 - x, y2 - y])
            low, high = ranges[level]
            fits = distances.isfinite().all() and distances.min() > 0
            if fits and low <= distances.max() <= high and (best < 0 or areas[row] < areas[best]):
                best = row
        found.append(best)
    return found


@lru_cache(maxsize=1)
def _offsets() -> Tensor:
    return jitter_offsets(per_step=4)


def make_moved(prepared: Any, one: Try) -> dict:
    rng = one.rng
    count = rng.choice((0, 1, 3, 8))
    size = rng.choice(((100, 200), (1, 1), (800, 1333)))
    values = boxes(rng, count, finite=True).float()
    target = boxes(rng, count, wild=0.0).float()
    return {
        "boxes": values,
        "target": target,
        "size": size,
        "kind": rng.choice(("jitter", "refine")),
        "seed": rng.getrandbits(32),
        "step_size": rng.choice((0.0, 0.5, 10.0, 1e30)),
        "steps": rng.randint(0, 4),
    }


def judge_moved(case: dict) -> str:
    torch.manual_seed(case["seed"])
    height, width = case["size"]
    limits = torch.tensor([[width, height]]).expand(len(case["boxes"]), 2).float()
    if case["kind"] == "jitter":
        moved, index, ious = jittered_boxes(
            case["boxes"], case["size"], _offsets(), per_gt=20, per_image=50
        )
        require(len(moved) == len(index) == len(ious) <= 50, "the lengths differ")
        require(bool(((ious >= 0.5) & (ious <= 1 + 1e-6)).all()), "an IoU is outside of [0.5, 1]")
        off = (_iou(moved.double(), case["boxes"][index].double()) - ious).abs()
        tolerable = case["boxes"][index].abs().amax(dim=1) < 1e6 if len(index) else off < 0
        require(not bool((off[tolerable] > 1e-3).any()), "an IoU is not that of its boxes")
        limits = limits[index]
    else:
        moved, scores = refine_boxes(
            case["boxes"], _score(case), limits, steps=case["steps"], step_size=case["step_size"]
        )
        require(bool(scores.isfinite().all()), "a score is not finite")
    require(bool(moved.isfinite().all()), "a box is not finite")
    require(bool((moved >= 0).all() and (moved[:, 2:] <= limits).all()), "a box leaves its image")
    require(bool((moved[:, 2:] >= moved[:, :2]).all()), "a box is inverted")
    return READ


def _score(case: dict):
    target = case["target"]
    return lambda moved, index: -((moved - target[index]) / 100).square().sum(dim=1)


SURFACES = {
    "assigners": Surface(
        "assigners",
        "ATSS and FCOS: points lie inside their boxes, FCOS against loops",
        tries=6_000,
        prepare=lambda folder: None,
        make=make,
        judge=judge_assigner,
    ),
    "jitter_refine": Surface(
        "jitter_refine",
        "`jittered_boxes`, `refine_boxes`: inside the image, never inverted, finite",
        tries=8_000,
        prepare=lambda folder: None,
        make=make_moved,
        judge=judge_moved,
    ),
}
