from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from iou_d2.commands.draw import main
from iou_d2.commands.drawing import READABLE_SIDE, color_of, detection_label, draw_boxes


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
    arguments = ["--gt", str(tmp_path / "gt.json"), "--images", str(tmp_path / "images")]
    arguments += ["--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "out")]
    main(arguments)
    drawn = cv2.imread(str(tmp_path / "out/a.png")).astype(int)
    assert drawn.shape == (800, 1608, 3)
    left, right = drawn[:, :800], drawn[:, 808:]
    assert np.abs(left[45:55, 60:140] - 90).max() > 20 and np.abs(left[250:, 250:] - 90).max() <= 1
    assert np.abs(right[295:305, 310:490] - 90).max() > 20


def test_the_box_with_the_best_score_is_on_top():
    boxes = np.array([[100.0, 100, 500, 500]] * 2)
    drawn = draw_boxes(np.zeros((800, 800, 3), dtype=np.uint8), boxes, [1, 0], ["", ""])
    assert tuple(drawn[300, 100, ::-1]) == color_of(1)


@pytest.mark.parametrize("side", [1e300, -1e300, np.inf])
def test_boxes_far_outside_and_without_area_are_drawn(side):
    boxes = [[10, 10, side, side], [side, side, side, side], [50, 50, 50, 50], [60, 60, 40, 40]]
    picture = np.zeros((800, 900, 3), dtype=np.uint8)
    assert draw_boxes(picture, np.array(boxes), [0, 1, 2, 3], ["猫\n", "a" * 99, "", "b"]).any()


def test_classes_have_colours_of_their_own():
    assert len({color_of(index) for index in range(80)}) == 80
    distances = [
        np.abs(np.subtract(color_of(i), color_of(j))).max() for i in range(12) for j in range(i)
    ]
    assert min(distances) > 40
