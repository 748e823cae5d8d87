from __future__ import annotations

import math

import pytest
import torch

from iou_d2.ops.box_codec import AnchorDeltas, ExpDistances, ReluDistances

CODECS = [ExpDistances((24, 48)), ReluDistances((8, 16)), AnchorDeltas((64, 128))]


def by_hand(codec, raw: list[float], level: int) -> list[float]:
    """Distances of one point from its four outputs, scaled."""
    if isinstance(codec, ExpDistances):
        return [math.exp(x) * (24, 48)[level] for x in raw]
    if isinstance(codec, ReluDistances):
        return [max(x, 0.0) * (8, 16)[level] for x in raw]
    # The anchor of the point (0, 0), moved and stretched.
    side = (64, 128)[level]
    x, y = 0.1 * raw[0] * side, 0.1 * raw[1] * side
    longest = math.log(1000 / 16)
    width, height = (side * math.exp(max(-longest, min(longest, 0.2 * z))) for z in raw[2:])
    return [width / 2 - x, height / 2 - y, x + width / 2, y + height / 2]


@pytest.mark.parametrize("codec", CODECS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.7)], ids=["plain", "scaled"])
def test_codecs_by_hand(codec, scale):
    torch.manual_seed(0)
    for level in (0, 1):
        raw = 2 * torch.randn(2, 4, 3, 5)
        found = codec(raw, scale, level)
        for n, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
            scaled = [float(scale) * value for value in raw[n, :, y, x].tolist()]
            expected = by_hand(codec, scaled, level)
            assert found[n, :, y, x].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("codec", CODECS, ids=lambda x: type(x).__name__)
def test_codecs_in_half_precision_and_of_nothing(codec):
    large = torch.full((1, 4, 1, 1), 11.0, dtype=torch.float16)
    found = codec(large, 1.0, 1)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert codec(torch.zeros(2, 4, 0, 0), 1.0, 0).shape == (2, 4, 0, 0)
    assert codec(torch.full((1, 4, 1, 1), float("nan")), 1.0, 0).isnan().any()


def test_deltas_have_bounds_and_boxes_need_not_hold_their_point():
    codec = AnchorDeltas((64,))
    huge = torch.tensor([20.0, 0.0, 1e6, -1e6]).view(1, 4, 1, 1)
    left, top, right, bottom = codec(huge, 1.0, 0).flatten().tolist()
    assert left + right == pytest.approx(64 * 1000 / 16, rel=1e-5)
    assert top + bottom == pytest.approx(64 * 16 / 1000, rel=1e-4)
    left, *_ = codec(torch.tensor([20.0, 0, 0, 0]).view(1, 4, 1, 1), 1.0, 0).flatten().tolist()
    assert left == 32 - 128


def test_gradients_of_codecs():
    torch.manual_seed(0)
    for codec in CODECS:
        raw = torch.randn(1, 4, 2, 2, requires_grad=True)
        scale = torch.ones((), requires_grad=True)
        codec(raw, scale, 0).sum().backward()
        assert raw.grad.isfinite().all() and scale.grad.isfinite()
    below = torch.full((1, 4, 1, 1), -1.0, requires_grad=True)
    ReluDistances((8,))(below, 1.0, 0).sum().backward()
    assert not below.grad.any()
