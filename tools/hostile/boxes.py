"""The IoU family and its losses against float64, with boxes of all sorts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iou_d2.ops.box_losses import IOU_KINDS, box_iou_loss
from iou_d2.ops.boxes import aligned_iou

from .judge import READ, REFUSED, Surface, Try, require
from .tensors import DTYPES, boxes, laid_out

# Areas between these are computed in float32 without overflow or loss.
_SMALLEST, _LARGEST = 1e-30, 1e37
# Losses with the range that each has on any boxes.
_RANGES = {"iou": (0, 1), "unitbox": (0, 13.9), "giou": (0, 2), "diou": (0, 2), "ciou": (0, 3.1)}


def make(prepared: Any, one: Try) -> dict:
    rng = one.rng
    count = rng.choice((0, 1, 2, 5, 20))
    first, second = boxes(rng, count), boxes(rng, count)
    if rng.random() < 0.5 and count:  # near one another
        second = first + 0.1 * (second - first)
    dtype = rng.choice((*DTYPES, torch.int64, torch.int32))
    if not dtype.is_floating_point:
        first, second = first.nan_to_num().clamp(-1e6, 1e6), second.nan_to_num().clamp(-1e6, 1e6)
    first, second = (laid_out(rng, x.to(dtype)) for x in (first, second))
    if rng.random() < 0.05:
        second = rng.choice((second[:, :3], second[None], second[:1].repeat(count + 1, 1)))
    return {"first": first, "second": second, "kind": rng.choice(IOU_KINDS)}


def judge_iou(case: dict) -> str:
    first, second = case["first"], case["second"]
    is_float = first.is_floating_point()
    if is_float:
        first = first.detach().requires_grad_()
    try:
        iou = aligned_iou(first, second)
    except ValueError as error:
        require(first.shape != second.shape, f"boxes of one shape are refused: {error}")
        return REFUSED
    require(first.shape == second.shape, "boxes of two shapes are taken")
    values = iou.detach().double()
    usable = _usable(case["first"], second)
    require(not bool(((values < 0) | (values > 1 + 1e-6)).any()), "an IoU is outside of [0, 1]")
    require(bool(values[usable].isfinite().all()), "an IoU of ordinary boxes is not finite")
    off = (values - _iou(case["first"].double(), second.double()))[usable].abs()
    require(not bool((off > 1e-5).any()), "an IoU is off by more than 1e-5")
    if is_float and len(first):
        (gradient,) = torch.autograd.grad(iou[usable].sum(), first)
        require(
            bool(gradient[usable].isfinite().all()), "a gradient of ordinary boxes is not finite"
        )
    return READ


def judge_losses(case: dict) -> str:
    first, second, kind = case["first"], case["second"], case["kind"]
    is_float = first.is_floating_point()
    if is_float:
        first = first.detach().requires_grad_()
    try:
        loss = box_iou_loss(first, second, kind)
    except ValueError as error:
        require(first.shape != second.shape, f"boxes of one shape are refused: {error}")
        return REFUSED
    require(first.shape == second.shape, "boxes of two shapes are taken")
    ordinary = (case["first"].double().abs() < 1e6).all(1) & (second.double().abs() < 1e6).all(1)
    values = loss.detach().double()[ordinary]
    low, high = _RANGES[kind]
    inside = (values >= low - 1e-5) & (values <= high + 1e-5)
    require(bool(inside.all()), f"a loss of {kind} is outside of [{low}, {high}]")
    if is_float and len(first):
        (gradient,) = torch.autograd.grad(loss[ordinary].sum(), first)
        require(bool(gradient[ordinary].isfinite().all()), f"a gradient of {kind} is not finite")
    return READ


def _usable(first: Tensor, second: Tensor) -> Tensor:
    """(R,) whether float32 holds the areas of both boxes."""
    good = torch.ones(len(first), dtype=torch.bool)
    for x in (first.double(), second.double()):
        area = (x[:, 2:] - x[:, :2]).clamp(min=0).prod(dim=1)
        good &= x.isfinite().all(dim=1) & (area < _LARGEST) & ((area > _SMALLEST) | (area == 0))
    # Sides are differences: of what float32 cannot tell apart nothing is known.
    return good & (first.double().abs() < 1e15).all(1) & (second.double().abs() < 1e15).all(1)


def _iou(first: Tensor, second: Tensor) -> Tensor:
    x1, y1, x2, y2 = first.unbind(1)
    u1, v1, u2, v2 = second.unbind(1)
    inner = (x2.minimum(u2) - x1.maximum(u1)).clamp(min=0)
    inner = inner * (y2.minimum(v2) - y1.maximum(v1)).clamp(min=0)
    area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    union = area + (u2 - u1).clamp(min=0) * (v2 - v1).clamp(min=0) - inner
    return torch.where(union > 0, inner / union, 0.0)


SURFACES = {
    "iou": Surface(
        "iou",
        "`aligned_iou`: against float64, in [0, 1], gradients finite",
        tries=30_000,
        prepare=lambda folder: None,
        make=make,
        judge=judge_iou,
    ),
    "box_losses": Surface(
        "box_losses",
        "`box_iou_loss` of all kinds: in its range, gradients finite",
        tries=30_000,
        prepare=lambda folder: None,
        make=make,
        judge=judge_losses,
    ),
}
