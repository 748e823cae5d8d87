"""Detections of a batch as tensors of one length, and NMS over them, for graphs of any runtime.

Shape letters: N images, K classes, M candidates of an image, S pairs of an image and a kept one.
Boxes are XYXY in pixels of the input. Where an image has fewer than M, a score of 0 stands for
none: no shape depends on what is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor


class Candidates(NamedTuple):
    """What may be detected in N images."""

    boxes: Tensor  # (N, M, 4)
    scores: Tensor  # (N, M), 0 where there is none
    classes: Tensor  # (N, M) int64
    fields: dict[str, Tensor]  # whatever else detections carry, (N, M) each


# (boxes (N, M, 4), scores (N, M), groups (N, M) int64 that never meet, number of groups, IoU) ->
# (N, M) 1 where a candidate is kept and 0 where it is not, whose score is 0 among them.
Suppress = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of scores (N, M), each at least 0, and their indices: both (N, count).

    Where there are fewer, 0 and the index 0 stand for the others. `topk` alone would bake the M of
    the example into a graph.
    """
    best, index = F.pad(scores, (0, count)).topk(count, dim=1)
    return best, torch.where(best > 0, index, torch.zeros_like(index))


def best(candidates: Candidates, count: int) -> dict[str, Tensor]:
    """The outputs of a graph: the `count` best candidates by falling score, by name.

    "boxes" (N, count, 4), "scores", "classes" and the fields (N, count), and "counts" (N,), how
    many of them there are; behind these boxes, scores and fields are 0 and classes -1.
    """
    scores, index = top(candidates.scores, count)
    there = scores > 0
    boxes = candidates.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    outputs = {
        "boxes": torch.where(there[..., None], boxes, torch.zeros_like(boxes)),
        "scores": scores,
        "classes": torch.where(there, candidates.classes.gather(1, index), -1),
    }
    for name, value in candidates.fields.items():
        outputs[name] = torch.where(there, value.gather(1, index), torch.zeros_like(scores))
    return {**outputs, "counts": there.sum(dim=1)}


def usable(candidates: Candidates) -> Candidates:
    """Those whose box is finite, as `batched_nms` has it; the others are made none."""
    finite = candidates.boxes.isfinite().all(dim=-1)
    return candidates._replace(
        boxes=torch.where(finite[..., None], candidates.boxes, torch.zeros_like(candidates.boxes)),
        scores=torch.where(finite, candidates.scores, torch.zeros_like(candidates.scores)),
    )


def suppress_in_torch(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, threshold: float
) -> Tensor:
    """A `Suppress` of torchvision's op, for TorchScript and torch.export.

    Groups and images are set side by side, in float64, which no coordinate is rounded in.
    """
    number = torch.arange(len(boxes), device=boxes.device)[:, None] * num_groups + groups
    room = boxes.max() - boxes.min() + 1
    apart = boxes.double() + (number * room)[..., None].double()
    (index,) = torch.nonzero(scores.flatten() > 0, as_tuple=True)
    kept = torchvision.ops.nms(
        apart.reshape(-1, 4)[index], scores.flatten()[index].double(), threshold
    )
    return _mask(scores, index[kept])


def suppress_in_onnx(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, threshold: float
) -> Tensor:
    """A `Suppress` of ONNX's NonMaxSuppression, which knows images and classes itself."""
    numbers = torch.arange(num_groups, device=boxes.device)[:, None]
    by_group = scores[:, None] * (groups[:, None] == numbers)  # (N, groups, M)
    found = _NonMaxSuppression.apply(boxes, by_group, threshold)
    return _mask(scores, found[:, 0] * scores.shape[1] + found[:, 2])


def _mask(scores: Tensor, kept: Tensor) -> Tensor:
    """Flat indices of `scores` (N, M) -> (N, M), 1 at these and 0 elsewhere."""
    mask = torch.zeros_like(scores).flatten()
    return mask.scatter(0, kept, torch.ones_like(kept, dtype=scores.dtype)).view_as(scores)


class _NonMaxSuppression(torch.autograd.Function):
    """Boxes (N, M, 4), scores (N, groups, M) -> (S, 3): image, group and candidate."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        found = [torch.zeros(0, 3, dtype=torch.int64)]
        for image, groups in enumerate(scores):
            for group, values in enumerate(groups):
                (index,) = torch.nonzero(values > 0, as_tuple=True)
                kept = index[torchvision.ops.nms(boxes[image, index], values[index], threshold)]
                found.append(torch.tensor([image, group, 0]) + kept[:, None] * kept.new_tensor([0, 0, 1]))
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
