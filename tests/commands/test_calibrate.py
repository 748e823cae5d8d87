"""`iou-d2 calibrate` as a user runs it, on generated images and random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from iou_d2 import get_config
from iou_d2.commands import calibrate
from iou_d2.data.shapes import ShapesSpec, write_shapes
from iou_d2.errors import InputError
from iou_d2.evaluation.judged import Judged
from iou_d2.ops.calibration import PiecewiseLinear


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has not learnt anything."""
    folder = tmp_path_factory.mktemp("run")
    write_shapes(ShapesSpec("val", 6, 64, 0), folder / "shapes")
    overrides = [
        *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.NUM_CLASSES", "5"),
        *("OUTPUT_DIR", str(folder)),
    ]
    cfg = get_config("configs/quick/iou_retinanet_shapes.yaml", overrides)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def main(run, *options):
    data = f"coco:{run}/shapes/instances.json:{run}/shapes/images"
    calibrate.main(["--run", str(run), "--test", data, *options])


def test_knots_are_written_beside_the_weights_and_can_be_used(run, capsys):
    main(run)
    path = run / "model_final.calibration.json"
    content = json.loads(path.read_text())
    predicted, true = content["knots"]["predicted"], content["knots"]["true"]
    assert predicted == sorted(predicted) and true == sorted(true)
    assert content["detections"] == {"fit": 300, "held_out": 300} and content["min_iou"] == 0
    assert (run / "model_final.calibration.png").read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    errors = {
        tuple(cell.strip() for cell in line.split("|")[1:3]): float(line.split("|")[6])
        for line in lines
        if line.startswith(("| confidence", "| predicted", "| calibrated"))
    }
    assert len(errors) == 6
    # Random IoUs of 0.5 stand against false detections.
    assert errors["calibrated IoU", "held out"] < 0.1 < errors["predicted IoU", "held out"]
    cfg = get_config(str(run / "config.yaml"), ["MODEL.CALIBRATION", str(path)])
    assert build_model(cfg).iou_awareness.calibration == PiecewiseLinear(
        tuple(predicted), tuple(true)
    )


def test_no_image_is_fitted_on_and_judged_by():
    image = np.repeat(np.arange(20.0), 20)
    judged = Judged(image, *(np.linspace(0, 1, 400) for _ in range(3)))
    fitted, others = calibrate.split(judged, 0.25)
    assert not set(fitted.image) & set(others.image)
    assert (len(fitted.true), len(others.true)) == (100, 300)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--min-iou", "1"), "--min-iou is in"),
        (("--min-iou", "0.99"), "to fit on and"),
        (("--share", "0"), "--share is between"),
        (("--config", "configs/quick/vfnet_shapes.yaml"), "leave --config out"),
        (("MODEL.CALIBRATION", "a.json"), "not calibrated again"),
        (("MODEL.META_ARCHITECTURE", "BoxLossRetinaNet"), "A calibration needs predicted IoUs"),
    ],
)
def test_what_is_wrong_is_named(run, options, sentence):
    with pytest.raises(InputError, match=sentence):
        main(run, *options)
