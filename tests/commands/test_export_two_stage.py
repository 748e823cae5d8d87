"""`iou-d2 export` of a Mask R-CNN with IoU-Net, and what `detect` and `eval` make of the file."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from command_line import metrics_of
from exported_models import SMALL_TWO_STAGE, TWO_LEVELS, small_two_stage
from iou_d2.commands import detect, export
from iou_d2.commands import eval as evaluate
from iou_d2.data.shapes_image import CLASSES

pytest.importorskip("onnx")

CONFIG = "configs/quick/iou_net_shapes.yaml"
OVERRIDES = (
    *("MODEL.MASK_ON", "True", "MODEL.IOU_NET.REFINE_STEPS", "1", "INPUT.MIN_SIZE_TEST", "80"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", str(len(CLASSES)), *TWO_LEVELS),
)


def test_detect_and_eval_take_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    _, model = small_two_stage(CONFIG, *OVERRIDES)
    weights, path = str(tmp_path / "model.pth"), str(tmp_path / "model.onnx")
    torch.save({"model": model.state_dict(), "class_names": list(CLASSES)}, weights)
    own = [*SMALL_TWO_STAGE, *OVERRIDES, "MODEL.WEIGHTS", weights]
    export.main(["--config", CONFIG, "--output", path, *own])
    printed = capsys.readouterr().out
    assert "gives boxes, scores, classes, cls_scores, pred_ious, counts, masks of" in printed
    assert "It and the model agree about" in printed

    tables, records = [], []
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), noise)
    for source in (["--model", path], ["--config", CONFIG]):
        is_model, folder = source[0] == "--model", tmp_path / source[0]
        pairs = [] if is_model else own
        output = ["--output", str(folder / "drawn"), "--confidence-threshold", "0"]
        detect.main([*source, "--input", str(tmp_path / "x.png"), *output, *pairs])
        records += json.loads((folder / "drawn/detections.json").read_text())
        pairs = pairs + ([] if is_model else ["TEST.EXPECTED_RESULTS", "[]"])
        processes = [] if is_model else ["--num-gpus", "0"]
        output = ["OUTPUT_DIR", str(folder)]
        evaluate.main([*source, *processes, "--test", "shapes_val_4x64", *pairs, *output])
        tables.append(metrics_of(folder))
    detections = [x["detections"] for x in records]
    assert len(detections[0]) == len(detections[1]) > 10
    assert {"class", "score", "bbox", "cls_score", "pred_iou"} == set(detections[0][0])
    found, expected = tables
    assert found.keys() == expected.keys() and "bbox/AP" in found
    assert found == pytest.approx(expected, abs=0.05, nan_ok=True)
