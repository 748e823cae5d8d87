from __future__ import annotations

import json
import subprocess
import sys

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from iou_d2.detectors.visualize import (
    DRAWN,
    READABLE_SIDE,
    detection_label,
    draw_boxes,
    is_time_to_draw,
    visualize_training,
)


def test_labels():
    assert detection_label("star", 0.934) == "star 0.93"
    assert detection_label("star", 0.934, 0.8) == "star 0.93 IoU 0.80"


def test_boxes_change_the_picture_along_their_sides_only():
    image = np.full((900, 1000, 3), 80, dtype=np.uint8)
    plain = draw_boxes(image, np.zeros((0, 4)), [], [])
    assert plain.shape == image.shape and np.abs(plain.astype(int) - 80).max() <= 1
    drawn = draw_boxes(image, np.array([[100.0, 200, 500, 550]]), [3], [""])
    changed = np.abs(drawn.astype(int) - plain).max(axis=2) > 20
    assert changed[195:205, 150:450].any(axis=0).all()
    assert changed[250:500, 495:505].any(axis=1).all()
    assert not changed[260:500, 130:470].any() and not changed[:150].any()


def test_small_pictures_are_enlarged():
    drawn = draw_boxes(np.zeros((40, 80, 3), dtype=np.uint8), np.array([[1, 1, 9, 9]]), [99], ["a"])
    assert drawn.shape == (READABLE_SIDE // 2, READABLE_SIDE, 3)


def test_draw_results_puts_truth_beside_predictions(tmp_path):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), np.full((800, 800, 3), 90, dtype=np.uint8))
    truth = {
        "images": [{"id": 5, "file_name": "a.png", "height": 800, "width": 800}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [50, 50, 100, 100], "iscrowd": 0}
        ],
    }
    found = {"image_id": 5, "category_id": 7, "bbox": [300, 300, 200, 200], "score": 0.9}
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps([found, {**found, "score": 0.01}]))
    subprocess.run(
        [
            *(sys.executable, "-m", "iou_d2.commands.draw", "--gt", tmp_path / "gt.json"),
            *("--images", tmp_path / "images", "--results", tmp_path / "results.json"),
            *("--output", tmp_path / "out"),
        ],
        check=True,
    )
    drawn = cv2.imread(str(tmp_path / "out/a.png")).astype(int)
    assert drawn.shape == (800, 1608, 3)
    left, right = drawn[:, :800], drawn[:, 808:]
    assert np.abs(left[45:55, 60:140] - 90).max() > 20 and np.abs(left[250:, 250:] - 90).max() <= 1
    assert np.abs(right[295:305, 310:490] - 90).max() > 20


def test_when_it_is_time_to_draw():
    with EventStorage(start_iter=0) as storage:
        drawn = []
        for _ in range(7):
            drawn.append([is_time_to_draw(period) for period in (0, 1, 3)])
            storage.step()
    assert [x[0] for x in drawn] == [False] * 7
    assert [x[1] for x in drawn] == [True] * 7
    assert [x[2] for x in drawn] == [True, False, False, True, False, False, True]


def test_a_picture_of_the_training_has_the_truth_left_and_detections_right(make_batch):
    image = make_batch([2], side=120)[0]
    image["image"] = torch.zeros(3, 120, 120, dtype=torch.uint8)
    image["image"][0] = 90  # blue, in BGR
    empty = Instances((120, 120), pred_boxes=Boxes(torch.zeros(0, 4)))
    one = Instances((120, 120), pred_boxes=Boxes(torch.tensor([[20.0, 30, 80, 100]])))
    for detections in (empty, one):
        with EventStorage() as storage:
            visualize_training(image, detections, "BGR")
        ((_, picture, _),) = storage._vis_data
        assert picture.shape == (3, 120, 240)
        drawn = (picture != np.array([0, 0, 90]).reshape(3, 1, 1)).any(axis=0)
        truth = image["instances"].gt_boxes.tensor.numpy()
        assert np.abs(hull_of(drawn[:, :120]) - hull_of_boxes(truth)).max() < 4
        if len(detections):
            found = detections.pred_boxes.tensor.numpy()
            assert np.abs(hull_of(drawn[:, 120:]) - hull_of_boxes(found)).max() < 4
        else:
            assert not drawn[:, 120:].any()


def test_a_picture_of_the_training_has_the_best_detections_alone(make_batch):
    image = make_batch([1], side=120)[0]
    image["image"] = torch.zeros(3, 120, 120, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10, 40, 40]] * DRAWN + [[60.0, 60, 100, 100]])
    with EventStorage() as storage:
        visualize_training(image, Instances((120, 120), pred_boxes=Boxes(boxes)), "BGR")
    right = storage._vis_data[0][1][:, :, 120:]
    assert right[:, :50, :50].any() and not right[:, 50:, 50:].any()


def hull_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()])


def hull_of_boxes(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
