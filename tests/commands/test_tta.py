"""TEST.AUG in training, in evaluation, in `detect` and in a predictor: a run of two iterations."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from command_line import TINY, command, metrics_of, run
from iou_d2 import build_predictor, get_config
from iou_d2.commands import detect, export
from iou_d2.commands import eval as evaluate
from iou_d2.commands.trained import open_trained
from iou_d2.engine.trainer import Trainer
from iou_d2.errors import InputError

AUGMENTED = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)")
ONE_VIEW = (
    *("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)"),
    *("TEST.AUG.FLIP", "False", "TEST.AUG.MAX_SIZE", "1333"),
)
TASKS = {"bbox/AP", "bbox_TTA/AP", "bbox_TTA/AP90", "localization_TTA/pearson_confidence"}


@pytest.fixture(scope="module")
def folder(environment, tmp_path_factory):
    """A run whose test images were augmented at its end."""
    folder = tmp_path_factory.mktemp("augmented")
    arguments = (*TINY, *AUGMENTED, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(folder))
    run(environment, command(*arguments))
    return folder


def test_training_ends_with_both_evaluations(folder):
    record = json.loads((folder / "run.json").read_text())
    assert record["outcome"] == "finished" and record["results"].keys() >= TASKS
    assert record["test_augmentation"]["MIN_SIZES"] == [48, 64]
    assert record["test_augmentation"]["FLIP"] is True
    assert metrics_of(folder).keys() >= TASKS
    for name in ("inference", "inference_TTA"):
        assert (folder / name / "coco_instances_results.json").is_file()


def test_one_view_has_the_figures_of_none(environment, folder, tmp_path):
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    everything = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    arguments = ("--eval-only", *TINY, *ONE_VIEW, *everything, *weights)
    run(environment, command(*arguments, "OUTPUT_DIR", str(tmp_path)))
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["test_augmentation"]["MIN_SIZES"] == [64]
    results = record["results"]
    for name in [x for x in results if "_TTA" not in x]:
        task, _, metric = name.partition("/")
        assert results[name] == results[f"{task}_TTA/{metric}"], name
    found, augmented = (
        json.loads((tmp_path / name / "coco_instances_results.json").read_text())
        for name in ("inference", "inference_TTA")
    )
    assert found == augmented and len(found) > 100


def test_a_predictor_and_detect_augment_alike(folder):
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    low = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    config = str(folder / "config.yaml")
    image = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    plain = build_predictor(get_config(config, [*weights, *low, "TEST.AUG.ENABLED", "False"]))(
        image
    )["instances"]
    one = build_predictor(get_config(config, [*weights, *low, *ONE_VIEW]))(image)["instances"]
    assert torch.equal(one.pred_boxes.tensor, plain.pred_boxes.tensor) and len(one) == 100
    assert torch.equal(one.scores, plain.scores) and torch.equal(one.pred_ious, plain.pred_ious)

    several = build_predictor(get_config(config, [*weights, *low]))(image)["instances"]
    assert not torch.equal(several.pred_boxes.tensor, plain.pred_boxes.tensor)
    detector, _ = open_trained(config, [*weights, *low])
    assert detector(image)["scores"].tolist() == several.scores.tolist()


def test_detect_draws_with_it(folder, tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), np.full((40, 60, 3), 99, dtype=np.uint8))
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    output = ("--output", str(tmp_path / "out"), "--confidence-threshold", "0")
    config = ("--config", str(folder / "config.yaml"), "--input", str(tmp_path / "x.png"))
    detect.main([*config, *output, *weights])
    (record,) = json.loads((tmp_path / "out/detections.json").read_text())
    assert (record["height"], record["width"]) == (40, 60)


def test_what_cannot_augment_says_so(folder, tmp_path):
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    config = ("--config", str(folder / "config.yaml"))
    with pytest.raises(InputError, match="TEST.AUG.ENABLED is True, but only"):
        export.main([*config, "--output", str(tmp_path / "x.onnx"), *weights])
    heads = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.DEVICE", "cpu")
    with pytest.raises(InputError, match="MODEL.ROI_HEADS.NAME is StandardROIHeads"):
        Trainer.build_model(get_config("quick/faster_rcnn_shapes", [*heads, *AUGMENTED]))


def test_an_exported_model_is_not_augmented(tmp_path, monkeypatch):
    class Predictor:
        def __init__(self, path):
            self.class_names = ["cat"]

    monkeypatch.setattr(evaluate, "ExportedPredictor", Predictor)
    arguments = ["--model", "x.onnx", "OUTPUT_DIR", str(tmp_path), *AUGMENTED]
    with pytest.raises(InputError, match="TEST.AUG.ENABLED is True, but an exported model"):
        evaluate.main(arguments)
