"""The backbones of SSD (arXiv 1512.02325) and RefineDet (arXiv 1711.06897): VGG-16 whose fully
connected layers are convolutions, and more convolutions behind it.

Features have the names of Caffe's layers: "conv4_3", "conv5_3", "fc7", "conv6_2" and so on; SSD's
paper counts two more for what comes behind fc7. Each is what the ReLU of its layer puts out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from iou_d2.errors import InputError

from .vgg import VGG16

# Where VGG16 has what SSD calls so.
_VGG_FEATURES = {"conv4_3": "conv4", "conv5_3": "conv5"}
_NORM_EPSILON = 1e-10  # of Caffe's Normalize layer
FC_CHANNELS = 1024


class ExtraStage(NamedTuple):
    """A 1x1 convolution to half of `channels`, then one to `channels`: both with ReLU."""

    channels: int
    kernel: int = 3
    stride: int = 2
    padding: int = 1


class SSDVariant(NamedTuple):
    """What differs between the backbones of SSD300, SSD512 and RefineDet."""

    # Kernel, stride and padding of the pooling behind conv5_3, and the dilation of fc6.
    pool5: tuple[int, int, int]
    fc6_dilation: int
    # conv6, conv7 and so on.
    extra: tuple[ExtraStage, ...]
    # Feature -> what its norm is at first, wherever it is L2-normalised.
    norm_scales: Mapping[str, float]


_SSD_POOL5 = (3, 1, 1)
_SHARED = (ExtraStage(512), ExtraStage(256))
SSD300 = SSDVariant(
    pool5=_SSD_POOL5,
    fc6_dilation=6,
    extra=(*_SHARED, *[ExtraStage(256, stride=1, padding=0)] * 2),
    norm_scales={"conv4_3": 20.0},
)
SSD512 = SSD300._replace(extra=(*_SHARED, *[ExtraStage(256)] * 2, ExtraStage(256, 4, 1, 1)))
REFINEDET = SSDVariant(
    pool5=(2, 2, 0),
    fc6_dilation=3,
    extra=(ExtraStage(512),),
    norm_scales={"conv4_3": 10.0, "conv5_3": 8.0},
)


class ChannelNorm(nn.Module):
    """L2 norm over channels, times a learnt factor for each channel (arXiv 1506.04579)."""

    def __init__(self, channels: int, scale: float):
        """`scale`: what the factors are at first."""
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape; a position that is 0 everywhere stays so."""
        # Squares of half precision overflow.
        norm = (x.float().square().sum(dim=1, keepdim=True) + _NORM_EPSILON).sqrt()
        return (x / norm).to(x.dtype) * self.weight[:, None, None].to(x.dtype)


class SSDVGG16(Backbone):
    """VGG-16 with ceil pooling, fc6 and fc7 as convolutions, and the extra stages of a variant.

    Strides are those of the layers; maps are not always as large as the image over their stride,
    since sizes are rounded up and SSD300's last two stages do not pad.
    """

    def __init__(self, variant: SSDVariant, out_features: Sequence[str], freeze_at: int = 0):
        """
        Args:
            variant: SSD300, SSD512 or REFINEDET.
            out_features: names of the features. Extra stages after the last of them are not built.
            freeze_at: so many of the first of VGG's five stages keep their weights.

        Raises:
            InputError: a feature that there is not, or none at all.
        """
        super().__init__()
        names = ["conv4_3", "conv5_3", "fc7"]
        names += [f"conv{number}_2" for number, _ in enumerate(variant.extra, start=6)]
        if not out_features or not set(out_features) <= set(names):
            raise InputError(
                f"MODEL.SSD_VGG.OUT_FEATURES takes names from {', '.join(names)}, "
                f"but it is {list(out_features)}."
            )
        self._out_features = sorted(out_features, key=names.index)
        self.vgg = VGG16(list(_VGG_FEATURES.values()), freeze_at=freeze_at, ceil_mode=True)
        kernel, stride, padding = variant.pool5
        self.pool5 = nn.MaxPool2d(kernel, stride, padding, ceil_mode=True)
        dilation, relu = variant.fc6_dilation, nn.ReLU(inplace=True)
        self.fc6 = Conv2d(
            *(512, FC_CHANNELS, 3), padding=dilation, dilation=dilation, activation=relu
        )
        self.fc7 = Conv2d(FC_CHANNELS, FC_CHANNELS, 1, activation=relu)
        shapes = {"conv4_3": ShapeSpec(channels=512, stride=8)}
        shapes["conv5_3"] = ShapeSpec(channels=512, stride=16)
        shapes["fc7"] = ShapeSpec(channels=FC_CHANNELS, stride=16 * stride)
        self.extra, last = nn.ModuleDict(), shapes["fc7"]
        built = names.index(self._out_features[-1]) - names.index("fc7")
        for name, stage in zip(names[3:], variant.extra[: max(built, 0)]):
            self.extra[name] = _extra_stage(last.channels, stage)
            last = shapes[name] = ShapeSpec(
                channels=stage.channels, stride=last.stride * stage.stride
            )
        self._shapes = {name: shapes[name] for name in self._out_features}
        self.norms = nn.ModuleDict(
            {
                name: ChannelNorm(shapes[name].channels, scale)
                for name, scale in variant.norm_scales.items()
                if name in out_features
            }
        )
        for layer in (self.fc6, self.fc7, *self.extra.modules()):
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> features by name, the finest first.

        Where images are so small that an extra stage would have nothing to read, it reads a border
        of zeros, as if the images were padded.
        """
        found = self.vgg(images)
        features = {name: found[of_vgg] for name, of_vgg in _VGG_FEATURES.items()}
        features["fc7"] = x = self.fc7(self.fc6(self.pool5(features["conv5_3"])))
        for name, stage in self.extra.items():
            features[name] = x = stage(_at_least(x, stage[2]))
        for name, norm in self.norms.items():
            features[name] = norm(features[name])
        return {name: features[name] for name in self._out_features}


def reduced_fc(classifier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of fc6 and fc7 from those of VGG-16's fully connected layers (arXiv 1412.7062).

    Every fourth output is taken and every third of the 7 x 7 taps of fc6, so that a 3 x 3
    convolution of dilation 3 reads what it read, or of dilation 6 where the features are twice as
    dense.

    Args:
        classifier: torchvision's "0.weight" (4096, 25088), "0.bias", "3.weight" (4096, 4096) and
            "3.bias".
    """
    step = 4096 // FC_CHANNELS
    fc6 = classifier["0.weight"].reshape(4096, 512, 7, 7)
    return {
        "fc6.weight": fc6[::step, :, ::3, ::3].clone(),
        "fc6.bias": classifier["0.bias"][::step].clone(),
        "fc7.weight": classifier["3.weight"][::step, ::step, None, None].clone(),
        "fc7.bias": classifier["3.bias"][::step].clone(),
    }


def _extra_stage(in_channels: int, stage: ExtraStage) -> nn.Sequential:
    narrow = stage.channels // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, narrow, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(narrow, stage.channels, stage.kernel, stage.stride, stage.padding),
        nn.ReLU(inplace=True),
    )


def _at_least(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`x` (N, C, H, W) with zeros behind it where `conv` would find it too small."""
    wanted = conv.kernel_size[0] - 2 * conv.padding[0]
    below, right = (wanted - size for size in x.shape[-2:])
    # The larger of it and 0 in arithmetic that a tracer follows, which it does not do into `max`.
    below, right = ((missing + abs(missing)) // 2 for missing in (below, right))
    return F.pad(x, (0, right, 0, below))


def _build(cfg, input_shape: ShapeSpec, variant: SSDVariant) -> SSDVGG16:
    if input_shape.channels != 3:
        raise InputError(f"VGG-16 takes images of 3 channels, not of {input_shape.channels}.")
    return SSDVGG16(variant, cfg.MODEL.SSD_VGG.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_ssd300_vgg16_backbone(cfg, input_shape: ShapeSpec) -> SSDVGG16:
    """Reads, as the others here, MODEL.SSD_VGG and MODEL.BACKBONE.FREEZE_AT."""
    return _build(cfg, input_shape, SSD300)


@BACKBONE_REGISTRY.register()
def build_ssd512_vgg16_backbone(cfg, input_shape: ShapeSpec) -> SSDVGG16:
    return _build(cfg, input_shape, SSD512)


@BACKBONE_REGISTRY.register()
def build_refinedet_vgg16_backbone(cfg, input_shape: ShapeSpec) -> SSDVGG16:
    return _build(cfg, input_shape, REFINEDET)
