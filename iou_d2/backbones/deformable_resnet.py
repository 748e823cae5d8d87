"""The ResNet with FPN whose bottlenecks may be deformable, without Detectron2's compiled code.

Parameters are named as in Detectron2's DeformBottleneckBlock, whose checkpoints load.
Shape letters: N images, C channels, H and W of the input, h and w of the output.
"""

from __future__ import annotations

from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import Tensor

from iou_d2.errors import InputError
from iou_d2.layers.deform_conv import deform_conv, geometry, offset_conv, split_offsets

from .retinanet_fpn import LinearP6P7

BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class DeformBottleneck(BottleneckBlock):
    """A bottleneck whose 3x3 convolution, `conv2`, is deformable by what `conv2_offset` predicts.

    The groups of `conv2` (ResNeXt) are its own; `conv2_offset` is never grouped.
    """

    def __init__(self, *args, deform_modulated: bool = True, deform_num_groups: int = 1, **kwargs):
        """
        Args:
            args, kwargs: those of Detectron2's BottleneckBlock.
            deform_modulated: v2, with a mask, and not v1.
            deform_num_groups: groups of input channels that share their offsets.
        """
        super().__init__(*args, **kwargs)
        self.deform_modulated = deform_modulated
        values = 3 if deform_modulated else 2
        self.conv2_offset = offset_conv(self.conv2, values, deform_num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, h, w)."""
        y = self.conv1(x).relu_()
        offset, mask = self.conv2_offset(y), None
        if self.deform_modulated:
            offset, mask = split_offsets(offset)
        y = deform_conv(y, offset, self.conv2.weight, mask=mask, **geometry(self.conv2))
        y = self.conv3(self.conv2.norm(y).relu_())
        y = y + (x if self.shortcut is None else self.shortcut(x))
        return y.relu_()


def build_deformable_resnet_backbone(cfg, input_shape) -> ResNet:
    """Detectron2's `build_resnet_backbone` with DeformBottleneck for its deformable block.

    Reads the same keys of MODEL.RESNETS, DEFORM_ON_PER_STAGE, DEFORM_MODULATED and
    DEFORM_NUM_GROUPS among them. Raises InputError for a depth without bottlenecks.
    """
    node = cfg.MODEL.RESNETS
    if not any(node.DEFORM_ON_PER_STAGE):
        return build_resnet_backbone(cfg, input_shape)
    if node.DEPTH not in BLOCKS_PER_STAGE:
        raise InputError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs MODEL.RESNETS.DEPTH 50, 101 or 152, whose "
            f"blocks are bottlenecks, but DEPTH is {node.DEPTH}."
        )
    channels = node.STEM_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, channels, norm=node.NORM)
    stages = []
    for index, count in enumerate(BLOCKS_PER_STAGE[node.DEPTH]):
        dilation = node.RES5_DILATION if index == 3 else 1
        stride = 1 if index == 0 or dilation > 1 else 2
        block = {
            "bottleneck_channels": node.NUM_GROUPS * node.WIDTH_PER_GROUP * 2**index,
            "num_groups": node.NUM_GROUPS,
            "norm": node.NORM,
            "stride_in_1x1": node.STRIDE_IN_1X1,
            "dilation": dilation,
            "stride_per_block": [stride] + [1] * (count - 1),
        }
        block_class = BottleneckBlock
        if node.DEFORM_ON_PER_STAGE[index]:
            block_class = DeformBottleneck
            block["deform_modulated"] = node.DEFORM_MODULATED
            block["deform_num_groups"] = node.DEFORM_NUM_GROUPS
        wider = node.RES2_OUT_CHANNELS * 2**index
        stages.append(
            ResNet.make_stage(block_class, count, in_channels=channels, out_channels=wider, **block)
        )
        channels = wider
    return ResNet(
        stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )


@BACKBONE_REGISTRY.register()
def build_deformable_resnet_fpn_p6p7_backbone(cfg, input_shape) -> FPN:
    """FPN over `build_deformable_resnet_backbone`, with p6 and p7 by strided convolutions of p5.

    The FPN of VarifocalNet and FCOS (arXiv 2008.13367); RetinaNet's makes p6 of res5. Without a
    deformable stage it is an ordinary ResNet, of any depth.
    """
    return _build_fpn(cfg, input_shape, LastLevelP6P7)


@BACKBONE_REGISTRY.register()
def build_deformable_resnet_fpn_linear_p7_backbone(cfg, input_shape) -> FPN:
    """The same without the ReLU between p6 and p7: the FPN of mmdetection's ATSS."""
    return _build_fpn(cfg, input_shape, LinearP6P7)


def _build_fpn(cfg, input_shape, top_block: type[LastLevelP6P7]) -> FPN:
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_deformable_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
