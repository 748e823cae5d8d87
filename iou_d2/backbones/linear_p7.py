"""The FPN of mmdetection's RetinaNet: p7 is a convolution of p6 itself, without a ReLU between.

Parameters are named as in Detectron2's RetinaNet, whose p7 sees ReLU(p6).
"""

from __future__ import annotations

from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor


class LinearP6P7(LastLevelP6P7):
    """p6 and p7 by strided convolutions, nothing between."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> p6 and p7, at half and a quarter of its sides."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_linear_p7_backbone(cfg, input_shape) -> FPN:
    """Detectron2's `build_retinanet_resnet_fpn_backbone`, p6 of res5 too, without the ReLU before
    p7: mmdetection's FPN with `add_extra_convs="on_input"`."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LinearP6P7(bottom_up.output_shape()["res5"].channels, channels),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
