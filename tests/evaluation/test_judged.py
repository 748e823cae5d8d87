from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances

from iou_d2.evaluation.judged import JudgedDetections


def objects(size, boxes, classes):
    truth = Instances(size, gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)))
    truth.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {"instances": truth}


def detections(size, boxes, classes):
    found = Instances(size, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)))
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    found.scores = torch.linspace(0.9, 0.8, len(found))
    found.pred_ious = torch.linspace(0.5, 0.6, len(found))
    return {"instances": found}


def test_objects_are_compared_at_the_size_of_the_detections():
    evaluator = JudgedDetections()
    # The network saw the first image twice as wide and three times as high.
    truth = objects((300, 200), [[20, 30, 40, 60], [0, 0, 200, 300]], [1, 0])
    found = detections((100, 100), [[10, 10, 20, 20], [10, 10, 20, 15], [0, 0, 9, 9]], [1, 1, 2])
    evaluator.process([truth], [found])
    evaluator.process([objects((10, 10), [], [])], [detections((10, 10), [], [])])
    evaluator.process([objects((10, 10), [], [])], [detections((10, 10), [[0, 0, 5, 5]], [0])])
    judged = evaluator.evaluate()
    assert judged.image.tolist() == [0, 0, 0, 2]
    assert judged.true == pytest.approx([1, 0.5, 0, 0])
    assert judged.confidence == pytest.approx([0.9, 0.85, 0.8, 0.9])
    assert judged.predicted == pytest.approx([0.5, 0.55, 0.6, 0.5])
    evaluator.reset()
    assert all(len(values) == 0 for values in evaluator.evaluate())
