"""The SPP block before the FPN, on any backbone."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

from iou_d2.backbones.spp import add_spp_block

CONFIGS = {
    "build_resnet_fpn_backbone": "configs/faster_rcnn_R_50_FPN_1x.yaml",
    "build_resnet_backbone": "configs/faster_rcnn_R_50_C4_1x.yaml",
    "build_mobilenet_v2_fpn_backbone": "configs/quick/faster_rcnn_own_data.yaml",
    "build_resnet10_fpn_backbone": "configs/quick/faster_rcnn_shapes.yaml",
    "build_retinanet_resnet_fpn_backbone": "configs/retinanet_R_50_FPN_1x.yaml",
}


def build(small_cfg, name, *overrides, with_block=True):
    block = ("MODEL.BACKBONE.NAME", "build_spp_backbone", "MODEL.SPP_BLOCK.BACKBONE", name)
    cfg = small_cfg(CONFIGS[name], *(block if with_block else ()), *overrides)
    torch.manual_seed(0)
    return build_backbone(cfg).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_names_stay_and_the_weights_of_the_backbone_fit(small_cfg, name):
    plain, with_block = build(small_cfg, name, with_block=False), build(small_cfg, name)
    assert plain.output_shape() == with_block.output_shape()
    loaded = with_block.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys and all(x.startswith("spp.") for x in loaded.missing_keys)


def test_only_the_last_feature_passes_through_the_block(small_cfg):
    backbone = build(small_cfg, "build_resnet_fpn_backbone", "MODEL.RESNETS.NORM", "BN")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = backbone.bottom_up(images)
        # The hooks of `bottom_up` run when it is called, not with its forward.
        before = backbone.bottom_up.forward(images)
        assert torch.equal(features["res5"], backbone.spp(before["res5"]))
        assert not torch.equal(features["res5"], before["res5"])
        for name in ("res2", "res3", "res4"):
            assert torch.equal(features[name], before[name])


def test_the_last_feature_of_a_backbone_without_fpn_is_that_of_the_largest_stride(small_cfg):
    backbone = build(small_cfg, "build_resnet_backbone", "MODEL.RESNETS.NORM", "BN")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.spp(backbone.forward(images)["res4"])
        assert torch.equal(backbone(images)["res4"], expected)


def test_a_copy_has_a_block_of_its_own(small_cfg):
    backbone = build(small_cfg, "build_resnet10_fpn_backbone")
    images = torch.randn(1, 3, 64, 64)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        before = other(images)["p5"]
        for parameter in backbone.spp.parameters():
            parameter.zero_()
        assert torch.equal(other(images)["p5"], before)
        assert not torch.equal(backbone(images)["p5"], before)


def test_a_detector_trains_with_it(small_cfg, make_batch, event_storage):
    model = build_model(
        small_cfg(
            "configs/quick/faster_rcnn_shapes.yaml",
            *("MODEL.BACKBONE.NAME", "build_spp_backbone", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
            *("MODEL.SPP_BLOCK.BACKBONE", "build_resnet10_fpn_backbone"),
        )
    )
    losses = model.train()(make_batch([2, 0], side=64))
    sum(losses.values()).backward()
    for name, parameter in model.backbone.spp.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


@pytest.mark.parametrize("name", ["", "build_spp_backbone", "build_resnet"])
def test_an_unknown_backbone_is_named(small_cfg, name):
    cfg = small_cfg(
        "configs/quick/faster_rcnn_shapes.yaml",
        *("MODEL.BACKBONE.NAME", "build_spp_backbone", "MODEL.SPP_BLOCK.BACKBONE", name),
    )
    with pytest.raises(ValueError, match=f"SPP_BLOCK.BACKBONE is one of .*, but it is '{name}'"):
        build_backbone(cfg)


@pytest.mark.parametrize("kernels", ["[]", "[4]", "[5, -3]", "['5']", "[5.0]"])
def test_wrong_kernels_are_named(small_cfg, kernels):
    with pytest.raises(ValueError, match="MODEL.SPP_BLOCK.KERNELS is a list of odd numbers"):
        build(small_cfg, "build_resnet_fpn_backbone", "MODEL.SPP_BLOCK.KERNELS", kernels)


def test_kernels_by_key(small_cfg):
    cut = build(small_cfg, "build_resnet10_fpn_backbone", "MODEL.SPP_BLOCK.KERNELS", "[3]")
    assert cut.spp.kernels == (3,) and cut.spp.merge.in_channels == 2 * cut.spp.reduce.out_channels


def test_a_second_block_is_refused(small_cfg):
    backbone = build(small_cfg, "build_resnet10_fpn_backbone")
    with pytest.raises(ValueError, match="FPN has an SPP block already"):
        add_spp_block(backbone)
