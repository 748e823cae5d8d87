from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iou_d2.layers.deform_conv import ModulatedDeformConv, deform_conv


def sample(image, y, x):
    """Bilinear value of a list of rows at (y, x); 0 outside."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < len(image) and 0 <= column < len(image[0]):
                total += image[row][column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def oracle(x, prediction, weight, groups, offset_groups, stride, padding, dilation):
    """Modulated deformable 3x3 convolution in loops over what the offset convolution predicts:
    9 (dy, dx) of each offset group, and after all of them 9 masks of each, before the sigmoid."""
    images, prediction, taps = x.tolist(), prediction.detach(), 9 * offset_groups
    count, _, height, width = prediction.shape
    out = torch.zeros(count, len(weight), height, width, dtype=torch.float64)
    inputs = weight.shape[1]
    for n in range(count):
        for c_out in range(len(weight)):
            first = c_out // (len(weight) // groups) * inputs
            for i in range(height):
                for j in range(width):
                    for c in range(inputs):
                        group = (first + c) // (x.shape[1] // offset_groups)
                        for tap in range(9):
                            t = 9 * group + tap
                            dy, dx = prediction[n, 2 * t : 2 * t + 2, i, j].tolist()
                            mask = 1 / (1 + math.exp(-prediction[n, 2 * taps + t, i, j]))
                            y = i * stride - padding + tap // 3 * dilation + dy
                            x_ = j * stride - padding + tap % 3 * dilation + dx
                            value = mask * sample(images[n][first + c], y, x_)
                            out[n, c_out, i, j] += value * weight[c_out, c, tap // 3, tap % 3]
    return out


def random_conv(groups=1, offset_groups=1, stride=1, dilation=1, **kwargs):
    """A double ModulatedDeformConv of 4 channels whose offsets reach over the border."""
    torch.manual_seed(0)
    conv = ModulatedDeformConv(
        *(4, 4, 3),
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        **kwargs,
    ).double()
    nn.init.normal_(conv.offset.weight, std=0.5)
    nn.init.normal_(conv.offset.bias)
    return conv


@pytest.mark.parametrize(
    ("groups", "offset_groups", "stride", "dilation"),
    [(1, 1, 1, 1), (2, 1, 2, 1), (4, 2, 1, 2), (1, 4, 2, 2)],
)
def test_it_equals_a_loop_over_pixels(groups, offset_groups, stride, dilation):
    conv = random_conv(groups, offset_groups, stride, dilation, bias=False)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    wanted = oracle(
        x, conv.offset(x), conv.weight, groups, offset_groups, stride, dilation, dilation
    )
    torch.testing.assert_close(conv(x), wanted)


def test_at_first_it_is_half_a_plain_convolution_with_norm_and_activation():
    norm = nn.GroupNorm(2, 4)
    conv = ModulatedDeformConv(4, 4, 3, padding=1, norm=norm, activation=F.relu)
    x = torch.randn(2, 4, 6, 5)
    plain = (F.conv2d(x, conv.weight, padding=1)) / 2 + conv.bias[:, None, None]
    torch.testing.assert_close(conv(x), norm(plain).relu())
    assert list(conv.state_dict()) == [
        *("weight", "bias", "norm.weight", "norm.bias", "offset.weight", "offset.bias")
    ]
    assert conv.offset.weight.shape == (27, 4, 3, 3)


def test_gradients_are_right():
    conv = random_conv(groups=2, stride=2)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(conv.named_parameters())

    def forward(x, *values):
        return torch.func.functional_call(conv, dict(zip(parameters, values)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters.values()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype):
    conv = random_conv().float()
    x = torch.randn(1, 4, 8, 8)
    wanted = conv(x)
    with torch.autocast("cpu", dtype=dtype):
        loose = conv(x)
        loose.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in conv.parameters())
    torch.testing.assert_close(loose, wanted, rtol=0.05, atol=0.05)
    half = conv.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), wanted, rtol=0.1, atol=0.1)


def test_no_images_and_a_single_pixel():
    conv = random_conv().float()
    assert conv(torch.zeros(0, 4, 8, 8)).shape == (0, 4, 8, 8)
    assert conv(torch.zeros(0, 4, 8, 8, requires_grad=True)).sum().requires_grad
    assert conv(torch.rand(1, 4, 1, 1)).isfinite().all()


def test_an_offset_that_is_not_finite_shows_in_the_output_and_reads_no_foreign_memory():
    x = torch.rand(1, 2, 8, 8, requires_grad=True)
    weight = torch.rand(3, 2, 3, 3, requires_grad=True)
    for value in (math.nan, math.inf, -math.inf):
        offset = torch.zeros(1, 18, 8, 8)
        offset[0, 3, 2, 5] = value
        y = deform_conv(x, offset.requires_grad_(), weight, padding=1)
        assert y[0, :, 2, 5].isnan().all() and y.isnan().sum() == 3
        y.sum().backward()
    huge = torch.full((1, 18, 8, 8), 3e38)
    assert deform_conv(x, huge, weight, padding=1).count_nonzero() == 0
