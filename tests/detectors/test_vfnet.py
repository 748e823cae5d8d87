from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ShapeSpec

from iou_d2.detectors.vfnet import (
    StarConv,
    StarHead,
    VFNetHead,
    sampled_conv,
    star_maker,
    star_offsets,
)
from iou_d2.errors import InputError
from iou_d2.layers.deform_conv import deform_conv

CONVS = [
    lambda feature, offsets, weight: deform_conv(feature, offsets, weight, padding=1),
    sampled_conv,
]


def nine_points(x: float, y: float, distances: list[float]) -> list[tuple[float, float]]:
    """Corners, middles of the sides and centre of a box around (x, y), row by row."""
    left, top, right, bottom = distances
    return [(px, py) for py in (y - top, y, y + bottom) for px in (x - left, x, x + right)]


def bilinear(image: list[list[float]], x: float, y: float) -> float:
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < len(image) and 0 <= column < len(image[0]):
                total += image[row][column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def random_star(n=2, channels=3, height=5, width=7, longest=4.0):
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64)
    distances = torch.rand(n, 4, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, channels, 3, 3, generator=generator, dtype=torch.float64)
    return feature, longest * distances, weight


@pytest.mark.parametrize("conv", CONVS, ids=["deform_conv", "sampled_conv"])
def test_a_tap_looks_at_its_point_of_the_box(conv):
    height, width = 9, 11
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    _, distances, _ = random_star(1, 1, height, width, longest=2.0)
    offsets = star_offsets(distances.float())
    for tap in range(9):
        weight = torch.zeros(2, 2, 9)
        weight[0, 0, tap] = weight[1, 1, tap] = 1  # a map of coordinates gives them back
        seen = conv(torch.stack([x, y])[None], offsets, weight.view(2, 2, 3, 3))
        for row in range(2, height - 2):
            for column in range(2, width - 2):
                points = nine_points(column, row, distances[0, :, row, column].tolist())
                assert seen[0, :, row, column].tolist() == pytest.approx(points[tap], abs=1e-5)


@pytest.mark.parametrize("conv", CONVS, ids=["deform_conv", "sampled_conv"])
def test_star_convolution_equals_loops(conv):
    feature, distances, weight = random_star()
    found = conv(feature, star_offsets(distances), weight)
    for n, out, row, column in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        points = nine_points(column, row, distances[n, :, row, column].tolist())
        expected = sum(
            bilinear(image, *point) * kernel
            for image, kernels in zip(feature[n].tolist(), weight[out].flatten(1).tolist())
            for point, kernel in zip(points, kernels)
        )
        assert found[n, out, row, column].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (1, 4), (16, 16)])
@pytest.mark.parametrize("longest", [3.0, 40.0])
def test_sampled_conv_equals_torchvision_forward_and_backward(height, width, longest):
    inputs = random_star(height=height, width=width, longest=longest)
    gradients = []
    for conv in CONVS:
        feature, distances, weight = leaves = [x.clone().requires_grad_() for x in inputs]
        output = conv(feature, star_offsets(distances), weight)
        output.square().sum().backward()
        gradients.append([output.detach(), *(x.grad for x in leaves)])
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_star_convolution_of_no_images():
    offsets = star_offsets(torch.zeros(0, 4, 3, 3))
    assert sampled_conv(torch.zeros(0, 2, 3, 3), offsets, torch.zeros(5, 2, 3, 3)).shape[1] == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_boxes_without_bounds_stop_nothing(bad):
    feature, distances, weight = random_star()
    distances[0, 1, 2, 3] = bad
    output = sampled_conv(feature, star_offsets(distances), weight)
    elsewhere = torch.ones_like(output, dtype=torch.bool)
    elsewhere[0, :, 2, 3] = False
    assert torch.isfinite(output[elsewhere]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_star_convolution_under_autocast_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    star = StarConv(3)
    feature, distances, _ = random_star(longest=300.0)
    feature, offsets = feature.to(dtype), star_offsets(distances.float())
    with torch.autocast("cpu", dtype=dtype):
        found = star(feature, offsets)
    expected = star(feature.float(), offsets)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_a_tenth_of_the_gradient_passes_the_offsets():
    _, distances, _ = random_star()
    distances.requires_grad_()
    factors = torch.arange(18.0, dtype=torch.float64).view(18, 1, 1)
    (star_offsets(distances) * factors).sum().backward()
    # dy of a tap is at 2 * tap, dx at 2 * tap + 1; a tap of the first row has dy = 1 - top.
    top = -sum(2.0 * tap for tap in (0, 1, 2))
    bottom = sum(2.0 * tap for tap in (6, 7, 8))
    left = -sum(2.0 * tap + 1 for tap in (0, 3, 6))
    right = sum(2.0 * tap + 1 for tap in (2, 5, 8))
    expected = 0.1 * torch.tensor([left, top, right, bottom], dtype=torch.float64)
    torch.testing.assert_close(distances.grad[0, :, 0, 0], expected)


@pytest.fixture
def head(small_cfg):
    """A head of two levels with strides 8 and 16 and units 24 and 48."""

    def build(head_class):
        torch.manual_seed(0)
        cfg = small_cfg(
            "configs/vfnet_R_50_FPN_1x.yaml", "MODEL.POINT_DETECTOR.DISTANCE_UNITS", "[24, 48]"
        )
        head = head_class(cfg, [ShapeSpec(channels=32, stride=stride) for stride in (8, 16)])
        for name, parameter in head.named_parameters():
            if "pred" in name or "scales" in name:  # so that levels and sides differ
                torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
        return head

    return build


FEATURES = [torch.randn(2, 32, 6, 5), torch.randn(2, 32, 3, 3)]


def test_distances_of_both_stages(head):
    head = head(VFNetHead)
    for level, prediction in enumerate(head(FEATURES)):
        feature = head.box_tower(FEATURES[level])
        raw = head.initial_pred(head.initial_conv(feature)).double()
        unit, stride = (24, 48)[level], (8, 16)[level]
        initial = (raw * head.initial_scales[level].double()).exp() * unit
        torch.testing.assert_close(prediction.distances[0].double(), initial, rtol=1e-5, atol=1e-4)

        star = deform_conv(
            feature,
            star_offsets(initial.float() / stride),
            head.refine_star.weight,
            padding=1,
        )
        raw = head.refine_pred(star.clamp(min=0)).double()
        refined = (raw * head.refine_scales[level].double()).exp() * initial
        torch.testing.assert_close(prediction.distances[1].double(), refined, rtol=1e-5, atol=1e-3)


def test_class_scores_look_through_the_star_of_the_initial_box(head):
    head = head(VFNetHead)
    prediction = head(FEATURES)[1]
    offsets = star_offsets(prediction.distances[0] / 16)
    star = deform_conv(head.cls_tower(FEATURES[1]), offsets, head.cls_star.weight, padding=1)
    expected = head.cls_pred(star.clamp(min=0))
    torch.testing.assert_close(prediction.logits, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_behind_star_convolutions(small_cfg):
    overrides = ("MODEL.POINT_DETECTOR.STAR_NORM", "True", "MODEL.POINT_DETECTOR.NUM_GROUPS", "4")
    head = VFNetHead(
        small_cfg("configs/quick/vfnet_shapes.yaml", *overrides),
        [ShapeSpec(channels=8, stride=8 * 2**i) for i in range(4)],
    )
    prediction = head([torch.randn(1, 8, 6, 6) for _ in range(4)])[0]
    assert prediction.logits.isfinite().all()
    for star in (head.cls_star, head.refine_star):
        torch.nn.init.uniform_(star.norm.weight)
        torch.nn.init.normal_(star.norm.bias)
        feature, offsets = torch.randn(2, 8, 5, 6), torch.randn(2, 18, 5, 6)
        raw = deform_conv(feature, offsets, star.weight, padding=1).double()
        groups = raw.view(2, 4, 2 * 5 * 6)
        centred = groups - groups.mean(dim=2, keepdim=True)
        scaled = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
        weight, bias = (x.double()[:, None, None] for x in (star.norm.weight, star.norm.bias))
        expected = scaled.view(2, 8, 5, 6) * weight + bias
        torch.testing.assert_close(star(feature, offsets).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "deviation", "most"),
    # Kaiming's for a ReLU: a variance of 2 / fan_in, uniform.
    [("normal", 0.01, 0.06), ("kaiming", (2 / 288) ** 0.5, (6 / 288) ** 0.5)],
)
def test_initial_weights_of_star_convolutions(small_cfg, name, deviation, most):
    cfg = small_cfg("configs/quick/vfnet_shapes.yaml", "MODEL.POINT_DETECTOR.STAR_INIT", name)
    head = VFNetHead(cfg, [ShapeSpec(channels=32, stride=8 * 2**i) for i in range(4)])
    for star in (head.cls_star, head.refine_star):
        assert star.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert star.weight.abs().max() <= most
        assert not list(star.norm.parameters())


def test_initial_weights_of_another_name(small_cfg):
    cfg = small_cfg("configs/quick/vfnet_shapes.yaml", "MODEL.POINT_DETECTOR.STAR_INIT", "zeros")
    with pytest.raises(InputError, match="STAR_INIT is 'normal' or 'kaiming', but it is 'zeros'"):
        star_maker(cfg.MODEL.POINT_DETECTOR)


def gradient_of_the_initial_box(head, part: str) -> float:
    prediction = head(FEATURES)[0]
    output = {
        "initial": prediction.distances[0],
        "final": prediction.distances[-1],
        "logits": prediction.logits,
    }[part]
    head.zero_grad()
    output.sum().backward()
    gradient = head.initial_pred.weight.grad
    return 0.0 if gradient is None else gradient.abs().sum().item()


def test_the_refined_box_reaches_the_initial_one_only_through_the_star(head):
    head = head(VFNetHead)
    assert gradient_of_the_initial_box(head, "final") > 0
    assert gradient_of_the_initial_box(head, "logits") > 0
    torch.nn.init.zeros_(head.refine_star.weight)
    torch.nn.init.zeros_(head.cls_star.weight)
    assert gradient_of_the_initial_box(head, "final") == 0
    assert gradient_of_the_initial_box(head, "logits") == 0
    assert gradient_of_the_initial_box(head, "initial") > 0


def test_without_refinement_the_initial_box_is_the_final_one(head):
    head = head(StarHead)
    for prediction in head(FEATURES):
        assert len(prediction.distances) == 1 and prediction.quality_logits is None
    assert gradient_of_the_initial_box(head, "final") > 0
    assert not any("refine" in name for name, _ in head.named_parameters())


def test_initial_scores_are_the_prior(small_cfg):
    cfg = small_cfg("configs/vfnet_R_50_FPN_1x.yaml", "MODEL.RETINANET.PRIOR_PROB", "0.02")
    head = VFNetHead(cfg, [ShapeSpec(channels=32, stride=8 * 2**i) for i in range(5)])
    prediction = head([torch.randn(1, 32, 4, 4) for _ in range(5)])[0]
    assert prediction.logits.sigmoid().mean().item() == pytest.approx(0.02, rel=0.05)


def test_deformable_towers(head, small_cfg):
    plain = head(VFNetHead)
    cfg = small_cfg(
        "configs/vfnet_R_50_FPN_dcn_2x_ms.yaml", "MODEL.POINT_DETECTOR.DISTANCE_UNITS", "[24, 48]"
    )
    deformable = VFNetHead(cfg, [ShapeSpec(channels=32, stride=stride) for stride in (8, 16)])
    loaded = deformable.load_state_dict(plain.state_dict(), strict=False)
    towers = ("cls_tower.2.offset", "box_tower.2.offset")
    assert loaded.missing_keys == [f"{x}.{y}" for x in towers for y in ("weight", "bias")]
    assert not loaded.unexpected_keys


def test_levels_without_a_unit_are_named(small_cfg):
    cfg = small_cfg("configs/vfnet_R_50_FPN_1x.yaml")
    with pytest.raises(ValueError, match="DISTANCE_UNITS has 5 entries for 2 levels"):
        VFNetHead(cfg, [ShapeSpec(channels=32, stride=stride) for stride in (8, 16)])
