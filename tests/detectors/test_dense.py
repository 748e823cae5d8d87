from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances

from iou_d2.detectors.dense import (
    detections_of_image,
    normalized_images,
    reduce_mean,
    select_candidates,
)


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


def test_detections_of_image_suppresses_within_a_class_and_across_levels():
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
    found = detections_of_image([first, second, empty], 0.5, 2)
    assert torch.allclose(found.scores, torch.tensor([0.9, 0.5]))
    assert found.pred_classes.tolist() == [0, 1]
    assert len(detections_of_image([empty, empty], 0.5, 2)) == 0
    agnostic = detections_of_image([first, second, empty], 0.5, 9, class_agnostic=True)
    assert torch.allclose(agnostic.scores, torch.tensor([0.9, 0.1]))


def test_reduce_mean_of_one_process_is_the_value_without_gradient():
    value = torch.tensor(3.0, requires_grad=True)
    mean = reduce_mean(value)
    assert mean.item() == 3.0 and not mean.requires_grad


def test_normalized_images_are_padded_behind_their_pixels():
    mean, std = torch.tensor([1.0, 2, 3]).view(3, 1, 1), torch.tensor([1.0, 2, 4]).view(3, 1, 1)
    inputs = [{"image": torch.full((3, *size), 7, dtype=torch.uint8)} for size in ((5, 9), (8, 3))]
    images = normalized_images(inputs, mean, std, 16)
    assert images.tensor.shape == (2, 3, 16, 16) and images.image_sizes == [(5, 9), (8, 3)]
    expected = torch.zeros(2, 3, 16, 16)
    for index, (height, width) in enumerate(images.image_sizes):
        expected[index, :, :height, :width] = torch.tensor([6.0, 2.5, 1.0]).view(3, 1, 1)
    assert torch.equal(images.tensor, expected)
