"""The compiled 3x3 convolution against PyTorch's in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iou_d2.layers import HAS_EXTENSION
from iou_d2.layers.conv3x3 import (
    conv3x3,
    conv3x3_and_more,
    conv3x3_of_maps,
    is_worth_it,
    suits,
)

pytestmark = pytest.mark.skipif(not HAS_EXTENSION, reason="without the compiled operators")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def inputs(n: int, c: int, height: int, width: int, d: int) -> list[torch.Tensor]:
    """x, weight and bias, of which outputs are about 1."""
    return [numbers(n, c, height, width), numbers(d, c, 3, 3, seed=1) / (3 * c**0.5), numbers(d)]


# Of the outputs' and gradients' largest number: what F(4x4, 3x3) may be off. PyTorch's convolution
# of 256 channels in channels-last is by 2e-6.
ROUNDING = 5e-6
# Tiles of the algorithm of small maps are 2 x 2 pixels, of others 4 x 4.
SMALL, LARGE = (12, 2), (32, 4)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.shape == exact.shape
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


# Of both algorithms: whole tiles and cut ones, one tile and less, several blocks of tiles, more
# channels in and more out.
SHAPES = {
    "whole": (2, 64, 12, 16, 64),
    "cut": (1, 64, 13, 17, 80),
    "one row": (3, 16, 1, 40, 32),
    "one pixel": (1, 32, 1, 1, 16),
    "large, whole": (2, 64, 32, 24, 48),
    "large, cut": (1, 32, 33, 37, 48),
    "large, one row": (1, 16, 1, 401, 16),
    "blocks": (2, 512, 31, 37, 256),
    "many tiles": (1, 16, 150, 200, 16),
    "three channels out": (2, 64, 9, 8, 3),
    "no multiple of 16 out": (1, 64, 33, 37, 50),
    "many tiles, no multiple of 16 out": (1, 64, 45, 61, 50),
}


# One row or pixel alone makes no output without padding.
CASES = [
    (shape, padding) for shape in SHAPES for padding in (0, 1, 2) if padding or "one" not in shape
]


@pytest.mark.parametrize(("shape", "padding"), CASES)
def test_values_and_gradients(shape, padding):
    given = [x.requires_grad_() for x in inputs(*SHAPES[shape])]
    exact = [x.detach().double().requires_grad_() for x in given]
    y, wanted = conv3x3(*given, padding), F.conv2d(*exact, padding=padding)
    assert y.is_contiguous(memory_format=torch.channels_last) or len(given[2]) % 16
    assert error(y, wanted) < ROUNDING
    grad = numbers(*y.shape, seed=2)
    found = torch.autograd.grad(y, given, grad)
    for a, want in zip(found, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert error(a, want) < ROUNDING


# Maps that go by the algorithm of large ones since they do so together, and by that of small ones.
PYRAMIDS = {
    "large": [(2, 64, 40, 32), (2, 64, 20, 17), (2, 64, 5, 4), (2, 64, 1, 1)],
    "small": [(1, 64, 5, 6), (3, 64, 2, 3)],
    "one without images": [(2, 64, 9, 8), (0, 64, 5, 4), (1, 64, 3, 3)],
}


@pytest.mark.parametrize("shapes", PYRAMIDS.values(), ids=PYRAMIDS)
@pytest.mark.parametrize("channels", [64, 36])
def test_maps_that_share_weights(shapes, channels):
    """Values, gradients of each map, and that of the weights, to which all maps add."""
    xs = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    _, *shared = inputs(1, 64, 1, 1, channels)
    given = [x.requires_grad_() for x in (*xs, *shared)]
    exact = [x.detach().double().requires_grad_() for x in given]
    ys = conv3x3_of_maps(xs, *shared)
    wanted = [F.conv2d(x, *exact[-2:], padding=1) for x in exact[:-2]]
    grads = [numbers(*y.shape, seed=9) for y in ys]
    found = torch.autograd.grad(ys, given, grads)
    right = torch.autograd.grad(wanted, exact, [grad.double() for grad in grads])
    for a, want in zip((*ys, *found), (*wanted, *right), strict=True):
        assert a.shape == want.shape
        assert want.numel() == 0 or error(a, want) < ROUNDING


def test_a_map_without_a_gradient_among_others():
    xs, (_, weight, _) = [numbers(1, 64, n, n) for n in (9, 5)], inputs(1, 64, 1, 1, 32)
    first, _ = conv3x3_of_maps([xs[0], xs[1].requires_grad_()], weight.requires_grad_())
    first.sum().backward()
    assert xs[0].grad is None
    assert xs[1].grad.abs().max() == 0
    exact = weight.detach().double().requires_grad_()
    F.conv2d(xs[0].double(), exact, padding=1).sum().backward()
    assert error(weight.grad, exact.grad) < ROUNDING


@pytest.mark.parametrize("learns", range(3))
def test_a_single_gradient_may_be_wanted(learns):
    given = inputs(2, 64, 9, 8, 32)
    given[learns].requires_grad_()
    exact = [x.detach().double() for x in given]
    exact[learns].requires_grad_()
    conv3x3(*given).square().sum().backward()
    F.conv2d(*exact, padding=1).square().sum().backward()
    assert error(given[learns].grad, exact[learns].grad) < 1e-6
    assert [x.grad is None for x in given].count(True) == 2


def test_any_order_of_memory():
    x, weight, bias = inputs(2, 32, 9, 8, 48)
    want = conv3x3(x, weight, bias)
    for layout in (torch.contiguous_format, torch.channels_last):
        turned = [t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
        y = conv3x3(*turned, bias)
        torch.testing.assert_close(y, want, rtol=0, atol=0)
        y.backward(torch.ones(()).expand_as(y))  # strides of 0
        assert error(turned[0].grad, F.conv_transpose2d(
            torch.ones_like(want).double(), weight.double(), padding=1
        )) < 1e-6  # fmt: skip


@pytest.mark.parametrize("ends", [(0.0, math.inf), (0.0, 0.6), (-0.2, 0.1)])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("size", [(12, 16), (13, 17), (32, 32), (33, 35)])
def test_sums_and_ends(ends, adds, size):
    x, weight, bias = inputs(2, 64, *size, 32)
    addend = numbers(2, 32, *size, seed=3) if adds else None
    before = None if addend is None else addend.clone()
    exact = F.conv2d(*(t.double() for t in (x, weight, bias)), padding=1)
    exact = (exact + (0 if addend is None else addend.double())).clamp(*ends)
    (found,) = conv3x3_and_more([x], weight, bias, 1, [addend] if adds else (), *ends)
    assert (found.double() - exact).abs().max() < 1e-5
    assert addend is None or torch.equal(addend, before)
    (narrow,) = conv3x3_and_more([x], weight[:20], bias[:20], 1, (), *ends)
    if not adds:
        assert (narrow.double() - exact[:, :20]).abs().max() < 1e-5
    (y,) = conv3x3_and_more([x], weight.requires_grad_())
    assert not y.requires_grad
    assert error(y, F.conv2d(x.double(), weight.double(), padding=1).detach()) < ROUNDING


@pytest.mark.parametrize("channels", [32, 36])
def test_outputs_may_be_changed_in_place(channels):
    given = [x.requires_grad_() for x in inputs(2, 64, 9, 8, channels)]
    exact = [x.detach().double().requires_grad_() for x in given]
    conv3x3(*given).relu_().square().sum().backward()
    F.conv2d(*exact, padding=1).relu().square().sum().backward()
    for x, want in zip(given, exact, strict=True):
        assert error(x.grad, want.grad) < ROUNDING


@pytest.mark.parametrize(("channels", "widened"), [(32, 32), (36, 48)])
def test_opcheck(channels, widened):
    x, weight, bias = inputs(2, 64, 9, 8, channels)
    grad = numbers(2, widened, 9, 8)
    ops, small = torch.ops.iou_d2, numbers(1, 64, 5, 4)
    torch.library.opcheck(ops.conv3x3.default, ([x, small], weight, bias, [], 1, 0.0, math.inf))
    torch.library.opcheck(ops.conv3x3_of_input.default, ([grad], weight, 1))
    torch.library.opcheck(ops.conv3x3_of_weight.default, ([grad], [x], 1))


def test_no_images():
    x, weight, bias = inputs(0, 64, 9, 8, 32)
    y = conv3x3(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    assert y.shape == (0, 32, 9, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.abs().max() == bias.grad.abs().max() == 0


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(("side", "tile"), [SMALL, LARGE])
@pytest.mark.parametrize("place", [(4, 7), (5, 5), (0, 11)])
def test_what_is_not_finite_shows_in_the_tiles_that_see_it_alone(number, side, tile, place):
    x, weight, bias = inputs(1, 64, side, side, 32)
    x[0, 5][place] = number
    bad = ~conv3x3(x, weight, bias).isfinite().all(1)[0]
    plain = ~F.conv2d(x, weight, bias, padding=1).isfinite().all(1)[0]
    assert (plain & ~bad).sum() == 0
    tiles = plain.unflatten(1, (-1, tile)).unflatten(0, (-1, tile)).any(3).any(1)
    assert (bad & ~tiles.repeat_interleave(tile, 0).repeat_interleave(tile, 1)).sum() == 0


@pytest.mark.parametrize("side", [12, 32])
def test_large_and_small_numbers(side):
    x, weight, _ = inputs(1, 64, side, side, 32)
    for factor in (1e-30, 1e30):
        exact = F.conv2d(factor * x.double(), weight.double(), padding=1)
        assert error(conv3x3(factor * x, weight), exact) < ROUNDING


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda x, w, b: (x[0], w, b, 1), ValueError, "x must have four dimensions"),
        (lambda x, w, b: (x.double(), w, b, 1), TypeError, "x must be float32, got Double"),
        (lambda x, w, b: (x, w.half(), b, 1), TypeError, "the weight must be float32, got Half"),
        (lambda x, w, b: (x[:, :24], w, b, 1), ValueError, "of x must be a multiple of 16, got 24"),
        (lambda x, w, b: (x[:, :32], w, b, 1), ValueError, "x has 32 channels and the weight is"),
        (lambda x, w, b: (x, w[..., :2], b, 1), ValueError, r"the weight must be \(D, C, 3, 3\)"),
        (lambda x, w, b: (x, w, b[:16], 1), ValueError, r"bias must have shape \[32\], got \[16\]"),
        (lambda x, w, b: (x, w, b.double(), 1), TypeError, "bias must be contiguous float32"),
        (lambda x, w, b: (x, w, b, 3), ValueError, "padding must be 0, 1 or 2, got 3"),
        (lambda x, w, b: (x[:, :, :2], w, b, 0), ValueError, "input of 2 x 8 pixels is too small"),
    ],
)
def test_bad_inputs_are_refused(change, kind, text):
    with pytest.raises(kind, match=text):
        conv3x3(*change(*inputs(1, 64, 9, 8, 32)))


def test_bad_addends_and_gradients_are_refused():
    x, weight, bias = inputs(1, 64, 9, 8, 32)
    with pytest.raises(ValueError, match=r"the addend must have shape \[1, 32, 9, 8\]"):
        conv3x3_and_more([x], weight, bias, 1, [numbers(1, 32, 9, 7)])
    with pytest.raises(ValueError, match="there are 1 maps of the addend for 2 of x"):
        conv3x3_and_more([x, x], weight, bias, 1, [numbers(1, 32, 9, 8)])
    with pytest.raises(ValueError, match="channels of the addend must be a multiple of 16, got 20"):
        conv3x3_and_more([x], weight[:20], bias[:20], 1, [numbers(1, 20, 9, 8)])
    with pytest.raises(ValueError, match=r"the gradient must have shape \[1, 32, 9, 8\]"):
        torch.ops.iou_d2.conv3x3_of_weight([numbers(1, 32, 8, 8)], [x], 1)
    with pytest.raises(ValueError, match="the gradient has 64 channels and the weight makes 32"):
        torch.ops.iou_d2.conv3x3_of_input([x], weight, 1)
    with pytest.raises(ValueError, match="there is no map of x"):
        conv3x3_of_maps([], weight)
    with pytest.raises(ValueError, match="all of x must have the 64 channels of the first, got 32"):
        conv3x3_of_maps([x, x[:, :32]], weight)
    grad = torch.autograd.grad(conv3x3(x.requires_grad_(), weight).square().sum(), x)[0]
    assert not grad.requires_grad


def test_what_it_is_for():
    def map_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    conv, x = nn.Conv2d(64, 80, 3, padding=1), map_of(1, 64, 16, 16)
    assert not is_worth_it(conv, [x])
    conv.to(memory_format=torch.channels_last)
    assert is_worth_it(conv, [x])
    assert is_worth_it(conv, [torch.zeros(1, 64, 16, 16)])
    for other in (
        map_of(1, 64, 16, 15),
        map_of(1, 64, 16, 16, dtype=torch.bfloat16),
        map_of(1, 64, 16, 16).to("meta"),
        map_of(1, 64, 16, 16)[0],
        map_of(0, 64, 16, 16),
    ):
        assert not is_worth_it(conv, [other])
    # Levels that are large enough together.
    assert is_worth_it(conv, [map_of(1, 64, 12, 16), map_of(1, 64, 8, 8)])
    assert not is_worth_it(conv, [map_of(1, 64, 12, 16), map_of(1, 64, 8, 7)])
    assert not is_worth_it(conv, [x, map_of(1, 64, 8, 8, dtype=torch.float64)])
    narrow = nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)
    assert not is_worth_it(narrow, [map_of(1, 64, 2, 200)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_worth_it(conv, [x])
    for arguments in (
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"padding": 3},
        {"padding": (1, 0)},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
    ):
        assert not suits(nn.Conv2d(64, 64, 3, **arguments))
    for arguments in ((32, 64, 3), (72, 64, 3), (64, 36, 3), (64, 64, 1), (64, 64, (3, 1))):
        assert not suits(nn.Conv2d(*arguments))
