"""Dense heads that predict one box from every point: their base, and the head of FCOS and ATSS.

Shape letters: N images, K classes, C channels, L levels. Distances are those from a point to the
left, top, right and bottom of its box, in pixels of the network input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from iou_d2.errors import InputError
from iou_d2.layers.deform_conv import ModulatedDeformConv
from iou_d2.layers.over_maps import over_maps
from iou_d2.ops.box_codec import AnchorDeltas, BoxCodec, ExpDistances, ReluDistances

from .dense import part_named

POINT_HEAD_REGISTRY = Registry("POINT_HEAD")
POINT_HEAD_REGISTRY.__doc__ = """
Heads of PointDetector: `head(cfg, input_shapes)` is a module that turns L features (N, C, H, W)
into L PointPredictions, whose boxes have `head.num_stages` stages.
"""


class PointPrediction(NamedTuple):
    """What a head says of one level."""

    # (N, K, H, W), class scores before the sigmoid.
    logits: Tensor
    # (N, 4, H, W) of each stage, of which the last is the final box.
    distances: tuple[Tensor, ...]
    # (N, 1, H, W), how well the final box fits, before the sigmoid.
    quality_logits: Tensor | None = None
    # (HW, 2), where the points are; the detector knows them, a head does not.
    points: Tensor | None = None


def conv3x3(in_channels: int, out_channels: int, bias: float = 0.0) -> nn.Conv2d:
    """A 3x3 convolution with weights of standard deviation 0.01."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


def conv_norm_relu(
    channels: int, num_groups: int, deformable: bool = False, bias: bool = False
) -> nn.Module:
    """3x3 convolution -> GroupNorm -> ReLU."""
    conv_class = ModulatedDeformConv if deformable else Conv2d
    conv = conv_class(
        channels,
        channels,
        kernel_size=3,
        padding=1,
        bias=bias,
        norm=nn.GroupNorm(num_groups, channels),
        activation=F.relu,
    )
    nn.init.normal_(conv.weight, std=0.01)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv


def level_scales(num_levels: int) -> nn.ParameterList:
    """A learnt factor for each level, 1 at first."""
    return nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(num_levels))


def _tower(
    channels: int, num_convs: int, num_groups: int, deformable: bool, bias: bool
) -> nn.Sequential:
    """Convolutions of which the last one may be a deformable one."""
    last = num_convs - 1
    return nn.Sequential(
        *(
            conv_norm_relu(channels, num_groups, deformable and index == last, bias)
            for index in range(num_convs)
        )
    )


def distance_units(cfg, levels: int) -> list[float]:
    """MODEL.POINT_DETECTOR.DISTANCE_UNITS, one for each of `levels` levels."""
    units = cfg.MODEL.POINT_DETECTOR.DISTANCE_UNITS
    if len(units) != levels:
        raise InputError(
            f"MODEL.POINT_DETECTOR.DISTANCE_UNITS has {len(units)} entries for {levels} levels."
        )
    return units


def build_box_codec(cfg, strides: Sequence[int]) -> BoxCodec:
    """The codec that MODEL.POINT_DETECTOR.BOX_CODEC names, for levels of these strides."""
    node = cfg.MODEL.POINT_DETECTOR
    builders = {
        "exp": lambda: ExpDistances(distance_units(cfg, len(strides))),
        "relu": lambda: ReluDistances(strides),
        "deltas": lambda: AnchorDeltas([node.ANCHOR_SCALE * stride for stride in strides]),
    }
    return part_named(builders, node.BOX_CODEC, "MODEL.POINT_DETECTOR.BOX_CODEC")()


class TwoTowerHead(nn.Module, ABC):
    """Two towers of convolutions and the class scores; a head adds its boxes.

    The levels share everything but the factors of their distances.
    """

    num_stages = 1

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        num_convs: int = 4,
        num_groups: int = 32,
        prior_prob: float = 0.01,
        deformable: bool = False,
        tower_bias: bool = False,
    ):
        """
        Args:
            channels: of the features and of the towers.
            strides: pixels of a cell of each level.
            num_convs: convolutions of a tower; 0 reads the features as they are.
            num_groups: of the GroupNorm behind each of them.
            prior_prob: class score of every point at first.
            deformable: whether the last convolution of a tower is a deformable one.
            tower_bias: whether the convolutions of the towers have a bias before their norm.
        """
        super().__init__()
        self.strides = list(strides)
        self.cls_tower = _tower(channels, num_convs, num_groups, deformable, tower_bias)
        self.box_tower = _tower(channels, num_convs, num_groups, deformable, tower_bias)
        self.cls_pred = conv3x3(channels, num_classes, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shapes: list[ShapeSpec]):
        return {
            "channels": input_shapes[0].channels,
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "strides": [shape.stride for shape in input_shapes],
            "num_convs": cfg.MODEL.RETINANET.NUM_CONVS,
            "num_groups": cfg.MODEL.POINT_DETECTOR.NUM_GROUPS,
            "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB,
            "deformable": cfg.MODEL.POINT_DETECTOR.DEFORMABLE_TOWER,
            "tower_bias": cfg.MODEL.POINT_DETECTOR.TOWER_BIAS,
        }

    def forward(self, features: list[Tensor]) -> list[PointPrediction]:
        """L features (N, C, H, W) -> L predictions."""
        cls_features = over_maps(self.cls_tower, features)
        return self.predict(cls_features, over_maps(self.box_tower, features))

    @abstractmethod
    def predict(
        self, cls_features: list[Tensor], box_features: list[Tensor]
    ) -> list[PointPrediction]:
        """What the outputs of the towers, L of (N, C, H, W), say of each level."""


@POINT_HEAD_REGISTRY.register()
class PointHead(TwoTowerHead):
    """The head of FCOS, arXiv 1904.01355, without centerness."""

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        strides: Sequence[int],
        box_codec: BoxCodec,
        learn_scales: bool = True,
        **kwargs,
    ):
        """
        Args:
            box_codec: what the outputs of the box convolution mean.
            learn_scales: whether each level has a learnt factor of them.
            kwargs: those of TwoTowerHead.
        """
        super().__init__(channels=channels, strides=strides, **kwargs)
        self.box_codec = box_codec
        self.box_pred = conv3x3(channels, 4)
        scales = level_scales(len(strides)) if learn_scales else None
        # A checkpoint says by their name what the numbers are: only their decoding differs.
        self.box_scales, self.delta_scales = (
            (None, scales) if box_codec.of_anchors else (scales, None)
        )

    @classmethod
    def from_config(cls, cfg, input_shapes: list[ShapeSpec]):
        arguments = super().from_config(cfg, input_shapes)
        return {
            **arguments,
            "box_codec": build_box_codec(cfg, arguments["strides"]),
            "learn_scales": cfg.MODEL.POINT_DETECTOR.LEVEL_SCALES,
        }

    def predict(
        self, cls_features: list[Tensor], box_features: list[Tensor]
    ) -> list[PointPrediction]:
        raw = over_maps(self.box_pred, box_features)
        distances = [self.distances(x, level) for level, x in enumerate(raw)]
        logits = over_maps(self.cls_pred, cls_features)
        return [PointPrediction(*said) for said in zip(logits, zip(distances))]

    def distances(self, raw: Tensor, level: int) -> Tensor:
        """What the output of the box convolution, (N, 4, H, W), means on a level."""
        scales = self.delta_scales if self.box_scales is None else self.box_scales
        return self.box_codec(raw, 1.0 if scales is None else scales[level], level)


@POINT_HEAD_REGISTRY.register()
class QualityHead(PointHead):
    """PointHead and how well a box fits: the centerness of FCOS and ATSS, or the IoU
    (MODEL.POINT_DETECTOR.QUALITY)."""

    @configurable
    def __init__(self, *, channels: int, quality_on_box_tower: bool = True, **kwargs):
        """
        Args:
            quality_on_box_tower: whether the quality is read off the box tower, and not off that of
                the classes as in arXiv 1904.01355.
            kwargs: those of PointHead.
        """
        super().__init__(channels=channels, **kwargs)
        self.quality_on_box_tower = quality_on_box_tower
        self.quality_pred = conv3x3(channels, 1)

    @classmethod
    def from_config(cls, cfg, input_shapes: list[ShapeSpec]):
        towers = {"box": True, "class": False}
        key = "MODEL.POINT_DETECTOR.QUALITY_TOWER"
        return {
            **super().from_config(cfg, input_shapes),
            "quality_on_box_tower": part_named(towers, cfg.MODEL.POINT_DETECTOR.QUALITY_TOWER, key),
        }

    def predict(
        self, cls_features: list[Tensor], box_features: list[Tensor]
    ) -> list[PointPrediction]:
        said = super().predict(cls_features, box_features)
        features = box_features if self.quality_on_box_tower else cls_features
        qualities = over_maps(self.quality_pred, features)
        return [x._replace(quality_logits=quality) for x, quality in zip(said, qualities)]
