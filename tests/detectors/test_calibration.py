"""MODEL.CALIBRATION in each detector that predicts IoUs."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.modeling import build_model

from iou_d2.engine.config_checks import check_config
from iou_d2.errors import InputError, MissingFileError

EVERYTHING = (
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    # So that nothing is cut off before it is compared.
    *("MODEL.RETINANET.NMS_THRESH_TEST", "1.0", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "1.0"),
    *("TEST.DETECTIONS_PER_IMAGE", "-1", "MODEL.IOU_NET.SCORE_TIMES_IOU", "True"),
)
WITH_IOUS = ["iou_retinanet_shapes", "ssd_iou_shapes", "atss_iou_shapes", "iou_net_shapes"]
# Closed forms of the scores from p and the IoU q.
SCORES = {"iou_net_shapes": lambda p, q: p * q}


def knots(path, predicted, true):
    path.write_text(json.dumps({"knots": {"predicted": predicted, "true": true}}))
    return ("MODEL.CALIBRATION", str(path))


def detections(small_cfg, make_batch, name, *overrides):
    cfg = small_cfg(f"configs/quick/{name}.yaml", *EVERYTHING, *overrides)
    check_config(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for parameter_name, parameter in model.named_parameters():
        if "iou_pred" in parameter_name or "quality_pred" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        return model(make_batch([0]))[0]["instances"]


@pytest.mark.parametrize("name", WITH_IOUS)
def test_the_diagonal_changes_nothing(small_cfg, make_batch, tmp_path, name):
    diagonal = knots(tmp_path / "a.json", [0, 1], [0, 1])
    plain, found = (
        detections(small_cfg, make_batch, name, *overrides) for overrides in ((), diagonal)
    )
    assert torch.equal(plain.scores, found.scores) and len(found) > 5
    assert torch.equal(plain.pred_boxes.tensor, found.pred_boxes.tensor)


@pytest.mark.parametrize("name", WITH_IOUS)
def test_the_calibrated_iou_counts_in_the_score(small_cfg, make_batch, tmp_path, name):
    halved = knots(tmp_path / "a.json", [0, 1], [0, 0.5])
    plain, found = (
        detections(small_cfg, make_batch, name, *overrides) for overrides in ((), halved)
    )
    score = SCORES.get(name, lambda p, q: (p * q).sqrt())
    for x in (plain, found):
        assert torch.allclose(x.scores, score(x.cls_scores, x.pred_ious), rtol=1e-5)
    assert found.pred_ious.max() <= 0.5 < plain.pred_ious.max()
    top = [x.pred_ious.sort().values[-3:] for x in (plain, found)]
    assert torch.allclose(top[0] / 2, top[1])


@pytest.mark.parametrize("name", ["vfnet_shapes", "atss_shapes", "retinanet_shapes", "ssd_shapes"])
def test_a_detector_without_predicted_ious_is_refused(small_cfg, name):
    cfg = small_cfg(f"configs/quick/{name}.yaml", "MODEL.CALIBRATION", "a.json")
    with pytest.raises(InputError, match="MODEL.CALIBRATION needs predicted IoUs"):
        check_config(cfg)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"knots": {"predicted": ["a"], "true": [1]}}', '{"knots": 3}']
)
def test_a_file_that_is_no_calibration_is_named(small_cfg, tmp_path, text):
    path = tmp_path / "wrong.json"
    cfg = small_cfg("configs/quick/iou_retinanet_shapes.yaml", "MODEL.CALIBRATION", str(path))
    with pytest.raises(MissingFileError, match="wrong.json, which is not there"):
        build_model(cfg)
    path.write_text(text)
    with pytest.raises(InputError, match="wrong.json, which is no file of `iou-d2 calibrate`"):
        build_model(cfg)
