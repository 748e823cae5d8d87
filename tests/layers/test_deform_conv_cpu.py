"""The operator `iou_d2::deform_conv` of the CPU against torchvision's, which shares no code."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision

from iou_d2.layers import HAS_EXTENSION
from iou_d2.layers.deform_conv import deform_conv

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="iou_d2 is not compiled")
GEOMETRIES = [
    {},
    {"groups": 2, "stride": (2, 2), "masked": True},
    {"groups": 4, "offset_groups": 2, "padding": (2, 2), "dilation": (2, 2), "masked": True},
    {"offset_groups": 4, "stride": (1, 2), "padding": (0, 3), "kernel": (1, 5)},
    {"groups": 2, "offset_groups": 4, "dilation": (2, 1), "masked": True, "size": (37, 29)},
    {"channels": 40, "out": 24, "spread": 0.0},
]


def random_inputs(
    groups=1,
    offset_groups=1,
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    kernel=(3, 3),
    masked=False,
    channels=8,
    out=12,
    size=(11, 9),
    spread=3.0,
    dtype=torch.float64,
):
    """Features, offsets, mask and weight, and the geometry by name."""
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size, dtype=dtype)
    weight = torch.randn(out, channels // groups, *kernel, dtype=dtype)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    side = torch.nn.functional.conv2d(x, weight, groups=groups, **geometry).shape[2:]
    taps = offset_groups * kernel[0] * kernel[1]
    offset = spread * torch.randn(2, 2 * taps, *side, dtype=dtype)
    mask = torch.rand(2, taps, *side, dtype=dtype) if masked else None
    return [x, offset, mask, weight], geometry


def ours(x, offset, mask, weight, geometry):
    return deform_conv(x, offset, weight, mask=mask, **geometry)


def torchvisions(x, offset, mask, weight, geometry):
    return torchvision.ops.deform_conv2d(x, offset, weight, mask=mask, **geometry)


def with_gradients(function, inputs, geometry):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, geometry)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("settings", GEOMETRIES)
def test_it_equals_torchvision_forward_and_backward(settings):
    inputs, geometry = random_inputs(**settings)
    found = with_gradients(ours, inputs, geometry)
    expected = with_gradients(torchvisions, inputs, geometry)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 64])
def test_every_number_of_channels_in_float32(channels):
    inputs, geometry = random_inputs(channels=channels, dtype=torch.float32)
    expected = with_gradients(
        torchvisions, [x if x is None else x.double() for x in inputs], geometry
    )
    for one, other in zip(with_gradients(ours, inputs, geometry), expected):
        torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=2e-4)


def test_any_memory_format_gives_the_same():
    inputs, geometry = random_inputs(masked=True)
    expected = with_gradients(ours, inputs, geometry)
    turned = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    for others in (turned, strided):
        # The matrix products are not ours, and may sum in another order.
        for one, other in zip(with_gradients(ours, others, geometry), expected):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_number_of_threads_changes_nothing():
    inputs, geometry = random_inputs(channels=48, size=(40, 30), dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(with_gradients(ours, inputs, geometry))
    finally:
        torch.set_num_threads(threads)
    # The matrix products are not ours, and may sum in another order.
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pixel_that_is_not_finite_spoils_no_output_that_does_not_see_it(bad):
    inputs, geometry = random_inputs(spread=5.0)
    inputs[0][0, :, 0, 0] = bad
    found = ours(*inputs, geometry).isfinite()
    assert torch.equal(found, torchvisions(*inputs, geometry).isfinite())
    assert found.any() and not found.all()


def test_points_outside_and_without_bounds_have_no_gradient():
    inputs, geometry = random_inputs(spread=0.0)
    for bad in (1e300, -1e300, math.nan, math.inf):
        inputs[1] = torch.full_like(inputs[1], bad)
        y, of_x, of_offset, _ = with_gradients(ours, inputs, geometry)
        assert y.isnan().all() if not math.isfinite(bad) else y.count_nonzero() == 0
        assert of_x.count_nonzero() == 0 and of_offset.count_nonzero() == 0


def test_it_is_a_proper_operator():
    inputs, geometry = random_inputs(masked=True, size=(5, 4))
    ops, places = torch.ops.iou_d2, geometry.values()
    grad = torch.ones_like(ops.deform_conv(*inputs, *places))
    torch.library.opcheck(ops.deform_conv_backward.default, (grad, *inputs, *places))
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(ops.deform_conv.default, (*inputs, *places))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", [{}, {"groups": 2, "masked": True}, {"kernel": (1, 5)}])
def test_results_without_data_lie_in_memory_as_those_with_data(case, layout):
    inputs, geometry = random_inputs(**case)
    inputs[0] = inputs[0].contiguous(memory_format=layout)
    ops, places = torch.ops.iou_d2, geometry.values()
    y = ops.deform_conv(*inputs, *places)
    real = [y, *ops.deform_conv_backward(y, *inputs, *places)]
    meta = [None if x is None else x.to("meta") for x in inputs]
    fake_y = ops.deform_conv(*meta, *places)
    fake = [fake_y, *ops.deform_conv_backward(fake_y, *meta, *places)]
    assert [x.shape for x in fake] == [x.shape for x in real]
    assert [x.stride() for x in fake] == [x.stride() for x in real]


def test_there_is_no_second_derivative():
    inputs, geometry = random_inputs(size=(5, 4))
    x = inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(ours(x, *inputs[1:], geometry).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize(
    ("changed", "shape"),
    [
        (0, (2, 8, 11)),
        (0, (2, 7, 11, 9)),
        (1, (2, 17, 11, 9)),
        (1, (2, 18, 10, 9)),
        (1, (1, 18, 11, 9)),
        (2, (2, 8, 11, 9)),
        (3, (12, 3, 3, 3)),
        (3, (12, 0, 3, 3)),
        (3, (12, 8, 30, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_told(changed, shape):
    inputs, geometry = random_inputs(masked=True)
    inputs[changed] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="deform_conv: "):
        ours(*inputs, geometry)


def test_a_geometry_that_is_none_is_told():
    inputs, geometry = random_inputs()
    for bad in ({"stride": (0, 1)}, {"dilation": (1, -1)}):
        with pytest.raises(ValueError, match="must be positive"):
            ours(*inputs, {**geometry, **bad})


def test_no_output_channels_and_no_images():
    inputs, geometry = random_inputs()
    assert ours(*(x if x is None else x[:0] for x in inputs[:3]), inputs[3], geometry).shape[0] == 0
