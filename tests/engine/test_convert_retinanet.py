"""Names of RetinaNet, and the order of anchors."""

from __future__ import annotations

import pytest
import torch

from iou_d2.engine.convert import recognise, translate, translate_tensors

# Written by hand from mmdetection 3.3, its fork of IoU-aware RetinaNet, torchvision 0.26 and
# Detectron2 0.5.
MMDET = {
    "neck.fpn_convs.3.conv.weight": "backbone.top_block.p6.weight",
    "bbox_head.cls_convs.0.conv.weight": "head.cls_subnet.0.weight",
    "bbox_head.cls_convs.3.conv.bias": "head.cls_subnet.6.bias",
    "bbox_head.reg_convs.1.conv.bias": "head.bbox_subnet.2.bias",
    "bbox_head.retina_cls.weight": "head.cls_score.weight",
    "bbox_head.retina_reg.bias": "head.bbox_pred.bias",
    "bbox_head.retina_iou.weight": "head.iou_pred.weight",
}
TORCHVISION = {
    "backbone.fpn.extra_blocks.p6.weight": "backbone.top_block.p6.weight",
    "head.classification_head.conv.0.0.bias": "head.cls_subnet.0.bias",
    "head.classification_head.conv.3.0.weight": "head.cls_subnet.6.weight",
    "head.regression_head.conv.1.0.bias": "head.bbox_subnet.2.bias",
    "head.classification_head.cls_logits.weight": "head.cls_score.weight",
    "head.regression_head.bbox_reg.bias": "head.bbox_pred.bias",
}
TORCHVISION_V2 = {
    "head.classification_head.conv.0.0.weight": "head.cls_subnet.0.weight",
    "head.classification_head.conv.0.1.bias": "head.cls_subnet.1.bias",
    "head.classification_head.conv.3.0.weight": "head.cls_subnet.9.weight",
    "head.regression_head.conv.2.1.weight": "head.bbox_subnet.7.weight",
    "head.regression_head.bbox_reg.bias": "head.bbox_pred.bias",
}


@pytest.mark.parametrize(
    ("layout", "names"),
    [("mmdet", MMDET), ("torchvision", TORCHVISION), ("torchvision", TORCHVISION_V2)],
    ids=["mmdet", "torchvision", "torchvision v2"],
)
def test_names_in_both_directions(layout, names):
    assert translate(list(names), layout, "detectron2") == names
    back = {ours: theirs for theirs, ours in names.items()}
    if "head.cls_subnet.2.weight" not in back and "head.cls_subnet.1.bias" not in back:
        back["head.cls_subnet.2.weight"] = ""  # by which the head is recognised
    found = translate(list(back), "detectron2", layout)
    assert {ours: found[ours] for ours, theirs in back.items() if theirs} == {
        ours: theirs for ours, theirs in back.items() if theirs
    }


def test_the_names_before_torchvision_0_13():
    names = {
        "head.classification_head.conv.2.weight": "head.cls_subnet.2.weight",
        "head.regression_head.conv.6.bias": "head.bbox_subnet.6.bias",
        "backbone.fpn.inner_blocks.0.weight": "backbone.fpn_lateral3.weight",
    }
    assert translate(list(names), "torchvision", "detectron2") == names


def test_heads_of_other_networks_are_not_taken_for_it():
    fcos = ["head.classification_head.conv.0.weight", "head.classification_head.conv.1.weight"]
    assert (
        recognise([*fcos, "head.regression_head.bbox_ctrness.bias"], "torchvision").title == "FCOS"
    )
    for name in ("atss_cls", "conv_cls", "gfl_cls", "retina_bbox_reg"):
        assert recognise([f"bbox_head.{name}.weight"], "mmdet") is None
    assert recognise(["head.cls_tower.2.weight", "head.cls_pred.bias"], "detectron2") is None


@pytest.mark.parametrize("layout", ["mmdet", "torchvision"])
def test_anchors_go_by_size_first(layout):
    """A channel says its ratio, its size and its class or coordinate."""
    prefix = {"mmdet": "bbox_head.retina_", "torchvision": "head."}[layout]
    names = {"mmdet": ("cls", "reg"), "torchvision": ("classification_head.cls_logits",
             "regression_head.bbox_reg")}[layout]  # fmt: skip
    tensors = {}
    for name, values in zip(names, (7, 4)):
        ratio, size, value = torch.meshgrid(
            torch.arange(3), torch.arange(3), torch.arange(values), indexing="ij"
        )
        tensors[f"{prefix}{name}.bias"] = (100 * ratio + 10 * size + value).flatten().float()
    tensors[f"{prefix}{names[1]}.weight"] = torch.rand(36, 2, 3, 3)
    if layout == "torchvision":
        tensors["head.classification_head.conv.2.weight"] = torch.zeros(1)
    ours = translate_tensors(tensors, layout, "detectron2")
    assert any("go by size first" in told for told in ours.told)
    for name, values in (("cls_score", 7), ("bbox_pred", 4)):
        found = ours.tensors[f"head.{name}.bias"].tolist()
        assert found == [
            100 * ratio + 10 * size + value
            for size in range(3)
            for ratio in range(3)
            for value in range(values)
        ]
    if layout == "torchvision":
        back = translate_tensors(ours.tensors, "detectron2", layout).tensors
        renamed = {name for name in tensors if ".conv." not in name}
        assert all(torch.equal(back[name], tensors[name]) for name in renamed)


def test_an_order_that_is_not_known_is_told():
    tensors = {"bbox_head.retina_reg.weight": torch.rand(24, 2, 3, 3)}
    with pytest.raises(ValueError, match="retina_reg.weight is for 6 anchors .* not known"):
        translate_tensors(tensors, "mmdet", "detectron2")
    tensors = {"bbox_head.retina_cls.weight": torch.rand(18, 2, 3, 3)}
    with pytest.raises(ValueError, match="no convolution of their boxes"):
        translate_tensors(tensors, "mmdet", "detectron2")
    tensors["bbox_head.retina_reg.weight"] = torch.rand(36, 2, 3, 3)
    tensors["bbox_head.retina_cls.bias"] = torch.rand(19)
    with pytest.raises(ValueError, match="19 channels .* each of 9 anchors"):
        translate_tensors(tensors, "mmdet", "detectron2")


def test_three_anchors_a_cell_keep_their_order():
    weight = torch.rand(12, 2, 3, 3)
    found = translate_tensors({"bbox_head.retina_reg.weight": weight}, "mmdet", "detectron2")
    assert torch.equal(found.tensors["head.bbox_pred.weight"], weight)
