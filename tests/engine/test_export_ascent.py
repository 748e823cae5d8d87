"""The parts of IoU-Net's inference that stand in graphs, against the model's own and autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from detectron2.structures import Boxes, Instances

from exported_models import small_two_stage
from iou_d2.detectors.iou_net_inference import GradientAscent
from iou_d2.detectors.iou_net_nms import GuidedNMS, PlainNMS, SoftNMS, rank_by_product
from iou_d2.engine.export.ascent import refined
from iou_d2.engine.export.candidates import Candidates, best
from iou_d2.engine.export.guided_nms import guided_nms, plain_nms
from iou_d2.engine.export.iou_net_heads import IoUNet
from iou_d2.engine.export.pooling import PrecisePooling
from iou_d2.engine.export.predicted_iou import PredictedIoU
from iou_d2.errors import InputError
from iou_d2.ops.nms import batched_nms, iou_guided_nms

CONFIG = "configs/quick/iou_net_standalone_shapes.yaml"
SIZE = 96, 139  # height and width without padding
LIMITS = torch.tensor([[139.0, 96.0]])
KINDS = {
    "of each class": (),
    "of no class, by a sigmoid": (
        *("MODEL.IOU_NET.CLASS_AGNOSTIC", "True", "MODEL.IOU_NET.LOSS_TYPE", "bce"),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPoolLegacy"),
    ),
    "with convolutions": (
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", "2", "MODEL.ROI_BOX_HEAD.CONV_DIM", "8"),
    ),
}


def heads_of(*overrides):
    heads = small_two_stage(CONFIG, *overrides)[1].roi_heads.requires_grad_(False)
    heads.iou_branch.iou_pred.weight.data *= 0.3
    return heads


def maps_of(branch, images=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    scales = [x.spatial_scale for x in branch.pooler.level_poolers]
    sizes = [(images, 16, round(96 * scale), round(160 * scale)) for scale in scales]
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


def random_boxes(count, seed=2):
    """Of all sizes, some half or wholly out of the image or thinner than a hundredth of a pixel,
    with the numbers of their image, in order, and class."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([160.0, 110.0]) - 15
    sides = torch.rand(count, 2, generator=generator) ** 4 * 150
    boxes = torch.cat([corner, corner + sides], dim=1)
    if count:
        boxes[0] = torch.tensor([-3000.0, -2000.0, 5000.0, 4000.0])
    classes = torch.randint(3, (count,), generator=generator)
    return boxes, torch.arange(count) * 2 // max(count, 1), classes


def by_image(boxes, image):
    return [Boxes(boxes[image == number]) for number in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_autograd(kind):
    branch = heads_of(*KINDS[kind]).iou_branch.double()
    maps = maps_of(branch, dtype=torch.float64)
    boxes, image, classes = random_boxes(80)
    boxes = boxes.double()
    predict = PredictedIoU(branch)
    ious, gradient = predict.with_gradient(predict.table(maps), boxes, image, classes)

    boxes.requires_grad_()
    outputs = branch.iou_pred(branch.head(branch.pooler(maps, by_image(boxes, image))))
    one = torch.zeros_like(classes) if outputs.shape[1] == 1 else classes
    expected = branch.code.decode(outputs.gather(1, one[:, None]).squeeze(1))
    (slope,) = torch.autograd.grad(expected.sum(), boxes)
    assert slope.abs().amax(dim=0).min() > 1e-3 and expected.std() > 0.01
    torch.testing.assert_close(ious, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(predict(predict.table(maps), boxes.detach(), image, classes), ious)


def by_autograd(branch, maps, ascent, boxes, image, classes):
    """Boxes and IoUs as the detector refines them."""
    detections = [
        Instances(SIZE, pred_boxes=part, pred_classes=classes[image == number])
        for number, part in enumerate(by_image(boxes.clone(), image))
    ]
    ascent(detections, branch, maps)
    moved = torch.cat([x.pred_boxes.tensor for x in detections])
    return moved, torch.cat([x.pred_ious for x in detections])


ASCENTS = {
    "the paper's": GradientAscent(),
    "no step": GradientAscent(steps=0),
    "one step": GradientAscent(steps=1, step_size=2.0),
    "rolled back": GradientAscent(step_size=5.0, roll_back=True),
    "never stopped": GradientAscent(step_size=2.0, early_stop=0.0, max_drop=-10.0),
    "out of the image and over each other": GradientAscent(steps=1, step_size=30.0),
    "stopped at once": GradientAscent(early_stop=10.0),
    "stopped by a drop": GradientAscent(step_size=8.0, early_stop=0.0, max_drop=-0.001),
}


@pytest.mark.parametrize("kind", ("of each class", "of no class, by a sigmoid"))
@pytest.mark.parametrize("name", ASCENTS)
def test_ascent_ends_where_that_of_autograd_does(kind, name):
    branch = heads_of(*KINDS[kind]).iou_branch
    maps, ascent, predict = maps_of(branch), ASCENTS[name], PredictedIoU(branch)
    boxes, image, classes = random_boxes(300)
    found = refined(predict, ascent, predict.table(maps), boxes, image, classes, LIMITS)
    expected = by_autograd(branch, maps, ascent, boxes, image, classes)
    start = by_autograd(branch, maps, GradientAscent(steps=0), boxes, image, classes)[0]
    # Of those that move at all; those outside of the image cannot.
    moved = (expected[0] - start).abs().amax(dim=1)
    assert (moved > 0.1).sum() > 50 or ascent.steps == 0
    # In a thinner one the mean and the edges, of which the gradient is made, differ by less than
    # float32 rounds them: 2e-5 px wide, its slope is off by a tenth.
    wide = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) > 1e-3
    assert wide.sum() > 250
    assert (found[0] - expected[0])[wide].abs().max() < 1e-3
    torch.testing.assert_close(found[1][wide], expected[1][wide], rtol=0, atol=1e-4)


def test_no_boxes_are_refined_to_none():
    branch = heads_of().iou_branch
    predict = PredictedIoU(branch)
    boxes, image, classes = random_boxes(0)
    table = predict.table(maps_of(branch))
    moved, ious = refined(predict, GradientAscent(), table, boxes, image, classes, LIMITS)
    assert moved.shape == (0, 4) and ious.shape == (0,)


@pytest.mark.parametrize("count", (0, 1, 150))
@pytest.mark.parametrize("threshold", (0.0, 0.3, 0.7, 1.0))
def test_nms_is_that_of_the_detector(count, threshold):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        corner = torch.rand(count, 2, generator=generator) * 60
        sides = torch.rand(count, 2, generator=generator) * 40 + 5
        boxes = torch.cat([corner, corner + sides], dim=1)
        scores = torch.rand(count, generator=generator)
        # With ties, and under 0, as predicted IoUs may be.
        ranks = (torch.rand(count, generator=generator) * 50).round() / 50 - 0.3
        ranks[5:7] = torch.nan
        groups = torch.randint(4, (count,), generator=generator)
        keep, new = guided_nms(boxes, scores, ranks, groups, 4, threshold)
        expected = iou_guided_nms(boxes, scores, ranks, groups, threshold)
        assert torch.equal(keep, expected[0]) and torch.equal(new, expected[1])
        keep, new = plain_nms(boxes, ranks, groups, 4, threshold)
        expected = batched_nms(boxes, ranks, groups, threshold)
        assert torch.equal(keep, expected) and torch.equal(new, ranks[keep])


def random_candidates(images, count):
    """Of which a third and, of a second image, all are none."""
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(images, count, 2, generator=generator) * torch.tensor([100.0, 70.0])
    sides = torch.rand(images, count, 2, generator=generator) ** 2 * 60 + 3
    boxes = torch.minimum(torch.cat([corner, corner + sides], dim=2), LIMITS.repeat(1, 2))
    scores = torch.rand(images, count, generator=generator)
    scores = torch.where(scores < 0.3, torch.zeros_like(scores), scores)
    scores[1:2] = 0
    classes = torch.randint(3, (images, count), generator=generator)
    return Candidates(boxes, scores, classes, {})


CHANGES = {
    "as it is": {},
    "by the product": {"score_times_iou": True, "nms": GuidedNMS(0.5, rank_by_product)},
    "by the score": {"nms": GuidedNMS(0.5, None), "max_detections": 7},
    "plain": {"nms": PlainNMS(0.4), "max_detections": -1},
    "not moved": {"refiner": None},
}


@pytest.mark.parametrize("change", CHANGES)
def test_detections_are_those_of_the_postprocessor(change):
    heads = heads_of()
    branch = heads.iou_branch
    postprocessor = dataclasses.replace(heads.postprocessor, **CHANGES[change])
    for images, count in ((3, 60), (1, 5), (2, 1)):
        given, maps = random_candidates(images, count), maps_of(branch, images)
        found = detections_of_graph(heads, postprocessor, given, maps)
        expected = postprocessor([instances_of(given, i) for i in range(images)], branch, maps)
        for i, detections in enumerate(expected):
            length = len(detections)
            assert (found.scores[i] > 0).sum() == length and (length > 0 or i == 1)
            values = {
                "scores": (found.scores, detections.scores),
                "classes": (found.classes, detections.pred_classes),
                "boxes": (found.boxes, detections.pred_boxes.tensor),
                "cls_scores": (found.fields["cls_scores"], detections.cls_scores),
                "pred_ious": (found.fields["pred_ious"], detections.pred_ious),
            }
            for name, (ours, theirs) in values.items():
                tolerance = 1e-3 if name == "boxes" else 1e-5
                torch.testing.assert_close(ours[i, :length], theirs, rtol=0, atol=tolerance)
                assert not (ours[i, length:] > 0).any()


def detections_of_graph(heads, postprocessor, given, maps):
    heads.postprocessor = postprocessor
    graph, pooling = IoUNet(heads), PrecisePooling(heads.box_pooler, maps)
    found = graph.detect(graph.with_ious(given, pooling), SIZE, pooling)
    return best(found, found.scores.shape[1])


def instances_of(candidates, image):
    there = candidates.scores[image] > 0
    return Instances(
        SIZE,
        pred_boxes=Boxes(candidates.boxes[image, there]),
        scores=candidates.scores[image, there],
        pred_classes=candidates.classes[image, there],
    )


def test_what_has_no_graph_is_named():
    heads = heads_of()
    soft = dataclasses.replace(heads.postprocessor, nms=SoftNMS("linear", 0.5))
    with pytest.raises(InputError, match="SoftNMS is a loop .* set MODEL.IOU_NET.NMS"):
        detections_of_graph(heads, soft, None, None)
    norm = ("MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32")
    with pytest.raises(InputError, match="MODEL.ROI_BOX_HEAD.NORM"):
        PredictedIoU(heads_of(*norm, "MODEL.ROI_BOX_HEAD.NUM_CONV", "1").iou_branch)
    unrefined = ("MODEL.IOU_NET.REFINE_STEPS", "0", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")
    with pytest.raises(InputError, match="MODEL.ROI_BOX_HEAD.POOLER_TYPE 'PrRoIPool'"):
        PredictedIoU(heads_of(*unrefined).iou_branch)
    branch = heads.iou_branch
    branch.code = dataclasses.replace(branch.code, decode=torch.exp)
    with pytest.raises(InputError, match="knows no derivative"):
        PredictedIoU(branch)
