"""The convolutions of torchvision's MobileNetV2 (arXiv 1801.04381) as a Detectron2 backbone."""

from __future__ import annotations

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torchvision.models import mobilenetv2

from iou_d2.errors import InputError

# Feature -> the layer of torchvision's `features` that puts it out, and its stride.
_LAYERS = {"res2": (3, 4), "res3": (6, 8), "res4": (13, 16), "res5": (17, 32)}
# The last layer of each stage that FREEZE_AT counts: the first is the stem, which has no feature.
_STAGE_ENDS = [1, *(layer for layer, _ in _LAYERS.values())]
NORMS = ("FrozenBN", "BN", "SyncBN")


class StridedDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that autocast leaves in float32 on the CPU.

    There oneDNN has no fast gradient of a strided one in bfloat16: it takes about ten times as long
    as in float32.
    """

    @classmethod
    def like(cls, conv: nn.Conv2d) -> StridedDepthwiseConv2d:
        """One with the weights of `conv`, which has no bias."""
        channels = conv.in_channels
        # On "meta" no random numbers are drawn.
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        new = cls(channels, channels, *geometry, groups=channels, bias=False, device="meta")
        new.weight = conv.weight
        return new

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, C, H, W) -> (N, C, h, w) in the dtype of `x`, by weights (C, 1, 3, 3)."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return super()._conv_forward(x.to(weight.dtype), weight, bias).to(x.dtype)


class MobileNetV2(Backbone):
    """MobileNetV2 without its last 1x1 convolution and its classifier.

    "res2" to "res5", named as those of a ResNet, are at strides 4 to 32 and have 24, 32, 96 and 320
    channels times the width. Parameters have torchvision's names: "features.0.0.weight".
    """

    def __init__(
        self,
        out_features: list[str],
        width: float = 1.0,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
    ):
        """
        Args:
            out_features: names of the features. Layers after the last of them are not built.
            width: factor of all numbers of channels, which are rounded to multiples of 8.
            norm: "FrozenBN", "BN" or "SyncBN".
            freeze_at: so many of the five stages keep their weights and their statistics. The first
                is the stem, the others end with a feature.

        Raises:
            InputError: a feature or a norm that there is not, no feature, or no width.
        """
        super().__init__()
        if not out_features or not set(out_features) <= set(_LAYERS):
            raise InputError(
                f"MODEL.MOBILENET_V2.OUT_FEATURES takes names from {', '.join(_LAYERS)}, "
                f"but it is {list(out_features)}."
            )
        if norm not in NORMS:
            raise InputError(
                f"MODEL.MOBILENET_V2.NORM is one of {', '.join(NORMS)}, but it is {norm!r}."
            )
        if not width > 0:
            raise InputError(f"MODEL.MOBILENET_V2.WIDTH must be over 0, but it is {width}.")
        network = mobilenetv2.MobileNetV2(
            num_classes=1, width_mult=width, norm_layer=lambda channels: get_norm(norm, channels)
        )
        self.features = network.features[: max(_LAYERS[name][0] for name in out_features) + 1]
        _use_fast_layers(self.features)
        self._shapes = {
            name: ShapeSpec(channels=self.features[layer].out_channels, stride=stride)
            for name, (layer, stride) in _LAYERS.items()
            if name in out_features
        }
        self.freeze(freeze_at)

    def freeze(self, stages: int) -> None:
        """Keep the weights and the statistics of the first `stages` of the five as they are."""
        layers = _STAGE_ENDS[min(stages, 5) - 1] + 1 if stages > 0 else 0
        for index, layer in enumerate(self.features[:layers]):
            layer.requires_grad_(False)
            self.features[index] = FrozenBatchNorm2d.convert_frozen_batchnorm(layer)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> features (N, C, ceil(H / stride), ceil(W / stride)) by name."""
        outputs, x = [], images
        for layer in self.features:
            x = layer(x)
            outputs.append(x)
        return {name: outputs[_LAYERS[name][0]] for name in self._shapes}


def _use_fast_layers(features: nn.Sequential) -> None:
    """Let layers of torchvision compute the same in less time, in place."""
    for module in list(features.modules()):
        if isinstance(module, nn.ReLU6):
            module.inplace = False  # In place, autograd copies the input before.
        elif isinstance(module, nn.Sequential) and isinstance(module[0], nn.Conv2d):
            conv = module[0]
            if conv.groups == conv.in_channels and conv.stride != (1, 1):
                module[0] = StridedDepthwiseConv2d.like(conv)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_backbone(cfg, input_shape: ShapeSpec) -> MobileNetV2:
    """MobileNetV2 for images of three channels; reads MODEL.MOBILENET_V2 and
    MODEL.BACKBONE.FREEZE_AT."""
    if input_shape.channels != 3:
        raise InputError(f"MobileNetV2 takes images of 3 channels, not of {input_shape.channels}.")
    node = cfg.MODEL.MOBILENET_V2
    return MobileNetV2(
        node.OUT_FEATURES,
        width=node.WIDTH,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """With p6 by pooling, as Detectron2's build_resnet_fpn_backbone: for R-CNN and UnitBox."""
    return _fpn(cfg, build_mobilenet_v2_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenet_v2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """With p6 and p7 by strided convolutions of res5, as build_retinanet_resnet_fpn_backbone."""
    bottom_up = build_mobilenet_v2_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    if "res5" not in shapes:
        raise InputError(
            "MODEL.MOBILENET_V2.OUT_FEATURES needs res5, of which p6 is made, but it is "
            f"{list(shapes)}."
        )
    top = LastLevelP6P7(shapes["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return _fpn(cfg, bottom_up, top)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_p6p7_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """With p6 and p7 by strided convolutions of p5, as in VarifocalNet, ATSS and FCOS."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top = LastLevelP6P7(channels, channels, in_feature="p5")
    return _fpn(cfg, build_mobilenet_v2_backbone(cfg, input_shape), top)


def _fpn(cfg, bottom_up: MobileNetV2, top: nn.Module) -> FPN:
    shapes = bottom_up.output_shape()
    missing = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in shapes]
    if missing:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES has {', '.join(missing)}, which is not among "
            f"MODEL.MOBILENET_V2.OUT_FEATURES {list(shapes)}."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
