"""The convolutions of torchvision's VGG-16 (arXiv 1409.1556) as a Detectron2 backbone."""

from __future__ import annotations

from collections import OrderedDict

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from iou_d2.errors import InputError

_CHANNELS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each stage
# Name of a feature -> what it is: all that the backbone can put out.
_SHAPES = {
    f"{layer}{stage}": ShapeSpec(channels=channels, stride=2 ** (stage - (layer == "conv")))
    for stage, channels in enumerate(_CHANNELS, start=1)
    for layer in ("conv", "pool")
}


class VGG16(Backbone):
    """VGG-16 without its fully connected layers.

    Stage i of 1 to 5 gives "conv<i>", its last ReLU at stride 2^(i - 1), and "pool<i>", which is
    that after max-pooling, at stride 2^i. Parameters have torchvision's names: "features.0.weight".
    """

    def __init__(self, out_features: list[str], freeze_at: int = 0, ceil_mode: bool = False):
        """
        Args:
            out_features: names of the features, such as ["conv4", "conv5"]. Stages after the last
                of them are not built.
            freeze_at: so many of the first stages keep their weights.
            ceil_mode: let pooling round sizes up, as Caffe does, in place of down.

        Raises:
            InputError: a feature that VGG-16 does not have, or none at all.
        """
        super().__init__()
        if not out_features or not set(out_features) <= set(_SHAPES):
            raise InputError(
                f"MODEL.VGG.OUT_FEATURES takes names from {', '.join(_SHAPES)}, "
                f"but it is {list(out_features)}."
            )
        self._out_features = list(out_features)
        stages = max(int(name[-1]) for name in out_features)
        self.features = _layers(stages, ceil_mode)
        stage = 1
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stage += 1
                continue
            # As torchvision does.
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layer.requires_grad_(stage > freeze_at)

    @property
    def size_divisibility(self) -> int:
        """The largest stride: pooling rounds sizes down, so others would lose a border."""
        return max(_SHAPES[name].stride for name in self._out_features)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: _SHAPES[name] for name in self._out_features}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W), H and W multiples of `size_divisibility` -> features by name."""
        features, x, stage = {}, images, 1
        for layer in self.features:
            if not isinstance(layer, nn.MaxPool2d):
                x = layer(x)
                continue
            features[f"conv{stage}"] = x
            if set(self._out_features) <= set(features):
                break
            features[f"pool{stage}"] = x = layer(x)
            stage += 1
        return {name: features[name] for name in self._out_features}


def _layers(stages: int, ceil_mode: bool) -> nn.Sequential:
    """The first stages. Names are torchvision's numbers, among which a ReLU has one of its own."""
    layers, channels, number = OrderedDict(), 3, 0
    for width, convolutions in zip(_CHANNELS[:stages], _CONVOLUTIONS):
        for _ in range(convolutions):
            relu = nn.ReLU(inplace=True)
            layers[str(number)] = Conv2d(channels, width, 3, padding=1, activation=relu)
            channels, number = width, number + 2
        layers[str(number)] = nn.MaxPool2d(2, ceil_mode=ceil_mode)
        number += 1
    return nn.Sequential(layers)


@BACKBONE_REGISTRY.register()
def build_vgg16_backbone(cfg, input_shape: ShapeSpec) -> VGG16:
    """VGG-16 for images of three channels; reads MODEL.VGG and MODEL.BACKBONE.FREEZE_AT."""
    if input_shape.channels != 3:
        raise InputError(f"VGG-16 takes images of 3 channels, not of {input_shape.channels}.")
    return VGG16(cfg.MODEL.VGG.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
