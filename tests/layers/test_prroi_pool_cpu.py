"""The ways of PrRoI pooling on the CPU: in place, in strips and tiles, by way of a table; and mixed
layouts. The oracle is the plain operations in float64."""

import pytest
import torch

from iou_d2.layers import prroi_pool, prroi_pool_reference
from prroi_pool_by_hand import LAYOUTS, gradients, make_features, make_rois

BINS = (7, 4)
FORMATS = (torch.contiguous_format, torch.channels_last)


def agree(features, rois, weight, size=BINS):
    """Output and gradients in float32 against float64."""
    clean = torch.nan_to_num(features, 0, 0, 0).double()
    want = prroi_pool_reference(clean, rois.double(), size, 1.0, True)
    torch.testing.assert_close(
        prroi_pool(features, rois, size, 1.0, True).double(), want, rtol=1e-4, atol=1e-5
    )
    got = gradients(prroi_pool, features, rois, weight, size, 1.0, True)
    want = gradients(prroi_pool_reference, clean, rois.double(), weight.double(), size, 1.0, True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def weights(rois, channels, memory_format=torch.contiguous_format, size=BINS):
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(len(rois), channels, *size, generator=generator)
    return weight.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 16, 32, 33, 80, 196])
def test_dense_small_rois(layout, channels):
    """RoIs of a few rows each all over two images: a strip moves down both."""
    features = make_features((2, channels, 60, 30), layout)
    rois = make_rois(150, 2, 60, 30, (2, 12)).float()
    agree(features, rois, weights(rois, channels))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("sides", [(2, 20), (45, 200), (3, 200)])
@pytest.mark.parametrize("channels", [37, 196])
def test_gradients_of_either_layout(layout, memory_format, sides, channels):
    """A head that flattens its input gives channels-first gradients of channels-last maps. Small
    RoIs, such as go by way of a table, and both; and the RoI's gradient by edges and, of many
    channels and small bins, by products."""
    features = make_features((2, channels, 50, 60), layout)
    rois = make_rois(110, 2, 50, 60, sides).float()
    agree(features, rois, weights(rois, channels, memory_format, (2, 3)), (2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_gradient_for_all_bins(layout):
    """That of a sum has only strides of 0."""
    features = make_features((1, 18, 20, 24), layout)
    rois = make_rois(30, 1, 20, 24, (1, 40)).float()
    agree(features, rois, torch.ones(()).expand(30, 18, *BINS))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("side", [6, 55])
def test_pixels_under_no_roi_have_no_gradient(memory_format, side):
    """The gradient's memory is not cleared in advance: not the images without RoIs, either."""
    rois = torch.tensor([[1.0, 40, 30, 40 + side, 30 + side]]).repeat(90, 1)
    features = torch.randn(3, 20, 90, 100).contiguous(memory_format=memory_format)
    outside = torch.ones(3, 20, 90, 100, dtype=torch.bool)
    outside[1, :, 30 : 31 + side, 40 : 41 + side] = False
    for _ in range(3):
        torch.full_like(features, float("nan"))  # freed, and likely to be used again
        gradient, _ = gradients(prroi_pool, features, rois, weights(rois, 20), BINS)
        assert gradient.isfinite().all() and (gradient[outside] == 0).all()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_more_rois_than_a_table_takes_at_once(memory_format):
    features = torch.randn(1, 3, 118, 121, generator=torch.Generator().manual_seed(7))
    features = features.contiguous(memory_format=memory_format)
    rois = torch.tensor([[0.0, -1, -1, 121, 118]]).repeat(400, 1)
    rois[:, 1:] += 3 * torch.rand(400, 4, generator=torch.Generator().manual_seed(8))
    agree(features, rois, weights(rois, 3, memory_format, (14, 14)), (14, 14))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_table_keeps_what_is_not_finite_from_other_rois(memory_format, bad):
    features = make_features((1, 18, 40, 50), "contiguous")
    features[0, 2, 0, 0] = features[0, 17, 1, 49] = bad
    features = features.contiguous(memory_format=memory_format)
    rois = torch.tensor([[0.0, 5.3, 5.1, 45.8, 37.9]]).repeat(80, 1)
    agree(features, rois, weights(rois, 18, memory_format, (2, 2)), (2, 2))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_table_and_single_pixels_agree(memory_format):
    """A RoI among many that go by way of a table, and alone."""
    features = make_features((1, 20, 60, 50), "contiguous").contiguous(memory_format=memory_format)
    rois = make_rois(70, 1, 60, 50, (40, 60)).float()
    weight = weights(rois, 20, size=(2, 2))
    _, together = gradients(prroi_pool, features, rois, weight, (2, 2))
    pooled = prroi_pool(features, rois, (2, 2))
    for r in range(0, 70, 10):
        one = slice(r, r + 1)
        torch.testing.assert_close(
            prroi_pool(features, rois[one], (2, 2)), pooled[one], rtol=1e-4, atol=1e-5
        )
        _, alone = gradients(prroi_pool, features, rois[one], weight[one], (2, 2))
        torch.testing.assert_close(alone, together[one], rtol=1e-3, atol=1e-4)
