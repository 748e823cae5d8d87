"""Oracles: what ground truth takes the place of which prediction (arXiv 2008.13367, Table 1).

Overwritten are, before score threshold, top-k and NMS, the points (or anchors, or proposals) to
which the detector's assigner gives an object of the test image, in training's way; all others stay
as predicted, and so does all else at these points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from iou_d2.errors import InputError
from iou_d2.ops.boxes import aligned_iou, centerness

from .editors import Editor, Foreground

# (editor, predictions, foreground) -> predictions.
Replace = Callable[[Editor, Any, Foreground], Any]


def gt_ctr(editor: Editor, predictions: Any, foreground: Foreground) -> Any:
    """The quality becomes the centerness of the point in its object."""
    points = editor.points(predictions, foreground)
    quality = centerness(points, foreground.boxes)
    return editor.with_quality(predictions, foreground, quality)


def gt_ctr_iou(editor: Editor, predictions: Any, foreground: Foreground) -> Any:
    """The quality becomes the IoU of the predicted box with its object."""
    iou = aligned_iou(editor.boxes(predictions, foreground), foreground.boxes)
    return editor.with_quality(predictions, foreground, iou)


def gt_bbox(editor: Editor, predictions: Any, foreground: Foreground) -> Any:
    """The box becomes that of the object."""
    return editor.with_boxes(predictions, foreground, foreground.boxes)


def gt_cls(editor: Editor, predictions: Any, foreground: Foreground) -> Any:
    """The score of the object's class becomes 1; the other classes keep theirs."""
    ones = torch.ones_like(foreground.boxes[:, 0])
    return editor.with_class_scores(predictions, foreground, ones)


def gt_cls_iou(editor: Editor, predictions: Any, foreground: Foreground) -> Any:
    """The score of the object's class becomes the IoU of the predicted box with the object."""
    iou = aligned_iou(editor.boxes(predictions, foreground), foreground.boxes)
    return editor.with_class_scores(predictions, foreground, iou)


def gt_iou_rank(editor: Editor, predictions: Any, foreground: Foreground) -> Any:
    """The true IoU ranks boxes in IoU-guided NMS (arXiv 1807.11590, Algorithm 1)."""
    return editor.with_true_rank(predictions, foreground)


def anything(editor: Editor) -> str | None:
    return None


def needs_quality(editor: Editor) -> str | None:
    return None if editor.has_quality else "the detector predicts no quality of its boxes"


def needs_centerness(editor: Editor) -> str | None:
    if not editor.has_points:
        return "centerness is that of points, and the detector has none"
    return needs_quality(editor)


def needs_proposals(editor: Editor) -> str | None:
    return None if editor.has_proposals else "IoU-guided NMS is that of two-stage detectors"


@dataclass(frozen=True)
class Oracle:
    """One column of the table.

    Args:
        replace: overwrites the predictions.
        why_not: an editor -> why the oracle has no meaning for its detector, or None.
        is_quality: whether it overwrites what weighs the class score, so that it has no meaning
            where the class score alone ranks.
    """

    replace: Replace
    why_not: Callable[[Editor], str | None] = anything
    is_quality: bool = False


ORACLES: dict[str, Oracle] = {
    "gt_ctr": Oracle(gt_ctr, needs_centerness, is_quality=True),
    "gt_ctr_iou": Oracle(gt_ctr_iou, needs_quality, is_quality=True),
    "gt_bbox": Oracle(gt_bbox),
    "gt_cls": Oracle(gt_cls),
    "gt_cls_iou": Oracle(gt_cls_iou),
    "gt_iou_rank": Oracle(gt_iou_rank, needs_proposals, is_quality=True),
}


def parts_of(name: str) -> list[Oracle]:
    """The oracles that a name such as "gt_bbox+gt_cls" joins, in this order."""
    unknown = [part for part in name.split("+") if part not in ORACLES]
    if unknown:
        raise InputError(
            f"--oracles has {unknown[0]!r}, but there are {', '.join(ORACLES)}, and several of "
            "them joined by '+'."
        )
    return [ORACLES[part] for part in name.split("+")]
