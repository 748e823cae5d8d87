"""The masks of Mask R-CNN, for the boxes of all images in one tensor.

Shape letters: N images, R boxes of all images, K classes, M the side of a mask.
"""

from __future__ import annotations

from detectron2.modeling.roi_heads import ROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn

from iou_d2.detectors.cascade_masks import CascadeMaskHead
from iou_d2.errors import InputError

from .box_heads import RES5, box_pooling_of
from .pooling import pooling_of, require_pooler


def require_mask_head(heads: ROIHeads) -> None:
    """Raise an InputError where `masks_of` does not know what the mask head does."""
    for stage in _stages(heads.mask_head):
        if type(stage) is not MaskRCNNConvUpsampleHead:
            raise InputError(
                f"MODEL.ROI_MASK_HEAD.NAME {type(stage).__name__} cannot be exported: only "
                "MaskRCNNConvUpsampleHead and CascadeMaskHead can. MODEL.MASK_ON False exports the "
                "boxes alone."
            )
    if type(heads) not in RES5:
        require_pooler(heads.mask_pooler, "MODEL.ROI_MASK_HEAD.POOLER_TYPE")


def masks_of(
    heads: ROIHeads,
    features: dict[str, Tensor],
    boxes: Tensor,
    images: Tensor,
    classes: Tensor,
) -> Tensor:
    """Probabilities (R, M, M) that the parts of a box belong to its object.

    Args:
        boxes, images, classes: (R, 4), (R,) int64 and (R,) int64; what a class of -1 gives means
            nothing.
    """
    pooled = _pooled(heads, features, boxes, images)
    stages = _stages(heads.mask_head)
    return sum(_of_class(stage.layers(pooled), classes) for stage in stages) / len(stages)


def _pooled(heads: ROIHeads, features: dict[str, Tensor], boxes: Tensor, images: Tensor) -> Tensor:
    """(R, C, P, P): what mask heads read of boxes (R, 4) of `images` (R,)."""
    if type(heads) in RES5:
        return heads.res5(box_pooling_of(heads, features)(boxes, images))
    maps = [features[name] for name in heads.mask_in_features]
    return pooling_of(heads.mask_pooler, maps)(boxes, images)


def _stages(mask_head: nn.Module) -> list[nn.Module]:
    return list(mask_head.stages) if type(mask_head) is CascadeMaskHead else [mask_head]


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """(R, 1 or K, M, M) -> (R, M, M)"""
    if logits.shape[1] == 1:
        return logits[:, 0].sigmoid()
    index = classes.clamp(min=0)[:, None, None, None].expand(-1, 1, *logits.shape[2:])
    return logits.gather(1, index).squeeze(1).sigmoid()
