from __future__ import annotations

import pytest
import torch
import torchvision

from iou_d2.ops import rivals
from iou_d2.ops.nms import iou_guided_nms
from iou_d2.ops.rivals import needs_rank


def random_case(generator, count, levels):
    """Boxes in clusters, of two classes; scores of so few `levels` that some are equal."""
    place = torch.randint(0, max(1, count // 3), (count,), generator=generator)
    corner = torch.rand(count, 2, generator=generator)[place] * 300
    boxes = torch.cat([corner, corner + 40], dim=1)
    boxes += torch.randn(boxes.shape, generator=generator) * 4
    scores = torch.randint(1, levels, (count,), generator=generator) / levels
    return boxes, scores, torch.randint(0, 2, (count,), generator=generator)


def best(boxes, scores, classes, ranks, limit):
    """The indices and scores that go on."""
    keep, scores = iou_guided_nms(boxes, scores, ranks, classes, 0.5)
    order = scores.sort(descending=True, stable=True).indices[: limit if limit >= 0 else None]
    return keep[order].tolist(), scores[order].tolist()


@pytest.mark.parametrize("levels", [10, 100_000])
@pytest.mark.parametrize("limit", [-1, 0, 1, 4, 15, 1000])
def test_other_ranks_change_nothing(limit, levels):
    generator = torch.Generator().manual_seed(limit + 1)
    skipped = 0
    for number in range(150):
        case = random_case(generator, number % 50, levels)
        needed = needs_rank(*case, 0.5, limit)
        ranks = torch.rand(len(needed), generator=generator)
        expected = best(*case, ranks, limit)
        for others in (torch.zeros_like(ranks), torch.rand(len(ranks), generator=generator)):
            assert best(*case, torch.where(needed, ranks, others), limit) == expected
        skipped += int((~needed).sum())
    assert skipped > (20 if levels == 10 else 100)


def test_who_matters():
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],  # two rivals
            [0.0, 0, 10, 9],
            [50.0, 0, 60, 10],  # alone
            [0.0, 50, 10, 60],  # two rivals with the lowest scores
            [0.0, 50, 10, 59],
            [90.0, 0, 99, 10],  # two that are alone, with one score
            [90.0, 50, 99, 60],
        ]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.2, 0.3, 0.5, 0.5])
    classes = torch.zeros(7, dtype=torch.int64)
    assert needs_rank(boxes, scores, classes, 0.5, -1).tolist() == [1, 1, 0, 1, 1, 1, 1]
    assert needs_rank(boxes, scores, classes, 0.5, 4).tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert needs_rank(boxes, scores, classes, 0.5, 3).tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert needs_rank(boxes, scores, classes, 0.5, 2).tolist() == [1, 1, 0, 0, 0, 0, 0]
    classes[1] = 1
    assert needs_rank(boxes, scores, classes, 0.5, 1).tolist() == [0] * 7


def test_a_chain_is_one_group():
    corner = torch.arange(60.0)[:, None] * torch.tensor([3.0, 0])
    boxes = torch.cat([corner, corner + 10], dim=1)  # an IoU of 7/13 with the next alone
    boxes, scores = boxes[torch.randperm(60)], torch.linspace(0.1, 0.9, 60)
    classes = torch.zeros(60, dtype=torch.int64)
    assert needs_rank(boxes, scores, classes, 0.5, 1).all()


@pytest.mark.parametrize("count", [960, 1020])
def test_rivals_are_found_where_torchvision_rounds_an_iou_over_the_threshold(count):
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count // 2, 2, generator=generator) * 1300
    side = 0.1 + 20 * torch.rand(count // 2, 1, generator=generator) ** 2
    first = torch.cat([corner, corner + side], dim=1)
    boxes = torch.cat([first, first + side * torch.tensor([1 / 3, 0, 1 / 3, 0])])  # an IoU of 1/2
    classes, scores = torch.arange(count) % (count // 2) % 80, torch.linspace(0.9, 0.1, count)
    kept = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)
    assert count // 2 < len(kept) < count
    needed = needs_rank(boxes, scores, classes, 0.5, -1)
    suppressed = torch.ones(count, dtype=torch.bool)
    suppressed[kept] = False
    assert needed[suppressed].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_strange_values_and_many_boxes_need_all_ranks(monkeypatch, bad):
    boxes, scores, classes = random_case(torch.Generator().manual_seed(0), 30, 100)
    assert not needs_rank(boxes, scores, classes, 0.5, 3).all()
    assert needs_rank(boxes, scores, classes, -0.1, 3).all()
    worse = scores.clone()
    worse[4] = bad
    assert needs_rank(boxes, worse, classes, 0.5, 3).all()
    worse = boxes.clone()
    worse[4, 1] = bad
    assert needs_rank(worse, scores, classes, 0.5, 3).all()
    monkeypatch.setattr(rivals, "_MOST_BOXES", 29)
    assert needs_rank(boxes, scores, classes, 0.5, 3).all()
    assert needs_rank(boxes[:0], scores[:0], classes[:0], 0.5, 3).shape == (0,)


def test_boxes_are_compared_some_at_a_time(monkeypatch):
    case = random_case(torch.Generator().manual_seed(1), 50, 1000)
    whole = needs_rank(*case, 0.5, 5)
    monkeypatch.setattr(rivals, "_ROWS", 7)
    assert torch.equal(needs_rank(*case, 0.5, 5), whole)
