"""Detections of a batch as tensors of one length, and NMS over them, for graphs of any runtime.

Shape letters: N images, K classes, M candidates of an image, S pairs of an image and a kept one.
Boxes are XYXY in pixels of the input. Where an image has fewer than M, a score of 0 stands for
none: no shape depends on what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor


class Candidates(NamedTuple):
    """What may be detected in N images."""

    boxes: Tensor  # (N, M, 4)
    scores: Tensor  # (N, M), 0 where there is none
    classes: Tensor  # (N, M) int64
    fields: dict[str, Tensor]  # whatever else detections carry, (N, M) each


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of scores (N, M), each at least 0, and their indices: both (N, count). Of
    equal ones among these the first comes first.

    Where there are fewer, 0 and the index 0 stand for the others. `topk` alone would bake the M of
    the example into a graph.
    """
    scores = torch.cat([scores, scores.new_zeros(scores.shape[0], count)], dim=1)
    best, index = scores.topk(count, dim=1)
    if not torch.onnx.is_in_onnx_export():  # ONNX's TopK settles ties itself, and torch's does not
        index = index.sort(dim=1).values
        best, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
        index = index.gather(1, order)
    return best, torch.where(best > 0, index, 0)


def best(candidates: Candidates, count: int) -> Candidates:
    """The `count` best of each image by falling score. Behind those that there are, boxes, scores
    and fields are 0 and classes -1."""
    scores, index = top(candidates.scores, count)
    there = scores > 0
    boxes = candidates.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return Candidates(
        torch.where(there[..., None], boxes, 0.0),
        scores,
        torch.where(there, candidates.classes.gather(1, index), -1),
        {
            name: torch.where(there, value.gather(1, index), 0.0)
            for name, value in candidates.fields.items()
        },
    )


def outputs_of(candidates: Candidates) -> dict[str, Tensor]:
    """What a graph puts out of what `best` gave, by name: "counts" (N,) says how many there are."""
    boxes, scores, classes, fields = candidates
    counts = (scores > 0).sum(dim=1)
    return {"boxes": boxes, "scores": scores, "classes": classes, **fields, "counts": counts}


def joined(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of several levels as those of one."""
    boxes, scores, classes, fields = zip(*parts)
    return Candidates(
        torch.cat(boxes, dim=1),
        torch.cat(scores, dim=1),
        torch.cat(classes, dim=1),
        {name: torch.cat([x[name] for x in fields], dim=1) for name in fields[0]},
    )


def without_empty(candidates: Candidates, min_side: float = 0.0) -> Candidates:
    """Those of whose box both sides are over `min_side` pixels; the others are made none."""
    sides = candidates.boxes[..., 2:] - candidates.boxes[..., :2]
    full = (sides > min_side).all(dim=-1)
    return candidates._replace(scores=torch.where(full, candidates.scores, 0.0))


def clipped(candidates: Candidates, size: tuple[int, int]) -> Candidates:
    """With the boxes cut at the edges of images of `size`, (height, width)."""
    return candidates._replace(boxes=clip(candidates.boxes, size))


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) inside images of `size`, (height, width)."""
    # Limits that a tracer follows, which `clamp` would make constants.
    one = boxes.new_ones(1)
    limits = torch.cat([one * size[1], one * size[0]] * 2)
    return torch.minimum(boxes.clamp(min=0), limits)


def usable(candidates: Candidates) -> Candidates:
    """Those whose box is finite, as `batched_nms` has it; the others are made none."""
    finite = is_finite(candidates.boxes).all(dim=-1)
    return candidates._replace(
        boxes=torch.where(finite[..., None], candidates.boxes, 0.0),
        scores=torch.where(finite, candidates.scores, 0.0),
    )


def is_finite(x: Tensor) -> Tensor:
    """What `isfinite` says, which ONNX needs five nodes for."""
    return x.abs() < torch.inf


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, threshold: float
) -> Tensor:
    """Non-maximum suppression of each image and group.

    Args:
        boxes: (N, M, 4), finite.
        scores: (N, M); where one is 0 there is no box.
        groups: (N, M), 0..num_groups - 1; those of different ones never meet.
        threshold: an IoU over it suppresses.

    Returns:
        (N, M), 1 where a box is kept and 0 where it is not.
    """
    nms = _onnx_nms if torch.onnx.is_in_onnx_export() else _torch_nms
    kept = nms(boxes, scores, groups, num_groups, threshold)
    mask = torch.zeros_like(scores).reshape(-1)
    return mask.scatter(0, kept, torch.ones_like(kept, dtype=scores.dtype)).view_as(scores)


def _torch_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, threshold: float
) -> Tensor:
    """Flat indices of the kept boxes, by torchvision's operator. Groups and images are set side by
    side, in float64, which rounds no coordinate."""
    number = torch.arange(boxes.shape[0], device=boxes.device)[:, None] * num_groups + groups
    first = boxes.min().double()
    room = boxes.max() - first + 1
    apart = boxes.double() + (number * room)[..., None]
    (index,) = torch.nonzero(scores.reshape(-1) > 0, as_tuple=True)
    # Two more, which are kept and come last: a program of torch.export, to which torchvision says
    # that at least two are kept, fails where there are fewer.
    others = first - apart.new_tensor([[2, 2, 1, 1], [4, 4, 3, 3]])
    apart = torch.cat([apart.reshape(-1, 4)[index], others])
    scores = torch.cat([scores.reshape(-1)[index], scores.new_zeros(2)]).double()
    return index[torchvision.ops.nms(apart, scores, threshold)[:-2]]


def _onnx_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, threshold: float
) -> Tensor:
    """The same by ONNX's NonMaxSuppression, which knows images and groups itself."""
    numbers = torch.arange(num_groups, device=boxes.device)[:, None]
    by_group = scores[:, None] * (groups[:, None] == numbers)  # (N, groups, M)
    found = _NonMaxSuppression.apply(boxes, by_group, threshold)
    return found[:, 0] * scores.shape[1] + found[:, 2]


class _NonMaxSuppression(torch.autograd.Function):
    """Boxes (N, M, 4), scores (N, groups, M) -> (S, 3): image, group and candidate."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        found = [torch.zeros(0, 3, dtype=torch.int64)]
        for image, groups in enumerate(scores):
            for group, values in enumerate(groups):
                (index,) = torch.nonzero(values > 0, as_tuple=True)
                kept = index[torchvision.ops.nms(boxes[image, index], values[index], threshold)]
                found.append(
                    torch.tensor([image, group, 0]) + kept[:, None] * kept.new_tensor([0, 0, 1])
                )
        return torch.cat(found)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, threshold: float) -> Any:
        limits = (
            torch.tensor([torch.iinfo(torch.int64).max]),  # boxes of a group at most
            torch.tensor([threshold]),
            torch.tensor([0.0]),  # a score is over it
        )
        limits = [g.op("Constant", value_t=limit) for limit in limits]
        return g.op("NonMaxSuppression", boxes, scores, *limits)
