"""torchvision's ids of COCO against Detectron2's 80 classes, and Caffe's pixels."""

from __future__ import annotations

import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from checkpoint_helpers import read
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert

THIN = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "8"),
)


def rows_by_id(count, per_class, first_id):
    """(count * per_class, 1) where each row is the id of its class."""
    ids = torch.arange(first_id, first_id + count, dtype=torch.float32)
    return ids.repeat_interleave(per_class)[:, None]


def coco_ids():
    return torch.tensor(
        list(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)
    )


def model_of(config, classes):
    key = "MODEL.ROI_HEADS.NUM_CLASSES" if "rcnn" in config else "MODEL.RETINANET.NUM_CLASSES"
    opts = (*THIN, key, str(classes))
    return build_model(get_config(config, opts)), opts


def test_the_classes_that_coco_uses_are_kept_of_a_softmax(tmp_path, capsys):
    config = "torchvision/faster_rcnn_R_50_FPN"
    whole, _ = model_of(config, 90)
    state = whole.state_dict()
    predictor = "roi_heads.box_predictor."
    columns = state[f"{predictor}cls_score.weight"].shape[1]
    ids = torch.cat([rows_by_id(90, 1, 1), torch.zeros(1, 1)])  # the background is last
    state[f"{predictor}cls_score.weight"] = ids.expand(-1, columns).clone()
    state[f"{predictor}bbox_pred.weight"] = rows_by_id(90, 4, 1).expand(-1, columns).clone()
    ours, theirs, back = (str(tmp_path / name) for name in ("a.pth", "b.pth", "c.pth"))
    torch.save({"model": state}, ours)
    convert([ours, theirs, "--from", "detectron2", "--to", "torchvision"])

    _, opts = model_of(config, 80)
    arguments = [theirs, back, "--from", "torchvision", "--to", "detectron2"]
    convert([*arguments, "--config-file", config, "--opts", *opts])
    assert "of 90 rows of classes the 80 that COCO uses are kept" in capsys.readouterr().out
    content = read(back)
    assert content["class_names"] == MetadataCatalog.get("coco_2017_val").thing_classes
    scores = content["model"][f"{predictor}cls_score.weight"][:, 0]
    assert torch.equal(scores, torch.cat([coco_ids().float(), torch.zeros(1)]))
    boxes = content["model"][f"{predictor}bbox_pred.weight"][:, 0]
    assert torch.equal(boxes, coco_ids().float().repeat_interleave(4))


def test_the_classes_that_coco_uses_are_kept_of_sigmoids(tmp_path, capsys):
    config = "torchvision/fcos_R_50_FPN"
    groups = ("MODEL.POINT_DETECTOR.NUM_GROUPS", "4")
    whole = build_model(get_config(config, (*THIN, *groups)))
    state = whole.state_dict()
    ids = rows_by_id(91, 1, 0)[:, :, None, None]
    state["head.cls_pred.weight"] = ids.expand_as(state["head.cls_pred.weight"]).clone()
    ours, theirs = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    torch.save({"model": state}, ours)
    convert([ours, theirs, "--from", "detectron2", "--to", "torchvision"])

    arguments = [theirs, ours, "--force", "--from", "torchvision", "--to", "detectron2"]
    arguments += ["--config-file", config, "--opts", *THIN, *groups]
    convert([*arguments, "MODEL.RETINANET.NUM_CLASSES", "80"])
    assert "of 91 rows of classes the 80" in capsys.readouterr().out
    content = read(ours)
    assert torch.equal(content["model"]["head.cls_pred.weight"][:, 0, 0, 0], coco_ids().float())
    assert len(content["class_names"]) == 80

    convert(arguments)  # all 91, as the config says
    content = read(ours)
    assert torch.equal(content["model"]["head.cls_pred.weight"], state["head.cls_pred.weight"])
    names = content["class_names"]
    assert (len(set(names)), names[1], names[12], names[90]) == (
        *(91, "person"),
        *("unused 12", "toothbrush"),
    )


def test_caffes_pixels_stay_where_the_file_has_no_config(tmp_path, capsys):
    config = "mmdet/retinanet_R_50_FPN_caffe"
    state = build_model(get_config(config, THIN)).state_dict()
    ours, theirs, back = (str(tmp_path / name) for name in ("a.pth", "b.pth", "c.pth"))
    torch.save({"model": state}, ours)
    file = ["--config-file", config, "--opts", *THIN]
    convert([ours, theirs, "--from", "detectron2", "--to", "mmdet", *file])
    assert "The model takes BGR" in capsys.readouterr().out
    first = read(theirs)["state_dict"]["backbone.conv1.weight"]
    assert torch.equal(first, state["backbone.bottom_up.stem.conv1.weight"])

    convert([theirs, back, "--from", "mmdet", "--to", "detectron2", *file])
    assert "taken to be of BGR, so red and blue stay" in capsys.readouterr().out
    found = read(back)["model"]
    assert all(torch.equal(found[name], value) for name, value in state.items() if name in found)
    assert set(state) - set(found) <= {name for name in state if "cell_anchors" in name}
