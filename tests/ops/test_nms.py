from __future__ import annotations

import cv2
import pytest
import torch
import torchvision

from iou_d2.ops import nms
from iou_d2.ops.nms import batched_nms, best_of_nms, iou_guided_nms, soft_nms

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def iou_by_hand(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    inner = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / union if union else 0.0


def algorithm_1(boxes, cls_scores, rank_scores, classes, threshold):
    """IoU-guided NMS as the paper prints it; the first of equal ranks comes first."""
    left = sorted(range(len(boxes)), key=lambda i: -rank_scores[i])
    keep, scores = [], []
    while left:
        best, others = left[0], []
        score = cls_scores[best]
        for i in left[1:]:
            if classes[i] == classes[best] and iou_by_hand(boxes[best], boxes[i]) > threshold:
                score = max(score, cls_scores[i])
            else:
                others.append(i)
        keep.append(best)
        scores.append(score)
        left = others
    return keep, scores


def random_case(generator, side):
    """Whole coordinates and few scores: ties of ranks, of IoU and threshold, boxes without area."""
    count = int(torch.randint(0, 40, (1,), generator=generator))
    corner = torch.randint(0, side // 4, (count, 2), generator=generator).float()
    size = torch.randint(0, side, (count, 2), generator=generator).float()
    cls_scores = torch.randint(1, 9, (count,), generator=generator) / 8
    rank_scores = torch.randint(1, 5, (count,), generator=generator) / 8
    classes = torch.randint(0, 3, (count,), generator=generator)
    return torch.cat([corner, corner + size], dim=1), cls_scores, rank_scores, classes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pairs", [1, 7, 2**17])
@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_guided_nms_equals_algorithm_1_in_2700_cases(monkeypatch, device, pairs, threshold):
    monkeypatch.setattr(nms, "_CPU_PAIRS", pairs)
    monkeypatch.setattr(nms, "_GPU_PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    suppressed = 0
    for number in range(300):
        case = random_case(generator, side=(8, 32)[number % 2])
        keep, scores = iou_guided_nms(*[x.to(device) for x in case], threshold)
        expected = algorithm_1(*[x.tolist() for x in case], threshold)
        assert (keep.tolist(), scores.tolist()) == expected, number
        suppressed += len(case[0]) - len(keep)
    assert suppressed > 150


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.7])
def test_an_iou_that_rounds_to_the_threshold_is_handed_over_as_torchvision_suppresses_it(threshold):
    """3/10, 6/10 and 7/10 in float32 and in float64 lie on different sides of each other."""
    share = 10 * threshold
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, share, 10]])
    ranks, classes = torch.tensor([0.9, 0.1]), torch.zeros(2, dtype=torch.int64)
    keep, scores = iou_guided_nms(boxes, torch.tensor([0.2, 0.8]), ranks, classes, threshold)
    assert keep.tolist() == torchvision.ops.batched_nms(boxes, ranks, classes, threshold).tolist()
    assert scores[0].item() == pytest.approx(0.8 if len(keep) == 1 else 0.2)


def test_a_suppressed_box_gives_its_score_to_its_first_suppressor_alone():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 4, 10, 14], [0.0, 2, 10, 12]])
    ranks, classes = torch.tensor([0.7, 0.9, 0.5]), torch.zeros(3, dtype=torch.int64)
    keep, scores = iou_guided_nms(boxes, torch.tensor([0.3, 0.2, 0.9]), ranks, classes, 0.5)
    assert keep.tolist() == [1, 0]
    assert scores.tolist() == pytest.approx([0.9, 0.3])


def test_ranked_by_class_score_it_is_plain_nms():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(500, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 30], dim=1)
    scores, classes = torch.rand(500, generator=generator), torch.arange(500) % 4
    keep, new = iou_guided_nms(boxes, scores, scores, classes, 0.5)
    assert torch.equal(keep, batched_nms(boxes, scores, classes, 0.5)) and len(keep) < 400
    assert torch.equal(new, scores[keep])


def test_memory_stays_bounded_for_10000_boxes(monkeypatch):
    sizes, iou = [], nms._iou
    monkeypatch.setattr(
        nms, "_iou", lambda a, b: sizes.append(a[0].numel() * b[0].numel()) or iou(a, b)
    )
    corner = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0)) * 1000
    scores = torch.linspace(0, 1, 10_000)
    boxes, classes = torch.cat([corner, corner + 50], dim=1), torch.zeros(10_000, dtype=torch.int64)
    iou_guided_nms(boxes, scores, scores, classes, 0.5)
    assert 0 < max(sizes) <= nms._CPU_PAIRS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 30, 999, 1001, 3000])
def test_ordinary_boxes_are_kept_as_torchvision_keeps_them(device, count):
    """Its order too, where few values make ties, on both sides of where it changes its way."""
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 1200
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 133], dim=1)
    scores = torch.randint(1, 20, (count,), generator=generator) / 20
    classes = torch.randint(0, 80, (count,), generator=generator)
    case = [x.to(device) for x in (boxes, scores, classes)]
    assert torch.equal(batched_nms(*case, 0.5), torchvision.ops.batched_nms(*case, 0.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "names", [(0, 1, 2), (-2, -1, 0), (7, 581929, 2**60), (0, 2**24, -(2**24))]
)
@pytest.mark.parametrize("shift", [0, -18, -(2**18), 2**20])
def test_classes_never_meet_wherever_boxes_lie_and_whatever_classes_are_called(
    device, names, shift
):
    generator = torch.Generator().manual_seed(4)
    for _ in range(40):
        boxes, _, ranks, classes = random_case(generator, side=16)
        boxes, classes = boxes + shift, torch.tensor(names)[classes]
        case = [x.to(device) for x in (boxes, ranks, classes)]
        expected = algorithm_1(*[x.tolist() for x in (boxes, ranks, ranks, classes)], 0.5)
        assert batched_nms(*case, 0.5).tolist() == expected[0]
        keep, scores = iou_guided_nms(case[0], case[1], *case[1:], 0.5)
        assert (keep.tolist(), scores.tolist()) == expected


def test_a_thousand_classes_far_apart_do_not_blur_small_boxes():
    """Side by side they would take 2 million pixels, where float32 knows quarters of one."""
    corner = torch.tensor([[1.0, 1], [1333, 1333]]).repeat(1000, 1)
    boxes = torch.cat([corner, corner + torch.tensor([0.5, 0.5])], dim=1)
    boxes = torch.cat([boxes, boxes + torch.tensor([0.1, 0, 0.1, 0])])  # an IoU of 2/3
    classes = torch.arange(1000).repeat_interleave(2).repeat(2)
    assert batched_nms(boxes, torch.linspace(1, 0.5, 4000), classes, 0.6).tolist() == [*range(2000)]
    assert len(batched_nms(boxes, torch.linspace(1, 0.5, 4000), classes, 0.7)) == 4000


STRANGE = [
    *([0.0, 0, side, side] for side in (float("nan"), float("inf"), -float("inf"))),
    [float("nan")] * 4,
    [-float("inf"), -float("inf"), float("inf"), float("inf")],
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("box", STRANGE)
@pytest.mark.parametrize("score", [0.1, 1.0, float("nan")])
def test_a_box_that_is_not_finite_is_not_kept_and_changes_nothing(device, box, score):
    boxes, cls_scores, ranks, classes = random_case(torch.Generator().manual_seed(14), 16)
    others = algorithm_1(*[x.tolist() for x in (boxes, cls_scores, ranks, classes)], 0.5)
    assert len(boxes) > len(others[0]) > 10
    case = [torch.cat([boxes, torch.tensor([box])])]
    case += [torch.cat([x, torch.tensor([score])]) for x in (cls_scores, ranks)]
    case = [x.to(device) for x in (*case, torch.cat([classes, classes[:1]]))]
    keep, scores = iou_guided_nms(*case, 0.5)
    assert (keep.tolist(), scores.tolist()) == others
    assert batched_nms(case[0], *case[2:], 0.5).tolist() == others[0]
    keep, scores = soft_nms(case[0], *case[2:], "gaussian")
    expected = soft_nms(*[x[:-1] for x in (case[0], *case[2:])], "gaussian")
    assert torch.equal(keep, expected[0]) and torch.equal(scores, expected[1]) and len(keep) > 10


@pytest.mark.parametrize("device", DEVICES)
def test_a_score_that_is_not_a_number_is_not_kept_and_changes_nothing(device):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 0, 60, 9]])
    boxes = boxes.to(device)
    scores = torch.tensor([0.5, float("nan"), 0.9, 0.4], device=device)
    classes = torch.zeros(4, dtype=torch.int64, device=device)
    assert batched_nms(boxes, scores, classes, 0.5).tolist() == [2, 3]
    keep, new = iou_guided_nms(boxes, scores, torch.ones_like(scores), classes, 0.5)
    assert keep.tolist() == [0, 3] and new.tolist() == pytest.approx([0.9, 0.4])
    keep, new = iou_guided_nms(boxes, torch.ones_like(scores), scores, classes, 0.5)
    assert keep.tolist() == [2, 3] and new.tolist() == [1, 1]
    keep, new = soft_nms(boxes, scores, classes, "linear")
    assert keep.tolist() == [2, 3, 0] and new.tolist() == pytest.approx([0.9, 0.4, 0.5 * 0.2])
    assert not len(batched_nms(boxes, scores * float("nan"), classes, 0.5))


def test_half_precision_and_no_boxes():
    case = random_case(torch.Generator().manual_seed(9), 32)
    half = [case[0].half(), case[1].half(), case[2].half(), case[3]]
    keep, scores = iou_guided_nms(*half, 0.5)
    assert keep.tolist() == algorithm_1(*[x.tolist() for x in case], 0.5)[0]
    assert scores.dtype == torch.float16
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    keep, scores = iou_guided_nms(torch.zeros(0, 4), empty[0], empty[0], empty[1], 0.5)
    assert keep.shape == scores.shape == (0,) and keep.dtype == torch.int64
    keep = batched_nms(torch.zeros(0, 4), *empty, 0.5)
    assert keep.shape == (0,) and keep.dtype == torch.int64
    assert batched_nms(half[0], *half[2:], 0.5).tolist() == iou_guided_nms(*half, 0.5)[0].tolist()
    keep, scores = soft_nms(torch.zeros(0, 4), *empty, "linear")
    assert keep.shape == scores.shape == (0,) and keep.dtype == torch.int64


def test_wrong_shapes_and_methods_are_named():
    boxes, scores, classes = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rank_scores is \(3,\), not \(2,\)"):
        iou_guided_nms(boxes, scores, scores[:2], classes, 0.5)
    with pytest.raises(ValueError, match=r"classes is \(3,\), not \(2,\)"):
        batched_nms(boxes, scores, classes[:2], 0.5)
    with pytest.raises(ValueError, match=r"Boxes are \(R, 4\), not \(3, 5\)"):
        soft_nms(torch.zeros(3, 5), scores, classes, "linear")
    with pytest.raises(ValueError, match="'linear' or 'gaussian', not 'cubic'"):
        soft_nms(boxes, scores, classes, "cubic")


@pytest.mark.parametrize(("method", "code"), [("linear", 1), ("gaussian", 2)])
def test_soft_nms_equals_opencv_for_whole_pixels_and_one_class(method, code):
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        corner = torch.randint(0, 40, (30, 2), generator=generator)
        size = torch.randint(5, 30, (30, 2), generator=generator)
        scores = torch.rand(30, generator=generator)
        updated, indices = cv2.dnn.softNMSBoxes(
            torch.cat([corner, size], dim=1).tolist(), scores.tolist(), 0.001, 0.3, 0, 0.5, code
        )
        boxes = torch.cat([corner, corner + size], dim=1)
        keep, new = soft_nms(boxes, scores, torch.zeros(30, dtype=torch.int64), method)
        assert keep.tolist() == list(indices.ravel())
        torch.testing.assert_close(new, torch.from_numpy(updated).ravel())


def test_soft_nms_leaves_other_classes_alone_and_its_input_unchanged():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 10], [0.0, 0, 10, 8]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
    keep, new = soft_nms(boxes, scores, classes, "linear")
    assert keep.tolist() == [0, 1, 2]
    assert new.tolist() == pytest.approx([0.9, 0.8, 0.7 * 0.2])
    assert scores.tolist() == pytest.approx([0.9, 0.8, 0.7])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 30, 400])
def test_the_best_of_nms_are_the_first_that_it_keeps(monkeypatch, device, count):
    """Many near each other, so that the first are not enough; some without a place or score."""
    monkeypatch.setattr(nms, "_FIRST_BOXES", 1)
    generator = torch.Generator().manual_seed(count)
    corner = torch.randint(0, 30, (count, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + 20], dim=1)
    scores = torch.rand(count, generator=generator)
    boxes[::13, 2], scores[::17] = float("inf"), float("nan")
    classes = torch.randint(0, 3, (count,), generator=generator)
    case = [x.to(device) for x in (boxes, scores, classes)]
    kept = batched_nms(*case, 0.4)
    for wanted in (0, 1, 2, len(kept), len(kept) + 5):
        assert torch.equal(best_of_nms(*case, 0.4, wanted), kept[:wanted])
    assert torch.equal(best_of_nms(*case, 0.4, -1), kept)


def test_no_more_boxes_are_compared_than_it_takes(monkeypatch):
    asked, whole = [], nms.batched_nms
    monkeypatch.setattr(nms, "batched_nms", lambda *x: asked.append(len(x[0])) or whole(*x))
    corner = torch.arange(9000.0)[:, None].expand(-1, 2) * 10
    scores = torch.randperm(9000, generator=torch.Generator().manual_seed(0)) / 9000
    case = torch.cat([corner, corner + 10], dim=1), scores, torch.zeros(9000).long()
    assert len(best_of_nms(*case, 0.5, 100)) == 100 and asked == [1000]
    near = (torch.cat([corner, corner + 1000], dim=1), *case[1:])  # 2 of 100 are kept
    kept = whole(*near, 0.5)
    assert torch.equal(best_of_nms(*near, 0.5, len(kept) - 1), kept[:-1])
    assert asked[1] == 4 * (len(kept) - 1) < asked[2]
