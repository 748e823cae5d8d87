"""The FPNs of RetinaNet in mmdetection and torchvision, where Detectron2 makes p6 of res5 and p7 of
ReLU(p6). Parameters are named as in Detectron2's."""

from __future__ import annotations

from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor, nn


class LinearP6P7(LastLevelP6P7):
    """p6 and p7 by strided convolutions, nothing between."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> p6 and p7, at half and a quarter of its sides."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_linear_p7_backbone(cfg, input_shape) -> FPN:
    """mmdetection's FPN with `add_extra_convs="on_input"`: p6 of res5, and p7 of p6 itself, without
    a ReLU."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LinearP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def build_resnet_fpn_p6p7_of_p5(cfg, input_shape) -> FPN:
    """p6 of p5, and p7 of ReLU(p6), as in FCOS and torchvision's `retinanet_resnet50_fpn`."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return _fpn(cfg, build_resnet_backbone(cfg, input_shape), top_block)


def _fpn(cfg, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    node = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=top_block,
        fuse_type=node.FUSE_TYPE,
    )
