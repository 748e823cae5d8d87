from __future__ import annotations

import json
import subprocess
import sys

import cv2
import numpy as np

from iou_d2.visualize import READABLE_SIDE, detection_label, draw_boxes


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
            *(sys.executable, "tools/draw_results.py", "--gt", tmp_path / "gt.json"),
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
