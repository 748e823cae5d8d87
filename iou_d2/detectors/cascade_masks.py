"""The masks of mmdetection's Cascade Mask R-CNN, whose stages have a mask head each.

Shape letters: N images, R boxes of the batch, C channels, S stages, M the side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from torch import Tensor, nn


@ROI_MASK_HEAD_REGISTRY.register()
class CascadeMaskHead(BaseMaskRCNNHead):
    """S mask heads whose probabilities are averaged; all see the final boxes.

    While training all of them see the proposals of the first stage, as the one mask head of
    Detectron2's Cascade R-CNN does; mmdetection shows each those of its own stage.
    """

    @configurable
    def __init__(self, *, stages: Sequence[BaseMaskRCNNHead], **kwargs):
        """
        Args:
            stages: S mask heads.
            kwargs: those of Detectron2's BaseMaskRCNNHead.
        """
        super().__init__(**kwargs)
        self.stages = nn.ModuleList(stages)

    @classmethod
    def from_config(cls, cfg, input_shape):
        count = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
        stages = [MaskRCNNConvUpsampleHead(cfg, input_shape) for _ in range(count)]
        return {**super().from_config(cfg, input_shape), "stages": stages}

    def forward(self, x: Tensor, instances: list[Instances]):
        """Pooled features (R, C, M / 2, M / 2) -> {"loss_mask": ...}, the mean over stages, while
        training; else the `instances` of N images with `pred_masks` (R of the image, 1, M, M)."""
        if self.training:
            losses = [stage(x, instances)["loss_mask"] for stage in self.stages]
            return {"loss_mask": self.loss_weight * sum(losses) / len(losses)}
        masks = [[y.pred_masks for y in stage(x, instances)] for stage in self.stages]
        for of_image, *of_stages in zip(instances, *masks):
            of_image.pred_masks = sum(of_stages) / len(of_stages)
        return instances
