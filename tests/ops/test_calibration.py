from __future__ import annotations

import numpy as np
import pytest
import torch

from iou_d2.ops.calibration import PiecewiseLinear


def test_between_knots_it_is_numpys_interpolation():
    predicted, true = (0.2, 0.5, 0.6, 0.9), (0.1, 0.1, 0.4, 0.8)
    iou = torch.linspace(0.2, 0.9, 71, dtype=torch.float64)
    found = PiecewiseLinear(predicted, true)(iou.view(71, 1))
    assert found.shape == (71, 1)
    assert np.allclose(found[:, 0].numpy(), np.interp(iou.numpy(), predicted, true), atol=1e-12)


def test_beyond_the_knots_the_nearest_line_goes_on_within_0_and_1():
    worth = PiecewiseLinear((0.4, 0.6, 0.8), (0.1, 0.3, 0.9))
    found = worth(torch.tensor([0.0, 0.35, 0.81, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0, 0.05, 0.93, 1], abs=1e-9)


def test_the_diagonal_changes_nothing_and_a_single_knot_is_a_constant():
    iou = torch.rand(100)
    assert torch.equal(PiecewiseLinear((0, 1), (0, 1))(iou), iou)
    assert torch.equal(PiecewiseLinear((0.5,), (0.25,))(iou), torch.full((100,), 0.25))
    assert PiecewiseLinear((0.5,), (0.25,))(torch.zeros(0, 1)).shape == (0, 1)


def test_it_has_a_gradient_and_keeps_nan():
    iou = torch.tensor([0.25, 0.75], requires_grad=True)
    PiecewiseLinear((0, 0.5, 1), (0, 0.2, 1))(iou).sum().backward()
    assert iou.grad.tolist() == pytest.approx([0.4, 1.6])
    assert PiecewiseLinear((0, 1), (0, 1))(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize(
    ("predicted", "true", "sentence"),
    [
        ((), (), "at least one"),
        ((0.1, 0.2), (0.1,), "2 predicted and 1 true"),
        ((0.1, 0.1), (0.1, 0.2), "rise"),
        ((0.1, 0.2), (0.2, 0.1), "rise"),
        ((0.1, 1.2), (0.1, 0.2), "both in"),
        ((0.1, float("nan")), (0.1, 0.2), "both in"),
    ],
)
def test_what_are_no_knots_is_said(predicted, true, sentence):
    with pytest.raises(ValueError, match=sentence):
        PiecewiseLinear(predicted, true)
