from __future__ import annotations

import re

import pytest
import torch

from iou_d2.engine.class_rows import ClassRows, ModelClasses
from iou_d2.engine.convert import (
    PixelFormat,
    backbone_prefix,
    pixel_format_of_mmdet,
    swap_red_and_blue,
    translate,
    translate_tensors,
)
from iou_d2.engine.convert.coco_classes import count_classes, keep_used_classes, names_of_rows
from iou_d2.errors import InputError

# Written by hand from mmdetection 3.3.0 and Detectron2 0.5, and the names that this package gives.
VFNET = {
    "backbone.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
    "backbone.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
    "backbone.layer1.0.conv1.weight": "backbone.bottom_up.res2.0.conv1.weight",
    "backbone.layer1.0.bn1.weight": "backbone.bottom_up.res2.0.conv1.norm.weight",
    "backbone.layer1.0.downsample.0.weight": "backbone.bottom_up.res2.0.shortcut.weight",
    "backbone.layer1.0.downsample.1.bias": "backbone.bottom_up.res2.0.shortcut.norm.bias",
    "backbone.layer3.22.bn3.running_mean": "backbone.bottom_up.res4.22.conv3.norm.running_mean",
    "backbone.layer4.2.conv2.weight": "backbone.bottom_up.res5.2.conv2.weight",
    "backbone.layer4.2.conv2.conv_offset.bias": "backbone.bottom_up.res5.2.conv2_offset.bias",
    "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral3.weight",
    "neck.lateral_convs.2.conv.bias": "backbone.fpn_lateral5.bias",
    "neck.fpn_convs.0.conv.weight": "backbone.fpn_output3.weight",
    "neck.fpn_convs.2.conv.bias": "backbone.fpn_output5.bias",
    "neck.fpn_convs.3.conv.weight": "backbone.top_block.p6.weight",
    "neck.fpn_convs.4.conv.bias": "backbone.top_block.p7.bias",
    "bbox_head.cls_convs.1.conv.weight": "head.cls_tower.1.weight",
    "bbox_head.cls_convs.1.gn.bias": "head.cls_tower.1.norm.bias",
    "bbox_head.cls_convs.2.conv.conv_offset.weight": "head.cls_tower.2.offset.weight",
    "bbox_head.reg_convs.2.conv.weight": "head.box_tower.2.weight",
    "bbox_head.reg_convs.2.conv.conv_offset.bias": "head.box_tower.2.offset.bias",
    "bbox_head.reg_convs.0.gn.weight": "head.box_tower.0.norm.weight",
    "bbox_head.vfnet_reg_conv.conv.weight": "head.initial_conv.weight",
    "bbox_head.vfnet_reg_conv.gn.weight": "head.initial_conv.norm.weight",
    "bbox_head.vfnet_reg.weight": "head.initial_pred.weight",
    "bbox_head.scales.4.scale": "head.initial_scales.4",
    "bbox_head.vfnet_reg_refine_dconv.weight": "head.refine_star.weight",
    "bbox_head.vfnet_reg_refine.bias": "head.refine_pred.bias",
    "bbox_head.scales_refine.0.scale": "head.refine_scales.0",
    "bbox_head.vfnet_cls_dconv.weight": "head.cls_star.weight",
    "bbox_head.vfnet_cls.bias": "head.cls_pred.bias",
}


def test_names_of_vfnet_in_both_directions():
    assert translate(list(VFNET), "mmdet", "detectron2") == VFNET
    back = {ours: theirs for theirs, ours in VFNET.items()}
    assert translate(list(back), "detectron2", "mmdet") == back


def test_a_resnet_alone():
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.num_batches_tracked": "stem.conv1.norm.num_batches_tracked",
        "layer2.3.conv3.weight": "res3.3.conv3.weight",
        "layer2.0.downsample.1.running_var": "res3.0.shortcut.norm.running_var",
        "fc.bias": "stem.fc.bias",
    }
    assert translate(list(names), "torchvision", "detectron2") == names
    for prefix in ("", "backbone.", "backbone.bottom_up."):
        ours = {prefix + ours: theirs for theirs, ours in names.items()}
        assert translate(list(ours), "detectron2", "torchvision") == ours
        in_mmdet = {a: "backbone." + b for a, b in ours.items() if b != "fc.bias"}
        assert translate(list(ours), "detectron2", "mmdet") == in_mmdet
    assert translate(list(names), "torchvision", "mmdet") == {
        a: "backbone." + a for a in names if a != "fc.bias"
    }


def test_an_fpn_from_the_second_stage_on():
    names = {
        "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral2.weight",
        "neck.lateral_convs.3.conv.weight": "backbone.fpn_lateral5.weight",
        "neck.fpn_convs.3.conv.weight": "backbone.fpn_output5.weight",
    }
    assert translate(list(names), "mmdet", "detectron2") == names
    back = {ours: theirs for theirs, ours in names.items()}
    assert translate(list(back), "detectron2", "mmdet") == back


def test_what_has_no_counterpart_is_left_out():
    names = [
        *("backbone.conv1.weight", "ema_backbone_conv1_weight", "bbox_head.vfnet_cls.weight"),
        *("bbox_head.integral.project", "data_preprocessor.mean", "bbox_head.vfnet_clsx.weight"),
        *("xbackbone.conv1.weight", "backbone.conv1.weight.x", "teacher.backbone.conv1.weight"),
        *("backbone.layer5.0.conv1.weight", "neck.fpn_convs.5.conv.weight", ""),
    ]
    assert translate(names, "mmdet", "detectron2") == {
        "backbone.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
        "bbox_head.vfnet_cls.weight": "head.cls_pred.weight",
    }
    assert translate([], "mmdet", "detectron2") == {}


def test_the_head_of_another_detector_is_left_out():
    fcos = ["bbox_head.cls_convs.0.conv.weight", "bbox_head.scales.0.scale"]
    assert translate(fcos, "mmdet", "detectron2") == {}
    assert translate(["head.cls_tower.0.weight", "head.cls_pred.bias"], "detectron2", "mmdet") == {}


def test_the_offsets_of_mmdetection_1():
    new = {"backbone.bottom_up.res4.0.conv2_offset.weight"}
    old = "backbone.layer3.0.conv2_offset.weight"
    assert set(translate([old], "mmdet", "detectron2").values()) == new
    both = [old, "backbone.layer3.0.conv2.conv_offset.weight"]
    with pytest.raises(ValueError, match="conv2_offset.weight and .* the same parameter"):
        translate(both, "mmdet", "detectron2")


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("backbone.layer1.0.convs.0.weight", "Res2Net"),
        ("backbone.stem.0.weight", "deep stem"),
        ("neck.pafpn_convs.0.conv.weight", "PAFPN"),
    ],
)
def test_networks_that_cannot_be_converted(name, network):
    with pytest.raises(ValueError, match=f"{name} is of .*{network}.* cannot be converted"):
        translate(["backbone.conv1.weight", name], "mmdet", "detectron2")


def test_swapping_red_and_blue():
    weight = torch.rand(4, 3, 7, 7)
    for name in (
        "backbone.conv1.weight",
        "backbone.body.conv1.weight",
        "conv1.weight",
        "backbone.bottom_up.stem.conv1.weight",
        "stem.conv1.weight",
    ):
        swapped = swap_red_and_blue({"layer1.0.conv1.weight": weight, name: weight, "x": weight})
        assert swapped["x"] is swapped["layer1.0.conv1.weight"] is weight
        image = torch.rand(1, 3, 9, 9)
        torch.testing.assert_close(
            torch.conv2d(image[:, [2, 1, 0]], swapped[name]), torch.conv2d(image, weight)
        )
    with pytest.raises(ValueError, match="no 3 input channels"):
        swap_red_and_blue({"conv1.weight": torch.rand(4, 1, 7, 7)})
    with pytest.raises(ValueError, match="no first convolution"):
        swap_red_and_blue({"x": weight})
    assert backbone_prefix(["stemless", "a.stem.conv1.weight"]) == "a."


@pytest.mark.parametrize("shape", [(), (64,), (64, 1, 7, 7)])
def test_red_and_blue_of_another_shape_are_told(shape):
    words = re.escape(f"conv1.weight has no 3 input channels: its shape is {shape}.")
    with pytest.raises(InputError, match=words):
        swap_red_and_blue({"conv1.weight": torch.zeros(shape)})


def test_a_mean_that_is_no_list_of_numbers_is_told():
    with pytest.raises(InputError, match=r"has mean=\[1.2.3\], which is no list of numbers"):
        pixel_format_of_mmdet("img_norm_cfg = dict(mean=[1.2.3], std=[1, 1, 1], to_rgb=False)")


RCNN = ("roi_heads.box_predictor.cls_score.bias", "roi_heads.box_predictor.bbox_pred.bias")
RETINANET = (
    "head.regression_head.bbox_reg.weight",
    "head.classification_head.conv.0.0.bias",
    "head.classification_head.cls_logits.bias",
)
FCOS_HEAD = "proposal_generator.fcos_head"
FCOS = (f"{FCOS_HEAD}.scales.0.scale", f"{FCOS_HEAD}.ctrness.bias")
# Layout, names, and the shapes of their tensors -> of which tensor and shape the sentence is.
ODD_SHAPES = {
    "classes of an R-CNN": ("torchvision", RCNN, [(), (8,)], RCNN[0], ()),
    "boxes of an R-CNN": ("torchvision", RCNN, [(3,), ()], RCNN[1], ()),
    "anchors of a RetinaNet": ("torchvision", RETINANET, [(), (3,), (9,)], RETINANET[0], ()),
    "classes of a RetinaNet": ("torchvision", RETINANET, [(36, 1), (3,), ()], RETINANET[2], ()),
    "a scale of AdelaiDet": ("adelaidet", FCOS, [(5,), (1,)], FCOS[0], (5,)),
}


@pytest.mark.parametrize("case", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_a_tensor_of_another_shape_than_its_name_is_told(case):
    layout, names, shapes, name, shape = case
    tensors = {name: torch.zeros(shape) for name, shape in zip(names, shapes)}
    with pytest.raises(InputError, match=re.escape(name) + ".*" + re.escape(str(shape))):
        translate_tensors(tensors, layout, "detectron2")


def test_rows_of_classes_of_another_shape_stay_for_the_comparison_with_the_model():
    classes = ModelClasses([], {"a": ClassRows(), "b": ClassRows()})
    odd = {"a": torch.zeros(()), "b": torch.zeros(91, 2)}
    assert count_classes(odd, classes) == 91
    kept = keep_used_classes(odd, names_of_rows(91), classes)
    assert kept["a"] is odd["a"] and kept["b"].shape == (80, 2)


def test_pixels_of_mmdetection_configs():
    assert pixel_format_of_mmdet("") == PixelFormat()
    old = """
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(backbone=dict(type='ResNet', style='caffe'),
             bbox_head=dict(bbox_coder=dict(target_means=[0.0], target_stds=[0.1]),
                            init_cfg=dict(type='Normal', mean=0, std=0.01)))
"""
    caffe = PixelFormat("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)
    assert pixel_format_of_mmdet(old) == caffe
    assert caffe.in_order("BGR") == caffe
    assert caffe.in_order("RGB").mean == (123.675, 116.28, 103.53)
    new = """
model = dict(
    backbone=dict(style='pytorch'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            1e2,
            -2.5,
            3,
        ],
        std=[
            58.395, 57.12, 57.375,
        ]))
"""
    assert pixel_format_of_mmdet(new) == PixelFormat(mean=(100.0, -2.5, 3.0))
