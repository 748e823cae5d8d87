"""SSD of other projects: names by hand, and numbers whose place tells what they are."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from checkpoint_helpers import nothing_drawn
from iou_d2 import get_config
from iou_d2.commands import convert
from iou_d2.engine.convert import recognise, swap_red_and_blue, translate, translate_tensors
from iou_d2.errors import InputError

# Written by hand from the projects' own code.
NAMES = {
    "amdegroot": {
        "vgg.0.weight": "backbone.vgg.features.0.weight",
        "vgg.28.bias": "backbone.vgg.features.28.bias",
        "vgg.31.weight": "backbone.fc6.weight",
        "vgg.33.bias": "backbone.fc7.bias",
        "L2Norm.weight": "backbone.norms.conv4_3.weight",
        "extras.0.weight": "backbone.extra.conv6_2.0.weight",
        "extras.3.bias": "backbone.extra.conv7_2.2.bias",
        "extras.7.bias": "backbone.extra.conv9_2.2.bias",
        "loc.5.weight": "head.bbox_pred.5.weight",
        "conf.0.weight": "head.cls_score.0.weight",
    },
    "lufficc": {
        "backbone.vgg.2.weight": "backbone.vgg.features.2.weight",
        "backbone.vgg.31.bias": "backbone.fc6.bias",
        "backbone.vgg.33.weight": "backbone.fc7.weight",
        "backbone.l2_norm.weight": "backbone.norms.conv4_3.weight",
        "backbone.extras.2.weight": "backbone.extra.conv7_2.0.weight",
        "backbone.extras.9.weight": "backbone.extra.conv10_2.2.weight",
        "box_head.predictor.reg_headers.6.bias": "head.bbox_pred.6.bias",
        "box_head.predictor.cls_headers.0.weight": "head.cls_score.0.weight",
    },
    "mmdet": {
        "backbone.features.0.weight": "backbone.vgg.features.0.weight",
        "backbone.features.31.weight": "backbone.fc6.weight",
        "backbone.features.33.weight": "backbone.fc7.weight",
        "neck.l2_norm.weight": "backbone.norms.conv4_3.weight",
        "neck.extra_layers.1.0.conv.weight": "backbone.extra.conv7_2.0.weight",
        "neck.extra_layers.4.1.conv.bias": "backbone.extra.conv10_2.2.bias",
        "bbox_head.reg_convs.3.0.weight": "head.bbox_pred.3.weight",
        "bbox_head.cls_convs.0.0.weight": "head.cls_score.0.weight",
    },
    "torchvision": {
        "backbone.features.21.weight": "backbone.vgg.features.21.weight",
        "backbone.extra.0.1.weight": "backbone.vgg.features.24.weight",
        "backbone.extra.0.5.bias": "backbone.vgg.features.28.bias",
        "backbone.extra.0.7.1.weight": "backbone.fc6.weight",
        "backbone.extra.0.7.3.bias": "backbone.fc7.bias",
        "backbone.scale_weight": "backbone.norms.conv4_3.weight",
        "backbone.extra.2.0.weight": "backbone.extra.conv7_2.0.weight",
        "backbone.extra.4.2.weight": "backbone.extra.conv9_2.2.weight",
        "head.regression_head.module_list.1.weight": "head.bbox_pred.1.weight",
        "head.classification_head.module_list.0.weight": "head.cls_score.0.weight",
    },
}
BEFORE_MMDET_2_14 = {
    "backbone.l2_norm.weight": "backbone.norms.conv4_3.weight",
    "backbone.extra.3.weight": "backbone.extra.conv7_2.2.weight",
    "backbone.extra.2.weight": "backbone.extra.conv7_2.0.weight",
    "bbox_head.cls_convs.2.weight": "head.cls_score.2.weight",
    "bbox_head.reg_convs.2.bias": "head.bbox_pred.2.bias",
}


@pytest.mark.parametrize("layout", list(NAMES))
def test_names_in_both_directions(layout):
    names = NAMES[layout]
    assert recognise(names, layout).title == "SSD"
    assert translate(list(names), layout, "detectron2") == names
    back = {ours: theirs for theirs, ours in names.items()}
    assert translate(list(back), "detectron2", layout) == back
    for other in NAMES:
        if other != layout:
            assert len(translate(list(names), layout, other)) >= len(names) - 2  # levels of 512


def test_names_of_older_versions_of_mmdetection():
    assert translate(list(BEFORE_MMDET_2_14), "mmdet", "detectron2") == BEFORE_MMDET_2_14


def head_of(layout: str, classes: int, boxes: int) -> dict[str, torch.Tensor]:
    """Scores whose numbers are 1000 * box + class, as the layout counts the classes."""
    names = [name for name, ours in NAMES[layout].items() if ours == "head.cls_score.0.weight"]
    (scores,) = names
    box_name = {
        "amdegroot": "loc.0.weight",
        "lufficc": "box_head.predictor.reg_headers.0.weight",
        "mmdet": "bbox_head.reg_convs.0.0.weight",
        "torchvision": "head.regression_head.module_list.0.weight",
    }[layout]
    sign = {"lufficc": box_name, "amdegroot": "L2Norm.weight", "mmdet": "neck.l2_norm.weight"}
    numbers = torch.arange(boxes)[:, None] * 1000.0 + torch.arange(classes)
    tensors = {
        scores: numbers.flatten()[:, None, None, None],
        scores.replace("weight", "bias"): numbers.flatten(),
        box_name: torch.zeros(4 * boxes, 1, 1, 1),
    }
    tensors[sign.get(layout, "backbone.scale_weight")] = torch.zeros(4 * boxes)
    return tensors


@pytest.mark.parametrize("layout", ["amdegroot", "lufficc", "torchvision"])
@pytest.mark.parametrize("classes", [91, 21, 2])
def test_the_background_moves_from_the_first_to_the_last_class(layout, classes):
    tensors = head_of(layout, classes, 4)
    converted = translate_tensors(tensors, layout, "detectron2")
    assert ["background class is the last" in x for x in converted.told] == [True]
    expected = [1000.0 * box + k for box in range(4) for k in [*range(1, classes), 0]]
    for kind in ("weight", "bias"):
        assert converted.tensors[f"head.cls_score.0.{kind}"].flatten().tolist() == expected
    ours = {**converted.tensors, "backbone.extra.conv7_2.0.bias": torch.zeros(1)}
    back = translate_tensors(ours, "detectron2", layout).tensors
    for name, value in tensors.items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize(
    ("boxes", "scores", "words"),
    [
        (None, (84, 1), "without loc.0.weight, which tells how many"),
        ((16, 1), (85, 1), "loc.0.weight is of shape (16, 1), four rows .* of shape (85, 1)"),
        ((), (), "loc.0.weight is of shape ()"),
        ((2, 1), (84, 1), "loc.0.weight is of shape (2, 1)"),
    ],
)
def test_scores_that_do_not_fit_their_boxes_are_told(boxes, scores, words):
    tensors = {"L2Norm.weight": torch.zeros(4), "conf.0.weight": torch.zeros(scores)}
    if boxes is not None:
        tensors["loc.0.weight"] = torch.zeros(boxes)
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(InputError, match=pattern):
        translate_tensors(tensors, "amdegroot", "detectron2")


def test_mmdetection_has_the_background_where_detectron2_has_it():
    tensors = head_of("mmdet", 21, 4)
    converted = translate_tensors(tensors, "mmdet", "detectron2")
    assert not converted.told
    assert torch.equal(
        converted.tensors["head.cls_score.0.bias"], tensors["bbox_head.cls_convs.0.0.bias"]
    )
    across = translate_tensors(tensors, "mmdet", "amdegroot").tensors["conf.0.bias"]
    assert across[:3].tolist() == [20, 0, 1]


@pytest.mark.parametrize(("layout", "config"), [("amdegroot", "300"), ("lufficc", "512")])
def test_a_whole_model_goes_there_and_back(layout, config, tmp_path, capsys):
    small = ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", "1"]
    name = f"ssd{config}_VGG16_voc"
    state = build_model(get_config(name, small)).state_dict()
    there = translate_tensors(state, "detectron2", layout).tensors
    assert len(there) == len(state)
    content = {"model": there} if layout == "lufficc" else there
    torch.save(content, tmp_path / "theirs.pth")
    arguments = ["--from", layout, "--to", "detectron2", "--config-file", name, "--opts", *small]
    convert.main([str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth"), *arguments])
    found = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    printed = capsys.readouterr().out
    assert "MODEL.PIXEL_MEAN [123.0, 117.0, 104.0] MODEL.PIXEL_STD [1.0, 1.0, 1.0]" in printed
    assert "Left over" not in printed and "not filled" not in printed
    assert "The config needs: MODEL.SSD.CLIP centers_and_sides\n" in printed
    assert "The config needs: MODEL.SSD.TRUNCATE_SIZES False\n" in printed


@pytest.mark.parametrize("layout", list(NAMES))
def test_red_and_blue_change_places_in_the_first_convolution(layout):
    first = {
        "amdegroot": "vgg.0.weight",
        "lufficc": "backbone.vgg.0.weight",
        "mmdet": "backbone.features.0.weight",
        "torchvision": "backbone.features.0.weight",
    }[layout]
    value = torch.rand(2, 3, 1, 1)
    for name in (first, "backbone.vgg.features.0.weight"):
        swapped = swap_red_and_blue({"other.0.weight": value, name: value})
        assert torch.equal(swapped[name], value.flip(1))
        assert torch.equal(swapped["other.0.weight"], value)


@pytest.mark.parametrize(
    ("config", "classes"), [("torchvision/ssd300_VGG16", 90), ("ssd300_VGG16_coco", 80)]
)
def test_a_file_of_torchvision_fills_its_own_config_and_that_of_coco(
    tmp_path, capsys, config, classes
):
    with nothing_drawn():
        peer = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None)
    scores = peer.head.classification_head.module_list[1]
    with torch.no_grad():
        scores.bias.copy_((torch.arange(6)[:, None] * 1000.0 + torch.arange(91)).flatten())
    torch.save(peer.state_dict(), tmp_path / "theirs.pth")
    arguments = ["--from", "torchvision", "--to", "detectron2", "--config-file", config]
    convert.main([str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth"), *arguments])
    printed = capsys.readouterr().out
    assert "Left over" not in printed and "not filled" not in printed
    assert ("The config needs: INPUT.FORMAT RGB" in printed) == (classes == 80)
    assert ("The config needs: MODEL.SSD.CLIP sides" in printed) == (classes == 80)
    content = torch.load(tmp_path / "ours.pth", weights_only=True)
    found = content["model"]["head.cls_score.1.bias"].reshape(6, classes + 1)
    names = content["class_names"]
    # The ids of these classes in COCO's annotations.
    for name, index in (("person", 1), ("fire hydrant", 11), ("stop sign", 13), ("toothbrush", 90)):
        assert found[2, names.index(name)] == 2000 + index
    assert len(names) == classes and found[3, -1] == 3000
