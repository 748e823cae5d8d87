from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from assign_by_hand import (
    atss_oracle,
    atss_outcomes,
    fcos_oracle,
    random_atss_case,
    sides_of,
)
from iou_d2.ops import assign
from iou_d2.ops.assign import ATSSAssigner, FCOSAssigner
from iou_d2.ops.points import PointGrid

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ASSIGNERS = [
    ATSSAssigner(),
    FCOSAssigner(ranges=((-1, 64), (64, 128), (128, 256))),
    FCOSAssigner(ranges=((-1, 64), (64, 128), (128, math.inf)), center_sampling_radius=1.5),
]
STRIDES = (8, 16, 32)


@pytest.fixture
def numpy_generator():
    return np.random.default_rng(0)


def grid(side=128, offset=0.5):
    features = [torch.zeros(1, 1, side // stride, side // stride) for stride in STRIDES]
    return PointGrid(STRIDES, offset)(features)


def to_lists(points):
    return [level.tolist() for level in points]


@pytest.mark.parametrize("device", DEVICES)
def test_atss_equals_loops_in_600_cases(device, numpy_generator):
    positives = 0
    for _ in range(600):
        points, strides, boxes, topk, scale = random_atss_case(numpy_generator)
        expected = atss_oracle(to_lists(points), strides, boxes.tolist(), topk, scale)
        found = ATSSAssigner(topk, scale)([p.to(device) for p in points], strides, boxes.to(device))
        assert found.dtype == torch.int64
        assert found.tolist() == expected
        positives += sum(match >= 0 for match in expected)
    assert positives > 500


@pytest.mark.parametrize("device", DEVICES)
def test_atss_takes_some_of_the_points_that_are_equally_near(device, numpy_generator):
    several = 0
    for _ in range(300):
        center, half = numpy_generator.integers(1, 10, (2, 2)) * 2
        box = torch.tensor([*(center - half), *(center + half)], dtype=torch.float32)
        points = PointGrid((4,), 0.0)([torch.zeros(1, 1, 6, 6, device=device)])
        topk = int(numpy_generator.integers(1, 7))
        outcomes = atss_outcomes(to_lists(points), (4,), box.tolist(), topk, 2.0)
        expected = {tuple(sorted(outcome)) for outcome in outcomes}
        found = ATSSAssigner(topk, 2.0)(points, (4,), box[None].to(device))
        assert tuple(torch.nonzero(found == 0).flatten().tolist()) in expected
        several += len(expected) > 1
    assert several > 100


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pairs", [50, 2**15])
@pytest.mark.parametrize("radius", [None, 0.5, 1.5])
def test_fcos_equals_loops_in_600_cases(monkeypatch, device, pairs, radius, numpy_generator):
    """Whole coordinates, so that points lie on sides and on limits, and many areas are equal."""
    monkeypatch.setattr(assign, "_CPU_PAIRS", pairs)
    monkeypatch.setattr(assign, "_GPU_PAIRS", pairs)
    ranges = ((-1, 8), (8, 16), (16, 1e8))
    on_limit = positives = 0
    for _ in range(100):
        features = [
            torch.zeros(1, 1, *(int(n) for n in numpy_generator.integers(0, 64 // stride, 2)))
            for stride in (2, 4, 8)
        ]
        points = PointGrid((2, 4, 8), float(numpy_generator.choice([0.0, 0.5])))(features)
        count = int(numpy_generator.integers(0, 12))
        corner = torch.from_numpy(numpy_generator.integers(-8, 32, (count, 2)))
        size = torch.from_numpy(numpy_generator.integers(0, 33, (count, 2)))
        boxes = torch.cat([corner, corner + size], dim=1)
        expected = fcos_oracle(to_lists(points), (2, 4, 8), boxes.tolist(), ranges, radius)
        found = FCOSAssigner(ranges, radius)(
            [p.to(device) for p in points], (2, 4, 8), boxes.float().to(device)
        )
        assert found.dtype == torch.int64
        assert found.tolist() == expected
        positives += sum(match >= 0 for match in expected)
        on_limit += sum(
            max(sides_of(point, boxes[match].tolist())) in (8, 16)
            for point, match in zip(torch.cat(points).tolist(), expected)
            if match >= 0
        )
    assert positives > 150 and on_limit > 30


def assign_one(assigner, point, box):
    points = [torch.tensor([point], dtype=torch.float64)]
    return assigner(points, [8], torch.tensor([box], dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("x", "match"), [(0.0, -1), (0.01, -1), (0.0101, 0), (9.9899, 0), (9.99, -1), (10.0, -1)]
)
def test_atss_wants_points_inside_by_more_than_a_hundredth(x, match):
    assert assign_one(ATSSAssigner(), (x, 5.0), (0.0, 0.0, 10.0, 10.0)) == match
    assert assign_one(ATSSAssigner(), (5.0, x), (0.0, 0.0, 10.0, 10.0)) == match


def test_atss_takes_all_candidates_of_equal_iou():
    """Nine equal IoUs, whose mean in float32 is above them for some boxes."""
    (points,) = PointGrid((8,), 0.0)([torch.zeros(1, 1, 3, 3)])
    above = 0
    for tenths in range(1, 40):
        margin = tenths / 10
        box = torch.tensor([[-margin, -margin, 16 + margin, 16 + margin]])
        iou = torch.full((9,), (16 + 2 * margin) ** 2 / 64**2)
        above += bool(iou.mean() > iou[0])
        assert ATSSAssigner()([points], [8], box).tolist() == [0] * 9
    assert above > 0


@pytest.mark.parametrize(
    ("x", "match"), [(0.0, -1), (1e-9, 0), (4.0, 0), (4.001, -1), (5.999, -1), (6.0, 0), (10.0, -1)]
)
def test_fcos_points_on_a_side_are_outside_and_limits_belong_to_the_range(x, match):
    assigner = FCOSAssigner(ranges=((6, 10),))
    assert assign_one(assigner, (x, 5.0), (0.0, 0.0, 10.0, 10.0)) == match
    assert assign_one(assigner, (5.0, x), (0.0, 0.0, 10.0, 10.0)) == match


@pytest.mark.parametrize(("x", "match"), [(8.0, -1), (8.001, 0), (31.999, 0), (32.0, -1)])
def test_fcos_center_region_reaches_less_than_the_radius(x, match):
    assigner = FCOSAssigner(ranges=((-1, 64),), center_sampling_radius=1.5)
    assert assign_one(assigner, (x, 20.0), (0.0, 0.0, 40.0, 40.0)) == match


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_the_first_of_two_equal_boxes_wins(assigner):
    box = torch.tensor([[20.0, 20, 75, 90]])
    once, twice = (assigner(grid(), STRIDES, box.repeat(n, 1)) for n in (1, 2))
    assert once.max() == 0
    torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_ground_truth_all_is_background(assigner, dtype):
    found = assigner(grid(), STRIDES, torch.zeros(0, 4, dtype=dtype))
    assert found.dtype == torch.int64
    assert found.tolist() == [-1] * (16 * 16 + 8 * 8 + 4 * 4)


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_no_points(assigner):
    boxes = torch.tensor([[20.0, 20, 75, 90]])
    for found in (assigner([torch.zeros(0, 2)] * 3, STRIDES, some) for some in (boxes, boxes[:0])):
        assert found.shape == (0,) and found.dtype == torch.int64


BAD = {
    "zero width": [40.0, 20, 40, 90],
    "a point": [40.0, 40, 40, 40],
    "inverted": [75.0, 90, 20, 20],
    "inverted in x": [75.0, 20, 20, 90],
    "outside": [-500.0, -500, -400, -400],
    "nan": [math.nan, 20, 75, 90],
    "all nan": [math.nan] * 4,
    "infinite": [20.0, 20, math.inf, math.inf],
    "everywhere": [-math.inf, -math.inf, math.inf, math.inf],
    "at infinity": [math.inf] * 4,
}


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_box_that_holds_no_point_takes_none_and_leaves_the_others_theirs(assigner, bad):
    good = torch.tensor([[20.0, 20, 75, 90], [10, 50, 100, 110]])
    alone = assigner(grid(), STRIDES, good)
    assert set(alone.tolist()) == {-1, 0, 1}
    between = torch.stack([good[0], torch.tensor(bad), good[1]])
    expected = torch.where(alone == 1, 2, alone)
    torch.testing.assert_close(assigner(grid(), STRIDES, between), expected)
    assert (assigner(grid(), STRIDES, torch.tensor([bad])) == -1).all()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_a_box_that_sticks_out_takes_its_points_in_the_image(assigner):
    found = assigner(grid(), STRIDES, torch.tensor([[-30.0, -30, 40, 40]]))
    taken = torch.cat(grid())[found == 0]
    assert len(taken) and (taken < 40).all()


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(assigner, dtype):
    boxes = torch.tensor([[1000.0, 1000, 1090, 1100], [1010, 1010, 1030, 1050]]).to(dtype)
    points = [level + 992 for level in grid()]
    found = assigner(points, STRIDES, boxes)
    assert found.max() == 1
    torch.testing.assert_close(found, assigner(points, STRIDES, boxes.float()))


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_memory_layout_does_not_matter_and_inputs_are_left_alone(assigner):
    boxes = torch.tensor([[20.0, 20, 75, 90], [10, 50, 100, 110]])
    points = grid()
    expected = assigner(points, STRIDES, boxes)
    apart = [p.t().contiguous().t() for p in points], boxes.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in (*apart[0], apart[1]))
    torch.testing.assert_close(assigner(apart[0], STRIDES, apart[1]), expected)
    assert all(torch.equal(p, q) for p, q in zip([*points, boxes], [*grid(), apart[1]]))


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_points_come_in_any_order(assigner):
    boxes = torch.tensor([[20.3, 20.9, 75.1, 90.7], [10.3, 50.1, 100.6, 110.2]])
    points = grid()
    orders = [torch.randperm(len(p), generator=torch.Generator().manual_seed(0)) for p in points]
    expected = assigner(points, STRIDES, boxes).split([len(p) for p in points])
    found = assigner([p[order] for p, order in zip(points, orders)], STRIDES, boxes)
    torch.testing.assert_close(found, torch.cat([e[o] for e, o in zip(expected, orders)]))


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_a_shift_of_everything_changes_nothing(assigner):
    boxes = torch.tensor([[20.25, 20.75, 75, 90.5], [10.25, 50, 100.75, 110.25]])
    expected = assigner(grid(), STRIDES, boxes)
    found = assigner([level + 2**14 for level in grid()], STRIDES, boxes + 2**14)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_assigners_name_what_is_wrong(assigner):
    with pytest.raises(ValueError, match=r"\(G, 4\), not \(2, 5\)"):
        assigner(grid(), STRIDES, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"\(G, 4\), not \(4,\)"):
        assigner(grid(), STRIDES, torch.zeros(4))
    with pytest.raises(ValueError, match="3 levels of points need as many strides"):
        assigner(grid(), STRIDES[:2], torch.zeros(1, 4))


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="topk=0"):
        ATSSAssigner(topk=0)
    with pytest.raises(ValueError, match="lowest, highest"):
        FCOSAssigner(ranges=((64, -1),))
    with pytest.raises(ValueError, match="positive, not 0"):
        FCOSAssigner(center_sampling_radius=0)
    with pytest.raises(ValueError, match="5 levels and got points of 3"):
        FCOSAssigner()(grid(), STRIDES, torch.zeros(1, 4))
