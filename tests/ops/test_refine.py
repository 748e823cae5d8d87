from __future__ import annotations

import contextlib
import math

import pytest
import torch

from iou_d2.ops.refine import ascend_together, clip_boxes, leave_inference_mode, refine_boxes

LIMITS = (200.0, 100.0)


def limits_of(boxes):
    return torch.tensor([LIMITS]).expand(len(boxes), 2)


def hill(optima):
    """A smooth score with its only maximum, 1, at each box's optimum."""

    def score(boxes, index):
        best = optima[index]
        size = (best[:, 2:] - best[:, :2]).repeat(1, 2)
        return torch.exp(-((boxes - best) / size).square().sum(dim=1))

    return score


def refine_together(boxes, score, limits, **settings):
    """`refine_boxes` as it works on a GPU."""

    def evaluate(moved, with_gradient):
        moved = moved.detach().requires_grad_()
        scores = score(moved, torch.arange(len(moved)))
        return scores.detach(), torch.autograd.grad(scores.sum(), moved)[0]

    defaults = {"steps": 5, "step_size": 0.5, "early_stop": 0.001, "max_drop": -0.01}
    settings = {**defaults, "roll_back": False, **settings}
    return ascend_together(evaluate, clip_boxes(boxes, limits), limits, **settings)


both_ways = pytest.mark.parametrize("refine", [refine_boxes, refine_together])


def planted(count=50):
    generator = torch.Generator().manual_seed(0)
    corner = 15 + torch.rand(count, 2, generator=generator) * 30
    optima = torch.cat(
        [corner, corner + 20 + torch.rand(count, 2, generator=generator) * 20], dim=1
    )
    return optima, optima + torch.randn(count, 4, generator=generator) * 3


def test_a_planted_score_is_climbed_monotonically_to_its_optimum():
    optima, boxes = planted()
    before = hill(optima)(boxes, torch.arange(50))
    for steps in (1, 2, 4, 8, 16, 32, 64):
        moved, scores = refine_boxes(
            boxes, hill(optima), limits_of(boxes), steps=steps, early_stop=0.0, step_size=8.0
        )
        torch.testing.assert_close(scores, hill(optima)(moved, torch.arange(50)))
        assert (scores >= before).all()
        before = scores
    torch.testing.assert_close(moved, optima, atol=0.01, rtol=0)


def algorithm_2(boxes, optima, steps, step_size, early_stop, max_drop, roll_back=False):
    """Algorithm 2 for `hill`, box by box in floats, with the gradient written out."""

    def score(b, o):
        w, h = o[2] - o[0], o[3] - o[1]
        return math.exp(-sum(((b[k] - o[k]) / (w, h)[k % 2]) ** 2 for k in range(4)))

    moved, scores = [], []
    for b, o in zip(boxes.tolist(), optima.tolist()):
        previous = score(b, o)
        for _ in range(steps):
            sizes = o[2] - o[0], o[3] - o[1]
            own = b[2] - b[0], b[3] - b[1]
            slope = [-2 * (b[k] - o[k]) / sizes[k % 2] ** 2 * previous for k in range(4)]
            new_box = [b[k] + step_size * slope[k] * own[k % 2] for k in range(4)]
            new = score(new_box, o)
            if roll_back and new < previous:
                break
            stop = abs(new - previous) < early_stop or new - previous < max_drop
            b, previous = new_box, new
            if stop:
                break
        moved.append(b)
        scores.append(previous)
    return torch.tensor(moved), torch.tensor(scores)


@both_ways
@pytest.mark.parametrize("roll_back", [False, True])
@pytest.mark.parametrize("step_size", [0.5, 5.0, 25.0])
def test_it_equals_algorithm_2_box_by_box(refine, step_size, roll_back):
    optima, boxes = planted(200)
    settings = {"steps": 5, "step_size": step_size, "early_stop": 0.01, "max_drop": -0.05}
    moved, scores = refine(
        boxes, hill(optima), torch.full((200, 2), 1e6), roll_back=roll_back, **settings
    )
    expected, expected_scores = algorithm_2(boxes, optima, roll_back=roll_back, **settings)
    inside = (expected[:, 2:] > expected[:, :2]).all(1) & (expected >= 0).all(1)
    assert inside.sum() > 100
    torch.testing.assert_close(moved[inside], expected[inside], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(scores[inside], expected_scores[inside], atol=1e-3, rtol=1e-3)
    if roll_back:
        assert (scores >= hill(optima)(boxes, torch.arange(200)) - 1e-6).all()


def test_only_boxes_that_still_move_are_evaluated():
    optima = torch.tensor([[10.0, 10, 50, 50], [10.0, 10, 50, 50]])
    boxes = torch.tensor([[10.0, 10, 50, 50], [16.0, 4, 44, 60]])
    seen = []

    def score(moved, index):
        seen.append(index.tolist())
        return hill(optima)(moved, index)

    moved, _ = refine_boxes(boxes, score, limits_of(boxes), steps=3, step_size=1.0)
    assert seen == [[0, 1], [0, 1], [1], [1]]
    assert torch.equal(moved[0], boxes[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_it_works_for_callers_without_gradients_and_leaves_none(mode):
    optima, boxes = planted()
    layer = torch.nn.Linear(4, 1)
    with mode():
        feature = optima * 1.0  # an inference tensor where the mode makes one

        usable = leave_inference_mode(feature)

        def score(moved, index):
            return hill(usable)(moved, index) + layer(moved).squeeze(1) * 1e-4

        moved, scores = refine_boxes(boxes * 1.0, score, limits_of(boxes))
        moved.clamp_(max=100)  # usable by the caller
    assert not torch.equal(moved, boxes) and not scores.requires_grad and not moved.requires_grad
    assert all(p.grad is None and p.requires_grad for p in layer.parameters())
    assert not usable.requires_grad


@both_ways
@pytest.mark.parametrize("step_size", [0.5, 100.0, 1e30])
def test_boxes_stay_finite_upright_and_inside(refine, step_size):
    optima, boxes = planted()
    boxes = torch.cat(
        [
            boxes,
            torch.tensor(
                [
                    [5.0, 5, 5, 5],  # no area
                    [60.0, 60, 20, 20],  # inverted
                    [-50.0, -50, 500, 500],  # over the image
                    [300.0, 300, 400, 400],  # outside
                    [0.0, 0, 1e-20, 1e-20],
                ]
            ),
        ]
    )
    optima = torch.cat([optima, optima[:5]])
    for roll_back in (False, True):
        moved, scores = refine(
            boxes, hill(optima), limits_of(boxes), step_size=step_size, roll_back=roll_back
        )
        assert moved.isfinite().all() and scores.isfinite().all()
        assert (moved >= 0).all() and (moved <= torch.tensor([*LIMITS, *LIMITS])).all()
        assert (moved[:, 2:] >= moved[:, :2]).all()
        assert (moved[:50, 2:] > moved[:50, :2]).all()


@both_ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_the_box_where_it_was(refine, bad):
    optima = torch.tensor([[10.0, 10, 50, 50], [10.0, 10, 50, 50]])
    boxes = torch.tensor([[14.0, 14, 54, 54], [14.0, 14, 54, 54]])

    def score(moved, index):
        spoilt = (index == 0) & (moved[:, 0] != 14)
        return hill(optima)(moved, index) * torch.where(spoilt, bad, 1.0)

    moved, scores = refine(boxes, score, limits_of(boxes))
    assert torch.equal(moved[0], boxes[0]) and scores.isfinite().all()
    assert scores[1] > scores[0]


@both_ways
def test_a_gradient_that_is_not_finite_stops_the_box_where_it_was(refine):
    boxes = torch.tensor([[14.0, 14, 54, 54]])
    moved, scores = refine(
        boxes, lambda x, _: (x[:, 2] - x[:, 2].detach()).clamp(min=0).sqrt(), limits_of(boxes)
    )
    assert torch.equal(moved, boxes) and scores.tolist() == [0]


def test_no_steps_and_no_boxes():
    optima, boxes = planted()
    moved, scores = refine_boxes(boxes, hill(optima), limits_of(boxes), steps=0)
    assert torch.equal(moved, boxes)
    torch.testing.assert_close(scores, hill(optima)(boxes, torch.arange(50)))
    moved, scores = refine_boxes(boxes[:0], hill(optima), limits_of(boxes[:0]))
    assert moved.shape == (0, 4) and scores.shape == (0,)


def test_wrong_arguments_are_named():
    optima, boxes = planted()
    with pytest.raises(ValueError, match=r"limits \(R, 2\), not \(50, 4\) and \(49, 2\)"):
        refine_boxes(boxes, hill(optima), limits_of(boxes)[1:])
    with pytest.raises(ValueError, match="at least 0, but it is -1"):
        refine_boxes(boxes, hill(optima), limits_of(boxes), steps=-1)


@pytest.mark.parametrize("roll_back", [False, True])
def test_an_observer_sees_what_so_many_steps_would_give(roll_back):
    optima, boxes = planted()
    seen = []

    def observe(*at_step):
        seen.append(at_step)

    options = {"step_size": 20.0, "early_stop": 0.01, "roll_back": roll_back}
    score, limits = hill(optima), limits_of(boxes)
    observed = refine_boxes(boxes, score, limits, steps=6, observe=observe, **options)
    assert 2 < len(seen) <= 7  # until all boxes rest
    for steps in range(7):
        moved, scores = seen[min(steps, len(seen) - 1)]
        expected = refine_boxes(boxes, score, limits, steps=steps, **options)
        assert torch.equal(moved, expected[0]) and torch.equal(scores, expected[1])
    assert torch.equal(observed[0], seen[-1][0]) and not torch.equal(seen[0][0], seen[1][0])
    refine_boxes(boxes[:0], score, limits[:0], observe=lambda *_: pytest.fail("there is nothing"))
