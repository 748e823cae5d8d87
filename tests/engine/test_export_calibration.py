"""A calibration of the predicted IoU in files, against the models themselves."""

from __future__ import annotations

import json

import pytest

from exported_models import (
    TWO_LEVELS,
    agreement_at,
    noise,
    small_model,
    small_two_stage,
    write_model,
)
from iou_d2.engine.export.check import load

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

IOU_NET = "configs/quick/iou_net_shapes.yaml"


@pytest.fixture
def calibration(tmp_path):
    """The keys of one that gives IoUs of 0.3 and less 0, and 1 the most, 0.525."""
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"knots": {"predicted": [0.3, 0.9], "true": [0.0, 0.45]}}))
    return "MODEL.CALIBRATION", str(path)


@pytest.mark.parametrize("name", ["iou_retinanet", "atss_iou"])
def test_of_a_dense_detector(tmp_path, calibration, name):
    cfg, model = small_model(f"configs/quick/{name}_shapes.yaml", *calibration)
    graph = write_model(cfg, model, tmp_path / "model.onnx")
    found = agreement_at([(2, 97, 131)], load(tmp_path / "model.onnx", "onnx"), graph, cfg)
    assert found.pairs > 40 and found.holds(graph.doubtful)


@pytest.mark.parametrize(
    ("format", "use"),
    [
        ("onnx", ("MODEL.IOU_NET.RANK_BY", "product")),
        ("torchscript", ("MODEL.IOU_NET.SCORE_TIMES_IOU", "True", "MODEL.IOU_NET.NMS", "plain")),
    ],
)
def test_of_iou_net_in_nms_and_in_scores(tmp_path, calibration, format, use):
    few = ("MODEL.IOU_NET.REFINE_STEPS", "1", "TEST.DETECTIONS_PER_IMAGE", "20", *TWO_LEVELS)
    cfg, model = small_two_stage(IOU_NET, *few, *calibration, *use)
    graph = write_model(cfg, model, tmp_path / "model", format=format)
    run = load(tmp_path / "model", format)
    found = agreement_at([(2, 97, 131), (1, 65, 64)], run, graph, cfg)
    assert found.pairs >= 40 and found.holds()
    (ious,) = (x for name, x in zip(graph.names, run(noise(1, 65, 64))) if name == "pred_ious")
    assert 0 < ious.max() < 0.526
