from __future__ import annotations

import pytest
import torch

from iou_d2.ops.box_voting import vote_boxes
from views_by_hand import vote_by_loops

NAN, INF = float("nan"), float("inf")


def crowd(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 25], 1)
    classes = torch.randint(3, (count,), generator=generator)
    return boxes, torch.rand(count, generator=generator), classes


@pytest.mark.parametrize("soft", [None, 0.01, 0.3])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.45, 0.9])
def test_voting_is_that_of_loops(threshold, soft):
    for seed in range(3):
        boxes, scores, classes = crowd(60, seed)
        index, voted, new_scores = vote_boxes(boxes, scores, classes, threshold, soft)
        expected = vote_by_loops(boxes, scores, classes, threshold, soft)
        assert classes[index].tolist() == [x[2] for x in expected]
        wanted = torch.tensor([x[0] for x in expected])
        torch.testing.assert_close(voted, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(new_scores, torch.tensor([x[1] for x in expected]))


def test_two_boxes_meet_where_their_scores_say():
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]])
    scores, classes = torch.tensor([0.9, 0.3, 0.5]), torch.tensor([1, 1, 1])
    index, voted, new_scores = vote_boxes(boxes, scores, classes, 0.45)
    torch.testing.assert_close(voted, torch.tensor([[0.5, 0, 10.5, 10], [50, 50, 60, 60]]))
    assert index.tolist() == [0, 2] and new_scores.tolist() == scores[[0, 2]].tolist()


def test_a_box_that_nobody_votes_for_stays_to_the_last_bit():
    boxes, scores, classes = crowd(40, 5)
    index, voted, new_scores = vote_boxes(boxes, scores, torch.arange(40), 0.1, 0.0)
    assert torch.equal(voted, boxes[index]) and torch.equal(new_scores, scores[index])
    assert sorted(index.tolist()) == list(range(40))


def test_what_is_no_box_or_has_no_score_is_left_out():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, NAN, 10], [0, 0, 10, INF], [1, 1, 9, 9]])
    scores, classes = torch.tensor([0.5, 0.9, 0.8, NAN]), torch.zeros(4, dtype=torch.int64)
    index, voted, _ = vote_boxes(boxes, scores, classes, 0.45)
    assert index.tolist() == [0] and torch.equal(voted, boxes[:1])


def test_no_boxes_and_boxes_without_area_or_score():
    none = vote_boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.45)
    assert [tuple(x.shape) for x in none] == [(0,), (0, 4), (0,)]
    flat = torch.tensor([[3.0, 3, 3, 8], [0, 0, 8, 8], [0, 0, 8, 8]])
    index, voted, _ = vote_boxes(flat, torch.zeros(3), torch.zeros(3, dtype=torch.int64), 0.45)
    assert sorted(index.tolist()) == [0, 1]
    assert voted.tolist() == flat[index].tolist()
