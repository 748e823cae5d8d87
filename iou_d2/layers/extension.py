"""The compiled operators of iou_d2, `torch.ops.iou_d2`, where they are there."""

from __future__ import annotations

try:
    import iou_d2._C  # noqa: F401  (registers the operators)

    HAS_EXTENSION, WHY_NOT = True, ""
except ImportError as error:
    # Not there, or compiled for another torch, whose symbols it does not find.
    HAS_EXTENSION, WHY_NOT = False, str(error)
