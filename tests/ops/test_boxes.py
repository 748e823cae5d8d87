from __future__ import annotations

import numpy as np
import pytest
import torch

from iou_d2.ops.boxes import aligned_iou


def iou_of_two(a, b):
    """One pair in Python floats."""
    inner_width = min(a[2], b[2]) - max(a[0], b[0])
    inner_height = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(inner_width, 0.0) * max(inner_height, 0.0)
    sizes = [max(x[2] - x[0], 0.0) * max(x[3] - x[1], 0.0) for x in (a, b)]
    union = sum(sizes) - inner
    return inner / union if union > 0 else 0.0


def random_boxes(generator, count):
    corner = generator.uniform(-50, 50, (count, 2))
    return np.concatenate([corner, corner + generator.uniform(-5, 60, (count, 2))], axis=1)


def test_aligned_iou_equals_loop():
    generator = np.random.default_rng(0)
    first, second = random_boxes(generator, 2000), random_boxes(generator, 2000)
    expected = [iou_of_two(a, b) for a, b in zip(first.tolist(), second.tolist())]
    found = aligned_iou(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-15)
    assert 100 < (found > 0).sum() < 2000


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 10, 10], [0, 0, 10, 10], 1.0),
        ([0, 0, 10, 10], [10, 0, 20, 10], 0.0),
        ([0, 0, 10, 10], [2, 2, 7, 7], 0.25),
        ([5, 5, 5, 5], [5, 5, 5, 5], 0.0),
        ([10, 10, 0, 0], [0, 0, 10, 10], 0.0),
    ],
)
def test_aligned_iou_by_hand(first, second, expected):
    first, second = torch.tensor([first]).float(), torch.tensor([second]).float()
    assert aligned_iou(first, second).item() == expected


def test_aligned_iou_gradient_is_finite_and_right():
    first = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5]], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[2.0, 1, 9, 12], [5, 5, 5, 5]], dtype=torch.float64)
    aligned_iou(first, second).sum().backward()
    assert torch.isfinite(first.grad).all()
    torch.autograd.gradcheck(
        lambda x: aligned_iou(x, second[:1]), first.detach()[:1].requires_grad_()
    )


def test_aligned_iou_of_equal_lines_has_a_finite_gradient():
    lines = torch.tensor([[5.0, 0, 5, 10], [0, 3, 8, 3], [2, 2, 2, 2]], requires_grad=True)
    iou = aligned_iou(lines, lines.detach())
    iou.sum().backward()
    assert iou.tolist() == [0, 0, 0]
    assert lines.grad.isfinite().all()


@pytest.mark.parametrize(
    ("box", "side", "step"),
    [
        ([5.0, 0, 5, 10], 0, -1e-6),  # without width, x1 to the left
        ([5.0, 0, 5, 10], 2, 1e-6),
        ([10.0, 2, 14, 8], 0, -1e-6),  # touches the other, x1 into it
        ([-3.0, 2, 0, 8], 2, 1e-6),
        ([3.0, 10, 6, 12], 1, -1e-6),
    ],
)
def test_aligned_iou_of_no_width_has_the_gradient_of_an_overlap(box, side, step):
    other = [0.0, 0, 10, 10]
    first = torch.tensor([box], dtype=torch.float64, requires_grad=True)
    aligned_iou(first, first.new_tensor([other])).sum().backward()
    moved = list(box)
    moved[side] += step
    slope = (iou_of_two(moved, other) - iou_of_two(box, other)) / step
    assert first.grad[0, side].item() == pytest.approx(slope, rel=1e-5) and abs(slope) > 1e-3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_aligned_iou_takes_whole_numbers(dtype):
    boxes = torch.tensor([[0, 0, 10, 10], [3, 3, 3, 3]], dtype=dtype)
    others = torch.tensor([[2, 2, 7, 7], [9, 9, 8, 8]], dtype=dtype)
    iou = aligned_iou(boxes, others)
    assert iou.tolist() == [0.25, 0] and iou.dtype == torch.float32
    assert torch.equal(aligned_iou(boxes.float(), others), iou)


def test_aligned_iou_takes_half_precision_at_image_scale():
    boxes = torch.tensor([[0.0, 0, 1000, 1000]], dtype=torch.float16)
    assert aligned_iou(boxes, boxes).item() == 1.0


def test_aligned_iou_of_nothing():
    assert aligned_iou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("shapes", [((2, 4), (3, 4)), ((2, 5), (2, 5)), ((4,), (1, 4))])
def test_aligned_iou_names_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="one shape"):
        aligned_iou(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
