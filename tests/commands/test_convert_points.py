"""What `iou-d2 convert` says of ATSS and FCOS that names and shapes do not."""

from __future__ import annotations

import pytest
import torch

from iou_d2.commands.convert import main as convert
from iou_d2.engine.convert import has_linear_p7, settings_of_mmdet, translate

SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.POINT_DETECTOR.NUM_GROUPS", "4", "MODEL.RETINANET.NUM_CLASSES", "3"),
]
FCOS = "model = dict(neck=dict({}), bbox_head=dict(type='FCOSHead', strides=[8], {}))"
NORM, ON_REG = "norm_on_bbox=True", "centerness_on_reg = True"


def write(path, text=""):
    state = {"backbone.conv1.weight": torch.rand(8, 3, 7, 7)}
    meta = {"config": text} if text else {}
    torch.save({"state_dict": state, "meta": meta}, path)
    return str(path)


def run(tmp_path, source, *arguments):
    ours = str(tmp_path / "b.pth")
    convert([source, ours, "--from", "mmdet", "--to", "detectron2", "--force", *arguments])


def test_names_of_fcos_before_and_after_mmdetection_2_3():
    new = {
        "bbox_head.conv_cls.weight": "head.cls_pred.weight",
        "bbox_head.conv_reg.bias": "head.box_pred.bias",
        "bbox_head.conv_centerness.bias": "head.quality_pred.bias",
        "bbox_head.scales.4.scale": "head.box_scales.4",
        "bbox_head.cls_convs.3.conv.bias": "head.cls_tower.3.bias",
    }
    old = {name.replace(".conv_", ".fcos_"): ours for name, ours in new.items()}
    assert translate(list(new), "mmdet", "detectron2") == new
    assert translate(list(old), "mmdet", "detectron2") == old
    back = {ours: theirs for theirs, ours in new.items()}
    assert translate(list(back), "detectron2", "mmdet") == back


def test_what_the_text_of_a_config_says():
    assert settings_of_mmdet("") == settings_of_mmdet("type='NASFCOSHead'") == {}
    assert settings_of_mmdet(FCOS.format("", "")) == {"BOX_CODEC": "exp", "QUALITY_TOWER": "class"}
    found = settings_of_mmdet(FCOS.format("", f"{NORM}, {ON_REG}"))
    assert found == {"BOX_CODEC": "relu", "QUALITY_TOWER": "box"}
    assert has_linear_p7("add_extra_convs='on_output', num_outs=5")
    assert not has_linear_p7("add_extra_convs=True, relu_before_extra_convs = True")
    assert not has_linear_p7("add_extra_convs=False") and not has_linear_p7("")


def test_settings_that_differ_are_told(tmp_path, capsys):
    config = ["--config-file", "configs/fcos_R_50_FPN_1x.yaml", "--opts", *SMALL]
    text = FCOS.format("add_extra_convs='on_output'", NORM)
    run(tmp_path, write(tmp_path / "a.pth", text), *config)
    printed = capsys.readouterr().out
    assert "needs: MODEL.POINT_DETECTOR.BOX_CODEC relu" in printed
    assert "QUALITY_TOWER" not in printed
    assert "no ReLU between p6 and p7" in printed and "linear_p7" in printed
    text = FCOS.format("add_extra_convs='on_output', relu_before_extra_convs=True", "")
    run(tmp_path, write(tmp_path / "a.pth", text), *config)
    printed = capsys.readouterr().out
    assert "POINT_DETECTOR" not in printed and "ReLU" not in printed


def test_a_file_without_a_config_is_taken_to_be_of_rgb(tmp_path, capsys):
    config = ["--config-file", "configs/mmdet/fcos_R_50_FPN_caffe.yaml", "--opts", *SMALL]
    run(tmp_path, write(tmp_path / "a.pth"), *config)
    assert "holds no config: it is taken to be of RGB" in capsys.readouterr().out


def test_distances_in_our_units_are_nobody_elses(tmp_path):
    config = ["--config-file", "configs/atss_points_R_50_FPN_1x.yaml", "--opts", *SMALL]
    with pytest.raises(SystemExit, match=r"DISTANCE_UNITS \[64, .*no other code"):
        run(tmp_path, write(tmp_path / "a.pth"), *config)
    assert not (tmp_path / "b.pth").exists()


def test_a_format_for_layouts_that_have_detectron2s(tmp_path):
    source = tmp_path / "a.pth"
    torch.save({"backbone.bottom_up.stem.conv1.weight": torch.rand(8, 3, 7, 7)}, source)
    arguments = [str(source), str(tmp_path / "b.pth"), "--from", "adelaidet", "--to", "detectron2"]
    convert(arguments)
    with pytest.raises(SystemExit, match="--format is for mmdet and torchvision"):
        convert([*arguments, "--force", "--format", "RGB"])
