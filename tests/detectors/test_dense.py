from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from iou_d2.detectors.dense import DenseDetector, DenseNMS, reduce_mean, select_candidates


def test_select_candidates_equals_sorted_list():
    scores = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    flat = [(scores[r, k].item(), r, k) for r in range(200) for k in range(4)]
    expected = sorted((entry for entry in flat if entry[0] > 0.3), reverse=True)[:50]
    found = select_candidates(scores, 0.3, 50)
    assert (
        list(zip(found.scores.tolist(), found.anchors.tolist(), found.classes.tolist())) == expected
    )


def test_select_candidates_with_nothing_above_threshold():
    for scores in (torch.zeros(5, 3), torch.zeros(0, 3), torch.full((5, 3), float("nan"))):
        found = select_candidates(scores, 0.05, 10)
        assert [len(part) for part in found] == [0, 0, 0]


def test_nms_suppresses_within_a_class_and_across_levels():
    def level(boxes, scores, classes):
        return Instances(
            (50, 50),
            pred_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)),
            scores=torch.tensor(scores),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
        )

    first = level([[0, 0, 10, 10], [0, 0, 10, 10]], [0.6, 0.5], [0, 1])
    second = level([[0, 0, 10, 11], [30, 30, 40, 40]], [0.9, 0.1], [0, 0])
    empty = level([], [], [])
    nms = DenseNMS(score_threshold=0.05, topk=100, nms_threshold=0.5, max_detections=2)
    found = nms([first, second, empty])
    assert torch.allclose(found.scores, torch.tensor([0.9, 0.5]))
    assert found.pred_classes.tolist() == [0, 1]
    assert len(nms([empty, empty])) == 0
    agnostic = replace(nms, max_detections=-1, class_agnostic=True)([first, second, empty])
    assert torch.allclose(agnostic.scores, torch.tensor([0.9, 0.1]))


def test_reduce_mean_of_one_process_is_the_value_without_gradient():
    value = torch.tensor(3.0, requires_grad=True)
    mean = reduce_mean(value)
    assert mean.item() == 3.0 and not mean.requires_grad


def test_one_box_that_is_not_finite_does_not_switch_nms_off():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [0, 0, float("nan"), 5]])
    candidates = Instances(
        (50, 50),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([0.9, 0.8, 0.95]),
        pred_classes=torch.zeros(3, dtype=torch.int64),
    )
    nms = DenseNMS(score_threshold=0.05, topk=100, nms_threshold=0.5, max_detections=9)
    assert nms([candidates]).pred_boxes.tensor.tolist() == [[0, 0, 10, 10]]


class Blank(DenseDetector):
    def predict(self, images):
        return images

    def losses(self, predictions, image_sizes, gt_instances):
        return {}

    def image_candidates(self, predictions, image_sizes):
        return []

    def suppress(self, candidates):
        return candidates[0]


def test_a_detector_that_lacks_a_part_of_the_seam_cannot_be_made():
    class Silent(DenseDetector):
        def predict(self, images):
            return images

    with pytest.raises(TypeError, match="abstract.*image_candidates"):
        Silent(backbone=nn.Identity(), pixel_mean=[0.0], pixel_std=[1.0])


def test_images_are_normalised_and_padded_behind_their_pixels():
    inputs = [{"image": torch.full((3, *size), 7, dtype=torch.uint8)} for size in ((5, 9), (8, 3))]
    backbone = nn.Identity()
    backbone.size_divisibility = 16
    model = Blank(backbone=backbone, pixel_mean=[1.0, 2, 3], pixel_std=[1.0, 2, 4])
    images = model.preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 16, 16) and images.image_sizes == [(5, 9), (8, 3)]
    expected = torch.zeros(2, 3, 16, 16)
    for index, (height, width) in enumerate(images.image_sizes):
        expected[index, :, :height, :width] = torch.tensor([6.0, 2.5, 1.0]).view(3, 1, 1)
    assert torch.equal(images.tensor, expected)
