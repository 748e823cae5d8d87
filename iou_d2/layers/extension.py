"""The compiled operators of iou_d2, `torch.ops.iou_d2`, where they are there.

Attributes:
    HAS_EXTENSION: whether they are.
    WHY_NOT: what is wrong else, in a few words.
    DEVICES: types of the devices that PrRoI pooling was compiled for; "meta" gives shapes.
"""

from __future__ import annotations

import torch

OPERATORS = ("prroi_pool", "deform_conv", "first_suppressors", "batch_norm")


def _load() -> str:
    try:
        import iou_d2._C  # noqa: F401  (registers the operators)
    except ImportError as error:
        # Not there, or compiled for another torch, whose symbols it does not find.
        return str(error)
    if not all(hasattr(torch.ops.iou_d2, name) for name in OPERATORS):
        return "it was compiled from an older source"
    return ""


def _devices() -> frozenset[str]:
    if not HAS_EXTENSION:
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    compiled = {x for x in ("cpu", "cuda") if has_kernel("iou_d2::prroi_pool", x.upper())}
    return frozenset(compiled | {"meta"})


WHY_NOT = _load()
HAS_EXTENSION = not WHY_NOT
DEVICES = _devices()
