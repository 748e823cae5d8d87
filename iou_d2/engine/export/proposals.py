"""The proposals of an RPN as tensors of one length.

Shape letters: N images, A anchors of a cell, R the anchors of one level, H x W its map.
"""

from __future__ import annotations

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes
from torch import Tensor, nn

from iou_d2.detectors.faster_rcnn import BoxLossRPN
from iou_d2.errors import InputError

from .candidates import (
    Candidates,
    best,
    clipped,
    is_finite,
    joined,
    suppress,
    top,
    usable,
    without_empty,
)


def require_rpn(generator: nn.Module | None) -> None:
    """Raise an InputError where `propose` does not know what `generator` does."""
    if type(generator) not in (RPN, BoxLossRPN):
        raise InputError(
            f"MODEL.PROPOSAL_GENERATOR.NAME {type(generator).__name__} cannot be exported: only "
            "RPN and BoxLossRPN can."
        )


def propose(rpn: RPN, features: dict[str, Tensor], size: tuple[int, int]) -> Candidates:
    """As Detectron2's `find_top_rpn_proposals`, but always POST_NMS_TOPK_TEST of them.

    Args:
        features: of the backbone, by name.
        size: height and width of the images without padding.

    Returns:
        Boxes that are cut at the edges, best first, with the `positive` objectness as scores.
    """
    maps = [features[name] for name in rpn.in_features]
    levels = zip(rpn.anchor_generator(maps), *rpn.rpn_head(maps))
    chosen = [_of_level(rpn, number, *level) for number, level in enumerate(levels)]
    found = joined([anchors for anchors, _ in chosen])
    deltas = torch.cat([deltas for _, deltas in chosen], dim=1)
    # Of all levels at once, which makes smaller graphs.
    boxes = rpn.box2box_transform.apply_deltas(deltas.reshape(-1, 4), found.boxes.reshape(-1, 4))
    found = found._replace(boxes=boxes.view_as(deltas))
    found = without_empty(clipped(usable(found), size), rpn.min_box_size)
    kept = suppress(found.boxes, found.scores, found.classes, len(maps), rpn.nms_thresh)
    found = found._replace(scores=found.scores * kept)
    return best(found, rpn.post_nms_topk[False])


def positive(logits: Tensor) -> Tensor:
    """Logits as positive numbers of the same order, 0 where one is not finite. A sigmoid would make
    all large ones 1."""
    rising = torch.where(logits > 0, 1 + logits, 1 / (1 + logits.abs()))
    return torch.where(is_finite(logits), rising, 0.0)


def _of_level(
    rpn: RPN, number: int, anchors: Boxes, logits: Tensor, deltas: Tensor
) -> tuple[Candidates, Tensor]:
    """The PRE_NMS_TOPK_TEST best anchors, whose class is the `number` of the level, and their
    deltas (N, M, 4).

    Args:
        anchors: R = HWA boxes.
        logits, deltas: (N, A, H, W) and (N, 4A, H, W).
    """
    scores = positive(logits.permute(0, 2, 3, 1).flatten(1).float())  # (N, R)
    deltas = deltas.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
    scores, index = top(scores, rpn.pre_nms_topk[False])
    deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    levels = torch.full_like(index, number, dtype=torch.int64)
    return Candidates(anchors.tensor[index], scores, levels, {}), deltas
