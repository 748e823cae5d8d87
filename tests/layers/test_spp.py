"""RoI max pooling, spatial pyramids and YOLOv3's block, against adaptive_max_pool2d and loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from iou_d2.layers import PrRoIPool
from iou_d2.layers.spp import RoIMaxPool, SpatialPyramidPool, SPPBlock

NAN, INF = math.nan, math.inf


def random_map(images=2, channels=3, height=20, width=26, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, height, width, generator=generator) - 8


def random_rois(count, width, height, images=2):
    """Inside a map of that size, in its pixels; none ends halfway between two of them."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, count, 2, generator=generator) * torch.tensor([width - 1.0, height - 1.0])
    image = torch.arange(count) % images
    return torch.cat([image[:, None].float(), torch.minimum(a, b), torch.maximum(a, b)], dim=1)


def window_of(features, roi, scale):
    """What a RoI covers: whole pixels, both ends included."""
    x1, y1, x2, y2 = (math.floor(x * scale + 0.5) for x in roi[1:].tolist())
    return features[int(roi[0]), :, y1 : y2 + 1, x1 : x2 + 1]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 6, 7])
def test_bins_are_those_of_adaptive_max_pooling(side, scale):
    features, rois = random_map(), random_rois(60, 26, 20)
    rois[:, 1:] /= scale
    found = RoIMaxPool(side, scale)(features, rois)
    expected = [F.adaptive_max_pool2d(window_of(features, roi, scale), side) for roi in rois]
    assert torch.equal(found, torch.stack(expected))
    assert (found < 0).all()  # a maximum does not begin at 0


@pytest.mark.parametrize("levels", [(4, 2, 1), (6, 3, 2, 1), (7,)])
def test_a_spatial_pyramid_is_its_levels_one_after_another(levels):
    features, rois = random_map(), random_rois(40, 26, 20)
    pool = SpatialPyramidPool(levels, lambda side: RoIMaxPool(side, 1.0))
    found = pool(features, rois)
    assert found.shape == (40, 3, sum(x * x for x in levels), 1)
    for roi, of_roi in zip(rois, found[..., 0]):
        window = window_of(features, roi, 1.0)
        expected = [F.adaptive_max_pool2d(window, side).flatten(1) for side in levels]
        assert torch.equal(of_roi, torch.cat(expected, dim=1))
    assert torch.equal(found[:, :, -1], found.amax(dim=2)) or levels[-1] > 1


def test_a_spatial_pyramid_of_means_averages_bins_of_one_size():
    features, rois = random_map(), random_rois(10, 26, 20)
    found = SpatialPyramidPool((2, 1), lambda side: PrRoIPool(side, 1.0))(features, rois)
    assert found.shape == (10, 3, 5, 1)
    torch.testing.assert_close(found[:, :, :4].mean(dim=2), found[:, :, 4])


def by_loops(features, roi, side, scale):
    """(C, P, P) by integers, with bins that leave the map."""
    x1, y1, x2, y2 = (math.floor(x * scale + 0.5) for x in roi[1:])
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    _, channels, rows, columns = features.shape
    out = torch.zeros(channels, side, side)
    for i in range(side):
        for j in range(side):
            ys = range(y1 + i * height // side, y1 - (-(i + 1) * height // side))
            xs = range(x1 + j * width // side, x1 - (-(j + 1) * width // side))
            inside = [(y, x) for y in ys for x in xs if 0 <= y < rows and 0 <= x < columns]
            for c in range(channels if inside else 0):
                out[c, i, j] = max(features[int(roi[0]), c, y, x] for y, x in inside)
    return out


OUTSIDE = [-7.2, -3.1, 9.4, 8.8]
FAR = [200.0, 200, 210, 210]
EMPTY = [5.2, 6.1, 5.2, 6.1]
INVERTED = [12.0, 9, 4, 3]
FULL = [0.0, 0, 25, 19]


@pytest.mark.parametrize("box", [OUTSIDE, FAR, EMPTY, INVERTED, FULL], ids=str)
@pytest.mark.parametrize("side", [1, 3, 4])
def test_odd_boxes_equal_loops(box, side):
    features = random_map(images=1)
    found = RoIMaxPool(side, 1.0)(features, torch.tensor([[0, *box]]))
    assert torch.equal(found[0], by_loops(features, [0, *box], side, 1.0))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [1, 2, 3, 4])
def test_a_box_that_is_not_finite_gives_0(value, column):
    rois = torch.tensor([[1.0, 2, 2, 9, 9], [1.0, 2, 2, 9, 9]])
    rois[0, column] = value
    found = RoIMaxPool(3, 0.5)(random_map(), rois)
    assert (found[0] == 0).all() and (found[1] < 0).all()


def test_a_huge_box_holds_the_map_in_its_middle_bin():
    features = random_map(images=1)
    found = RoIMaxPool(3, 1.0)(features, torch.tensor([[0, -1e20, -1e20, 1e20, 1e20]]))
    assert torch.equal(found[0, :, 1, 1], features.amax(dim=(0, 2, 3)))
    assert (found.flatten(2)[0, :, [0, 1, 2, 3, 5, 6, 7, 8]] == 0).all()


def test_no_rois_keep_the_gradient():
    features = random_map().requires_grad_()
    pool = SpatialPyramidPool((4, 2, 1), lambda side: RoIMaxPool(side, 1.0))
    found = pool(features, torch.zeros(0, 5))
    assert found.shape == (0, 3, 21, 1)
    found.sum().backward()
    assert (features.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_any_dtype_gives_the_maxima_of_that_dtype(dtype, autocast):
    features, rois = random_map().to(dtype), random_rois(20, 26, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = RoIMaxPool(2, 1.0)(features, rois)
    assert found.dtype == dtype
    assert torch.equal(found.double(), RoIMaxPool(2, 1.0)(features.double(), rois.double()))


def test_the_gradient_goes_to_the_largest_pixel_and_to_no_box():
    features, rois = random_map(images=1).requires_grad_(), torch.tensor([[0.0, 3, 4, 12, 10]])
    RoIMaxPool(1, 1.0)(features, rois.requires_grad_()).sum().backward()
    assert rois.grad is None or (rois.grad == 0).all()
    window = features.detach()[0, :, 4:11, 3:13]
    for gradient, of_channel in zip(features.grad[0], window):
        assert gradient.sum() == 1 and gradient.max() == 1
        y, x = divmod(int(of_channel.argmax()), 10)
        assert gradient[4 + y, 3 + x] == 1


def test_the_edges_are_exact_up_to_six_bins_and_what_seven_do_is_documented():
    features = torch.arange(130.0).view(1, 1, 1, 130)
    sides = range(1, 130)
    rois = torch.tensor([[0.0, 0, 0, side - 1, 0] for side in sides])
    wrong = set()
    for bins in range(1, 8):
        found = RoIMaxPool((1, bins), 1.0)(features, rois)[:, 0, 0]
        for side, of_side in zip(sides, found.tolist()):
            last = [-(-(k + 1) * side // bins) - 1 for k in range(bins)]
            if of_side != last:
                wrong.add((bins, side))
                assert of_side[:-1] == last[:-1] and of_side[-1] == last[-1] + 1
    assert wrong == {(7, 57), (7, 114), (7, 121)}


def test_the_block_equals_loops():
    torch.manual_seed(0)
    block = SPPBlock(4, kernels=(3, 5)).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    reduced = torch.einsum("oc,nchw->nohw", block.reduce.weight[:, :, 0, 0], x)
    reduced = (reduced + block.reduce.bias[:, None, None]).clamp(min=0)
    maps = [reduced]
    for half in (1, 2):
        pooled = torch.empty_like(reduced)
        for y in range(6):
            for z in range(7):
                top, left = max(y - half, 0), max(z - half, 0)
                window = reduced[:, :, top : y + half + 1, left : z + half + 1]
                pooled[:, :, y, z] = window.amax(dim=(2, 3))
        maps.append(pooled)
    stacked = torch.cat(maps, dim=1)
    expected = torch.einsum("oc,nchw->nohw", block.merge.weight[:, :, 0, 0], stacked)
    expected = (expected + block.merge.bias[:, None, None]).clamp(min=0)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("size", [(0, 4, 5), (1, 1, 1)])
def test_the_block_takes_no_images_and_a_single_pixel(size):
    images, height, width = size
    x = torch.zeros(images, 8, height, width)
    assert SPPBlock(8, norm="BN").eval()(x).shape == x.shape
