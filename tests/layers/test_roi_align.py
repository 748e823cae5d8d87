"""The compiled RoIAlign against torchvision's."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ROIAlign
from torch import nn
from torchvision import ops

from iou_d2.layers import HAS_EXTENSION
from iou_d2.layers.roi_align import is_compiled_for, roi_align, use_compiled_roi_align

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="without the compiled operators")
SCALE = 0.25


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def boxes(least: float, most: float, count: int = 40) -> torch.Tensor:
    """In two images of 152 x 100 pixels, and beside them."""
    generator = torch.Generator().manual_seed(1)
    sides = least + (most - least) * torch.rand(count, 2, generator=generator)
    centers = torch.rand(count, 2, generator=generator) * torch.tensor([190.0, 130.0]) - 15
    image = torch.randint(2, (count, 1), generator=generator)
    return torch.cat([image, centers - sides / 2, centers + sides / 2], dim=1)


# Inverted and empty ones, a part of a pixel, some pixels a bin, larger than the image.
SIDES = {"inverted": (-8, 4), "small": (0.1, 3), "medium": (10, 60), "large": (100, 400)}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(sides, aligned, ratio, dtype):
    rois = boxes(*SIDES[sides]).to(dtype)
    features, plain = (maps(2, 48, 25, 38, dtype=dtype).requires_grad_() for _ in range(2))
    y = roi_align(features, rois, (7, 5), SCALE, ratio, aligned)
    wanted = ops.roi_align(plain, rois, (7, 5), SCALE, ratio, aligned)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y, wanted, rtol=0, atol=tolerance)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    y.backward(grad)
    wanted.backward(grad)
    scale = plain.grad.abs().max().item() + 1e-30
    torch.testing.assert_close(features.grad, plain.grad, rtol=0, atol=tolerance * scale)
    assert features.grad.is_contiguous(memory_format=torch.channels_last)


def test_samples_on_the_rims_of_map_and_pixels():
    """There what a sample sees, and the number of samples, changes at once."""
    features = maps(1, 16, 9, 11)
    ends = [-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 28.0, 30.0, 32.0, 34.0, 36.0, 38.0, 40.0, 42.0, 44.0]
    rois = torch.tensor(
        [[0, x, y, x + w, y + 14] for x in ends for y in ends for w in (14.0, 28.0, 56.0)]
    )
    for aligned in (True, False):
        for ratio in (0, 1, 2):
            found = roi_align(features, rois, (7, 7), SCALE, ratio, aligned)
            wanted = ops.roi_align(features, rois, (7, 7), SCALE, ratio, aligned)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_threads_change_no_bit():
    rois, results = boxes(5, 80), []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        features = maps(2, 64, 25, 38).requires_grad_()
        y = roi_align(features, rois, (7, 7), SCALE, 0, True)
        y.square().sum().backward()
        torch.set_num_threads(before)
        results.append((y, features.grad))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_nothing_to_pool():
    features = maps(2, 16, 9, 11).requires_grad_()
    y = roi_align(features, torch.zeros(0, 5), (7, 7), SCALE, 0, True)
    assert y.shape == (0, 16, 7, 7)
    y.sum().backward()
    assert features.grad.abs().max() == 0


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_rois_that_are_none_leave_the_others(number, ratio, aligned):
    features, rois = maps(2, 16, 9, 11), boxes(5, 30, count=4)
    wanted = roi_align(features, rois, (3, 3), SCALE, ratio, aligned)
    bad = rois.clone()
    bad[1, 1], bad[1, 3] = -number, number
    found = roi_align(features.requires_grad_(), bad, (3, 3), SCALE, ratio, aligned)
    assert torch.equal(found[[0, 2, 3]], wanted[[0, 2, 3]])
    assert found[1].isfinite().all()
    found.sum().backward()
    assert features.grad.isfinite().all()


def test_numbers_that_are_not_finite_are_seen_by_the_bins_that_sample_them():
    features, rois = maps(2, 16, 25, 38), boxes(5, 60)
    features[0, 3, 7, 9] = math.nan
    features[1, 3, 11, 20] = math.inf
    found = roi_align(features, rois, (3, 3), SCALE, 2, True).isfinite()
    wanted = ops.roi_align(features, rois, (3, 3), SCALE, 2, True).isfinite()
    assert not wanted.all()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda f, r: (f.contiguous(), r), ValueError, "must be .* in channels-last"),
        (lambda f, r: (f[0], r), ValueError, "must be .* in channels-last, got shape .16, 9, 11"),
        (lambda f, r: (maps(1, 24, 9, 11), r), ValueError, "multiple of 16, got 24"),
        (lambda f, r: (maps(2, 16, 0, 11), r), ValueError, "the feature map is empty"),
        (lambda f, r: (f, r[:, :4]), ValueError, r"of shape \(R, 5\), got \[4, 4\]"),
        (lambda f, r: (f, r.double()), TypeError, "rois are Double and features Float"),
        (lambda f, r: (f, r + 2), IndexError, r"rois\[0, 0\] = [23] is no index into a batch of 2"),
        (lambda f, r: (f, r * math.nan), IndexError, "= nan is no index into a batch of 2"),
    ],
)
def test_bad_inputs_are_refused(change, kind, text):
    with pytest.raises(kind, match=text):
        roi_align(*change(maps(2, 16, 9, 11), boxes(5, 30, count=4)), (3, 3), SCALE, 2, True)


def test_bad_sizes_are_refused():
    features, rois = maps(2, 16, 9, 11), boxes(5, 30, count=4)
    with pytest.raises(ValueError, match="output size must be positive, got 0 x 3"):
        roi_align(features, rois, (0, 3), SCALE, 2, True)
    for size in ([2, 16, 9], [2, 32, 9, 11]):
        with pytest.raises(ValueError, match="does not fit features of"):
            torch.ops.iou_d2.roi_align_backward(
                torch.zeros(4, 16, 3, 3), rois, size, SCALE, 2, True
            )


def test_modules_of_detectron2_take_it_where_they_can():
    model = nn.Sequential(ROIAlign(7, SCALE, 0), ROIAlign((3, 2), SCALE, 2, aligned=False))
    plain = [ROIAlign(7, SCALE, 0), ROIAlign((3, 2), SCALE, 2, aligned=False)]
    use_compiled_roi_align(model)
    rois = boxes(5, 60)
    for features in (
        maps(2, 32, 25, 38),
        maps(2, 32, 25, 38).contiguous(),
        maps(2, 3, 25, 38),
        maps(2, 32, 25, 38, dtype=torch.float64),
    ):
        is_last = features.is_contiguous(memory_format=torch.channels_last)
        assert is_compiled_for(features, rois) == (is_last and features.shape[1] == 32)
        for module, other in zip(model, plain):
            wanted = other(features, rois)
            torch.testing.assert_close(module(features, rois), wanted, rtol=0, atol=1e-5)
    traced = torch.jit.trace(model[0], (maps(2, 32, 25, 38), rois))
    assert "iou_d2" not in str(traced.inlined_graph)
