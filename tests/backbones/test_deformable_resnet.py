from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock, build_resnet_backbone
from torch import nn
from torch.nn.modules.utils import _pair

from iou_d2.backbones.deformable_resnet import DeformBottleneck, build_deformable_resnet_backbone

IMAGE = ShapeSpec(channels=3)


def blocks(modulated, **kwargs):
    """A BottleneckBlock, and a DeformBottleneck of the same weights, which looks straight."""
    torch.manual_seed(0)
    arguments = {"bottleneck_channels": 8, "num_groups": 2, "stride": 2, "norm": "GN", **kwargs}
    arguments["norm"] = lambda channels: nn.GroupNorm(2, channels)
    plain = BottleneckBlock(6, 12, **arguments)
    deform = DeformBottleneck(6, 12, deform_modulated=modulated, **arguments)
    deform.load_state_dict(plain.state_dict(), strict=False)
    return plain, deform


@pytest.mark.parametrize("kwargs", [{}, {"dilation": 2}, {"stride_in_1x1": True}])
def test_a_block_that_looks_straight_is_a_plain_one(kwargs):
    x = torch.rand(2, 6, 9, 10)
    plain, deform = blocks(modulated=False, **kwargs)
    torch.testing.assert_close(deform(x), plain(x))
    plain, deform = blocks(modulated=True, **kwargs)
    nn.init.constant_(plain.conv2.weight, 0.3)
    nn.init.constant_(deform.conv2.weight, 0.6)  # times a mask of 1/2
    torch.testing.assert_close(deform(x), plain(x))
    nn.init.normal_(deform.conv2_offset.bias)
    assert not torch.allclose(deform(x), plain(x), atol=1e-3)


def config(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.BACKBONE.NAME", "build_deformable_resnet_fpn_p6p7_backbone"),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 2, "MODEL.RESNETS.NUM_GROUPS", 4),
            *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]),
            *("MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.RESNETS.STRIDE_IN_1X1", False),
            *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16),
            *overrides,
        ]
    )
    return cfg


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("MODEL.RESNETS.DEFORM_MODULATED", False, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2),
        ("MODEL.RESNETS.NUM_GROUPS", 1, "MODEL.RESNETS.DEPTH", 101),
        ("MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4),
        (
            *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4, "MODEL.RESNETS.DEPTH", 18),
            *("MODEL.RESNETS.NUM_GROUPS", 1, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        ),
    ],
)
def test_parameters_and_geometry_are_those_of_detectron2(overrides):
    cfg = config(*overrides)
    ours, theirs = build_deformable_resnet_backbone(cfg, IMAGE), build_resnet_backbone(cfg, IMAGE)
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert ours.output_shape() == theirs.output_shape()

    def looks(model):
        return {
            name: [_pair(x) for x in (m.kernel_size, m.stride, m.padding, m.dilation)]
            for name, m in model.named_modules()
            if hasattr(m, "kernel_size")
        }

    assert looks(ours) == looks(theirs)


def test_the_backbone_trains_and_makes_p6_of_p5():
    torch.manual_seed(0)
    backbone = build_backbone(config(), IMAGE)
    features = backbone(torch.rand(1, 3, 128, 160))
    sizes = {name: tuple(x.shape[1:]) for name, x in features.items()}
    assert sizes == {f"p{i}": (16, 128 >> i, 160 // 2**i) for i in (3, 4, 5)} | {
        "p6": (16, 2, 3),
        "p7": (16, 1, 2),
    }
    torch.testing.assert_close(features["p6"], backbone.top_block.p6(features["p5"]))
    torch.testing.assert_close(features["p7"], backbone.top_block.p7(features["p6"].relu()))
    sum(x.square().sum() for x in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        frozen = name.startswith(("bottom_up.stem", "bottom_up.res2"))
        assert parameter.requires_grad != frozen, name
        assert frozen or parameter.grad.any(), name


def test_a_depth_without_bottlenecks_is_refused():
    with pytest.raises(ValueError, match="DEFORM_ON_PER_STAGE needs .* but DEPTH is 18"):
        build_backbone(config("MODEL.RESNETS.DEPTH", 18), IMAGE)
