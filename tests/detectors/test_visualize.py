from __future__ import annotations

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from iou_d2.detectors.visualize import (
    DRAWN,
    is_time_to_draw,
    visualize_training,
)


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
