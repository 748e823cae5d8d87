"""`iou-d2 refine` as a user runs it, on four generated images and random weights."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.modeling import build_model

from computing import dtypes_of_convolutions
from iou_d2 import get_config
from iou_d2.commands import refine as refine_detections
from iou_d2.data.shapes import ShapesSpec, write_shapes
from iou_d2.errors import MissingFileError

CONFIG = "configs/quick/iou_net_standalone_shapes.yaml"
OFF = (
    *("MODEL.IOU_NET.NMS", "plain", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "1.0"),
    *("MODEL.IOU_NET.REFINE_STEPS", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with images, ground truth, shifted ground truth as detections, and weights."""
    folder = tmp_path_factory.mktemp("data")
    write_shapes(ShapesSpec("val", 4, 100, 0), folder / "shapes")
    truth = json.loads((folder / "shapes/instances.json").read_text())
    results = [
        {
            "image_id": x["image_id"],
            "category_id": x["category_id"],
            "bbox": [x["bbox"][0] + 1, x["bbox"][1] + 2, *x["bbox"][2:]],
            "score": 0.9 - 0.001 * number,
        }
        for number, x in enumerate(truth["annotations"])
        if not x["iscrowd"]
        and x["bbox"][0] + x["bbox"][2] < 98
        and x["bbox"][1] + x["bbox"][3] < 97
    ]
    assert len(results) > 5
    (folder / "results.json").write_text(json.dumps(results))
    cfg = get_config(CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "5"])
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.normal_(model.roi_heads.iou_branch.iou_pred.weight, std=0.2)
    names = [c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])]
    torch.save({"model": model.state_dict(), "class_names": names}, folder / "model.pth")
    return folder


def run(data, *overrides, config=CONFIG, weights=None, gt="shapes/instances.json"):
    refine_detections.main(
        [
            *("--config-file", config, "--gt", str(data / gt)),
            *("--images", str(data / "shapes/images"), "--results", str(data / "results.json")),
            *("--output", str(data / "out/refined.json")),
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights or str(data / "model.pth")),
            *overrides,
        ]
    )
    return json.loads((data / "out/refined.json").read_text())


def by_place(results):
    return sorted(results, key=lambda x: -x["score"])


def test_all_off_gives_the_detections_back_with_their_predicted_iou(data, capsys):
    refined = by_place(run(data, *OFF))
    results = by_place(json.loads((data / "results.json").read_text()))
    assert len(refined) == len(results)
    for a, b in zip(results, refined):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert b["bbox"] == pytest.approx(a["bbox"], abs=1e-3)
        assert b["score"] == pytest.approx(a["score"], abs=1e-6) and 0 <= b["pred_iou"] <= 1
    before, after = (line.split("|")[2:] for line in capsys.readouterr().out.splitlines()[-3:-1])
    assert before == after and float(before[0]) > 5


def test_without_annotations_ap_is_left_out(data, capsys):
    truth = json.loads((data / "shapes/instances.json").read_text())
    del truth["annotations"]
    (data / "unlabelled.json").write_text(json.dumps(truth))
    assert run(data, *OFF, gt="unlabelled.json") == run(data, *OFF)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("unlabelled.json has no annotations: AP is left out.")


def test_refinement_moves_boxes_uphill(data, capsys):
    still = by_place(run(data, *OFF))
    moved = by_place(run(data, *OFF, *("MODEL.IOU_NET.REFINE_STEPS", "5")))
    assert len(still) == len(moved)
    assert sum(b["pred_iou"] > a["pred_iou"] for a, b in zip(still, moved)) > len(still) / 2
    assert any(a["bbox"] != b["bbox"] for a, b in zip(still, moved))
    for x in moved:
        left, top, width, height = x["bbox"]
        assert left >= 0 and top >= 0 and width >= 0 and height >= 0
        assert left + width <= 100.001 and top + height <= 100.001


def test_detections_under_the_score_threshold_are_dropped(data):
    threshold = 0.895
    refined = run(data, *OFF, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", str(threshold))
    results = json.loads((data / "results.json").read_text())
    assert len(refined) == sum(x["score"] > threshold for x in results) < len(results)


def test_what_is_wrong_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="BoxLossROIHeads has no IoU branch"):
        run(data, config="configs/quick/faster_rcnn_shapes.yaml")
    truth = json.loads((data / "shapes/instances.json").read_text())
    truth["categories"][0]["name"] = "hexagon"
    (data / "other.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="knows the classes .* ground truth has .*hexagon"):
        run(data, gt="other.json")
    truth["images"][0]["file_name"] = "missing.png"
    truth["categories"][0]["name"] = "ellipse"
    (data / "other.json").write_text(json.dumps(truth))
    with pytest.raises(MissingFileError, match="missing.png"):
        run(data, gt="other.json")
    truth["categories"] = truth["categories"][:1]
    (data / "other.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="categor"):
        run(data, gt="other.json")


def detections(*counts: int) -> list[dict]:
    return [{"image_id": image} for image, count in enumerate(counts) for _ in range(count)]


def test_images_cut_off_at_the_limit_of_detectron2_are_warned_of():
    warning = refine_detections.cut_off_warning(detections(100, 3, 100))
    assert warning.startswith("2 of 3 images have exactly 100 detections")
    assert "TEST.DETECTIONS_PER_IMAGE -1" in warning
    for counts in ((), (99, 3), (100, 101)):
        assert refine_detections.cut_off_warning(detections(*counts)) is None


def test_the_warning_is_printed(data, capsys):
    results = json.loads((data / "results.json").read_text())
    first = [result for result in results if result["image_id"] == results[0]["image_id"]]
    cut = [first[i % len(first)] for i in range(100)]
    (data / "cut.json").write_text(json.dumps(cut))
    refine_detections.main(
        [
            *("--config-file", CONFIG, "--gt", str(data / "shapes/instances.json")),
            *("--images", str(data / "shapes/images"), "--results", str(data / "cut.json")),
            *("--output", str(data / "out/cut.json"), "MODEL.DEVICE", "cpu"),
            *("MODEL.WEIGHTS", str(data / "model.pth")),
        ]
    )
    assert "1 of 1 images have exactly 100 detections" in capsys.readouterr().err


def test_help_says_how_results_are_to_be_made(capsys):
    with pytest.raises(SystemExit):
        refine_detections.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "NMS_THRESH_TEST, at 1.0" in text and "TEST.DETECTIONS_PER_IMAGE -1" in text


def test_the_networks_compute_in_the_precision_of_the_config(data):
    for precision in ("float32", "bfloat16"):
        with dtypes_of_convolutions() as dtypes:
            refined = run(data, *OFF, "MODEL.PRECISION", precision)
        assert dtypes == {getattr(torch, precision)} and refined
