"""Deformable convolution on torchvision's op, and the ResNet with FPN that uses it.

Unlike Detectron2's, the op runs forward and backward on the CPU and needs no compiled Detectron2.
Parameters are named as in Detectron2's DeformBottleneckBlock, whose checkpoints load.

Shape letters: N images, C channels, H and W of the input, h and w of the output, G offset groups,
T the taps of the kernel (9 of a 3x3), row-major.
"""

from __future__ import annotations

import torch
import torchvision
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import Tensor, nn

BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def deform_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """`torchvision.ops.deform_conv2d`, safe under autocast and where training diverges.

    Args:
        x: (N, C, H, W). Half precision is computed in float32, as the CPU has no bfloat16.
        offset: (N, 2GT, h, w), a (dy, dx) for each tap, in cells of `x`.
        weight, bias: as of a convolution; groups follow from the shapes.
        mask: (N, GT, h, w), a factor of each tap; None is deformable convolution v1.

    Returns:
        (N, C_out, h, w) in the dtype of `x`; N may be 0. NaN where an offset is not finite.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = (None if part is None else part.to(dtype) for part in (offset, weight, bias, mask))
    offset, weight, bias, mask = parts
    with torch.autocast(x.device.type, enabled=False):
        # The op reads outside of its memory where an offset is NaN.
        y = torchvision.ops.deform_conv2d(
            x.to(dtype), offset.nan_to_num(), weight, bias, stride, padding, dilation, mask
        )
    nan_or_zero = (0 * offset.detach()).sum(dim=1, keepdim=True)
    return (y + nan_or_zero).to(x.dtype)


def split_offsets(prediction: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3GT, h, w) of an offset convolution -> offsets (N, 2GT, h, w), mask (N, GT, h, w).

    The layout of Detectron2 and mmcv: the first two thirds are offsets as they stand, and the
    sigmoid of the last third is the mask.
    """
    taps = prediction.shape[1] // 3
    return prediction[:, : 2 * taps], prediction[:, 2 * taps :].sigmoid()


class ModulatedDeformConv(Conv2d):
    """Deformable convolution v2 (arXiv 1811.11168) which predicts its own offsets and mask.

    Takes the place of `detectron2.layers.Conv2d`, norm and activation included. Its `offset`, a
    convolution of the same geometry, starts at zero: a plain convolution times sigmoid(0) = 1/2.
    """

    def __init__(self, *args, offset_groups: int = 1, **kwargs):
        """
        Args:
            args, kwargs: those of `detectron2.layers.Conv2d`.
            offset_groups: groups of input channels that share their offsets.
        """
        super().__init__(*args, **kwargs)
        self.offset = offset_conv(self, 3, offset_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, h, w)."""
        offset, mask = split_offsets(self.offset(x))
        x = deform_conv(x, offset, self.weight, self.bias, mask=mask, **geometry(self))
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def geometry(conv: nn.Conv2d) -> dict:
    """Where a convolution looks: its stride, padding and dilation, by name."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}


def offset_conv(conv: nn.Conv2d, values: int, groups: int) -> nn.Conv2d:
    """The convolution that predicts `values` numbers, at first 0, for each tap of `conv`."""
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    offset = nn.Conv2d(conv.in_channels, values * groups * taps, conv.kernel_size, **geometry(conv))
    nn.init.zeros_(offset.weight)
    nn.init.zeros_(offset.bias)
    return offset


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
    DEFORM_NUM_GROUPS among them. Raises ValueError for a depth without bottlenecks.
    """
    node = cfg.MODEL.RESNETS
    if not any(node.DEFORM_ON_PER_STAGE):
        return build_resnet_backbone(cfg, input_shape)
    if node.DEPTH not in BLOCKS_PER_STAGE:
        raise ValueError(
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
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_deformable_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
