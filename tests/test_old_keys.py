"""Configs of earlier versions."""

from __future__ import annotations

import pytest
from detectron2.config import get_cfg

from iou_d2 import add_iou_config, get_config


def load(tmp_path, text, *overrides):
    path = tmp_path / "old.yaml"
    path.write_text(text)
    return get_config(path, overrides)


def test_an_old_node_is_read_under_its_new_name_with_one_line(tmp_path, capsys):
    text = "MODEL: {VFNET: {HEAD: QualityHead, REGRESS_RANGES: [1, 2], ANCHOR_SCALE: 4.0}}"
    node = load(tmp_path, text).MODEL.POINT_DETECTOR
    assert (node.HEAD, node.ANCHOR_SCALE) == ("QualityHead", 4.0)
    assert node.DISTANCE_UNITS == node.MAX_DISTANCES == [1, 2]
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "earlier" in x]
    assert "old.yaml" in line and "is now MODEL.POINT_DETECTOR." in line and "2 more" in line


def test_old_keys_on_the_command_line(capsys):
    cfg = get_config("", ["MODEL.VFNET.CLS_LOSS", "focal", "SOLVER.MAX_ITER", "7"])
    assert (cfg.MODEL.POINT_DETECTOR.CLS_LOSS, cfg.SOLVER.MAX_ITER) == ("focal", 7)
    assert "The command line has keys of an earlier iou_d2" in capsys.readouterr().out


def test_the_keys_of_a_unitbox_are_those_of_all_dense_detectors(tmp_path):
    old = "UNITBOX: {NUM_CLASSES: 3, NMS_THRESH_TEST: 0.4}"
    node = load(tmp_path, f"MODEL: {{META_ARCHITECTURE: UnitBox, {old}}}").MODEL.RETINANET
    assert (node.NUM_CLASSES, node.NMS_THRESH_TEST) == (3, 0.4)
    # A saved config of another detector holds them, too, and they are not meant.
    node = load(tmp_path, f"MODEL: {{META_ARCHITECTURE: PointDetector, {old}}}").MODEL.RETINANET
    assert (node.NUM_CLASSES, node.NMS_THRESH_TEST) == (80, 0.5)


def test_a_saved_iou_net_pools_as_it_was_trained(tmp_path):
    text = (
        "MODEL: {ROI_HEADS: {NAME: IoUNetROIHeads}, ROI_BOX_HEAD: {POOLER_TYPE: ROIAlignV2}, "
        "VFNET: {HEAD: VFNetHead}}"
    )
    assert load(tmp_path, text).MODEL.ROI_BOX_HEAD.POOLER_TYPE == "PrRoIPool"
    later = text.replace("VFNET", "POINT_DETECTOR")
    assert load(tmp_path, later).MODEL.ROI_BOX_HEAD.POOLER_TYPE == "ROIAlignV2"


def test_a_saved_atss_decodes_and_ranks_as_it_did(tmp_path):
    text = "MODEL: {POINT_DETECTOR: {HEAD: QualityHead, CLS_LOSS: focal, QUALITY: centerness}}"
    node = load(tmp_path, text).MODEL.POINT_DETECTOR
    assert (node.BOX_CODEC, node.QUALITY_TOWER, node.LEVEL_SCALES) == ("exp", "box", True)
    assert (node.INFERENCE, node.BOX_LOSS_MEAN, node.MIN_QUALITY_SUM) == ("authors", "weighted", 1)
    assert not node.TOWER_BIAS and not node.OPEN_RANGES


@pytest.mark.parametrize("key", ["MODEL.VFNET.HEAD", "MODEL.UNITBOX.NUM_CLASSES"])
def test_detectron2s_own_merging_says_what_took_the_place_of_an_old_key(tmp_path, key):
    cfg = get_cfg()
    add_iou_config(cfg)
    _, node, name = key.split(".")
    path = tmp_path / "old.yaml"
    path.write_text(f"MODEL: {{{node}: {{{name}: 1}}}}\nVERSION: 2")
    with pytest.raises(KeyError, match="was renamed to MODEL.(POINT_DETECTOR|RETINANET)"):
        cfg.merge_from_file(str(path))
