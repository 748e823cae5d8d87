"""ResNet-10 with FPN: the backbone of the quick configs, small enough to train on a CPU."""

from __future__ import annotations

from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem


def build_resnet10_backbone(cfg, input_shape) -> ResNet:
    """A stem and four stages of one BasicBlock; reads the keys of MODEL.RESNETS that name channels.

    Stage i has RES2_OUT_CHANNELS * 2^i channels at stride 4 * 2^i. Nothing is frozen.
    """
    norm = cfg.MODEL.RESNETS.NORM
    channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, channels, norm=norm)
    stages = []
    for index in range(4):
        wider = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2**index
        block = BasicBlock(channels, wider, stride=1 if index == 0 else 2, norm=norm)
        stages.append([block])
        channels = wider
    return ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)


@BACKBONE_REGISTRY.register()
def build_resnet10_fpn_backbone(cfg, input_shape) -> FPN:
    """FPN over `build_resnet10_backbone`, with p6 by pooling, as build_resnet_fpn_backbone."""
    return FPN(
        bottom_up=build_resnet10_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
