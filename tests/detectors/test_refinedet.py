"""RefineDet against loops over its definition, and what every dense detector here is asked."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, Instances
from torch import nn

from iou_d2 import get_config
from iou_d2.detectors.multibox_inference import SoftNMS
from iou_d2.detectors.refinedet import RefineDetPrediction, TransferBlock
from iou_d2.errors import InputError
from iou_d2.ops.box_losses import KINDS
from learning import assert_learns_two_boxes
from multibox_by_hand import decode_by_hand, loss_by_hand

QUICK = "configs/quick/refinedet_shapes.yaml"
LOSSES = {"loss_arm_cls", "loss_arm_box", "loss_odm_cls", "loss_odm_box"}


@pytest.fixture
def model(small_cfg):
    torch.manual_seed(0)
    return build_model(small_cfg(QUICK, "MODEL.REFINEDET.CHANNELS", "16"))


@pytest.mark.parametrize(("config", "side", "count"), [("320", 320, 6375), ("512", 512, 16320)])
def test_anchors_are_those_of_loops(config, side, count):
    cfg = get_config(f"refinedet{config}_VGG16_voc")
    with torch.device("meta"):
        shapes = build_backbone(cfg, ShapeSpec(channels=3)).output_shape().values()
    assert [shape.stride for shape in shapes] == [8, 16, 32, 64]
    expected, features = [], []
    for step in (8, 16, 32, 64):
        cells = side // step
        features.append(torch.zeros(1, 1, cells, cells))
        for row in range(cells):
            for column in range(cells):
                x, y, size = (column + 0.5) * step, (row + 0.5) * step, 4 * step
                for ratio in (1, 2, 0.5):  # width / height
                    w, h = size * math.sqrt(ratio), size / math.sqrt(ratio)
                    expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    found = Boxes.cat(build_anchor_generator(cfg, list(shapes))(features)).tensor
    assert len(found) == count
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def random_predictions(generator: torch.Generator, images: int, boxes: int, classes: int):
    corner = torch.rand(boxes, 2, generator=generator) * 60
    sides = 8 + torch.rand(boxes, 2, generator=generator) * 30
    return RefineDetPrediction(
        Boxes(torch.cat([corner, corner + sides], dim=1)),
        torch.randn(images, boxes, 2, generator=generator) * 4,
        torch.randn(images, boxes, 4, generator=generator),
        torch.randn(images, boxes, classes + 1, generator=generator),
        torch.randn(images, boxes, 4, generator=generator),
    )


def random_truth(generator: torch.Generator, count: int, classes: int) -> Instances:
    corner = torch.rand(count, 2, generator=generator) * 60
    sides = 10 + torch.rand(count, 2, generator=generator) * 25
    return Instances(
        (100, 100),
        gt_boxes=Boxes(torch.cat([corner, corner + sides], dim=1)),
        gt_classes=torch.randint(classes, (count,), generator=generator),
    )


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_of_loops_over_refined_anchors_and_hard_negatives(model, seed):
    generator = torch.Generator().manual_seed(seed)
    predictions = random_predictions(generator, 3, 90, 3)
    truths = [random_truth(generator, count, 3) for count in (3, 0, 5)]
    found = model.losses(predictions, [(100, 100)] * 3, truths)

    anchors = predictions.anchors.tensor.double().tolist()
    refined = torch.tensor(
        [
            [decode_by_hand(box, deltas) for box, deltas in zip(anchors, image)]
            for image in predictions.arm_deltas.double().tolist()
        ]
    )
    scores = predictions.arm_logits.double().tolist()
    objectness = [[1 / (1 + math.exp(b - a)) for a, b in image] for image in scores]
    usable = [[p >= 0.01 for p in image] for image in objectness]
    assert 10 < sum(not x for image in usable for x in image) < 100
    one_class = [
        Instances(x.image_size, gt_boxes=x.gt_boxes, gt_classes=torch.zeros(len(x)).long())
        for x in truths
    ]
    arm = loss_by_hand(
        predictions.anchors.tensor.expand(3, -1, -1),
        predictions.arm_logits,
        predictions.arm_deltas,
        one_class,
    )
    odm = loss_by_hand(refined, predictions.logits, predictions.deltas, truths, usable=usable)
    unfiltered = loss_by_hand(refined, predictions.logits, predictions.deltas, truths)
    assert odm[0] != pytest.approx(unfiltered[0], rel=1e-4) and odm[1:] == unfiltered[1:]
    assert odm[1] != pytest.approx(arm[1], rel=0.01) and min(odm[2], arm[2]) > 7
    for step, (cls, box, count) in (("arm", arm), ("odm", odm)):
        assert found[f"loss_{step}_cls"].item() == pytest.approx(cls / count, rel=1e-4)
        assert found[f"loss_{step}_box"].item() == pytest.approx(box / count, rel=1e-4)


def test_an_object_is_learnt_however_low_the_objectness_is(model):
    generator = torch.Generator().manual_seed(0)
    predictions = random_predictions(generator, 1, 40, 3)
    truth = random_truth(generator, 3, 3)
    sure = predictions.arm_logits.clone()
    sure[..., 0], sure[..., 1] = -9.0, 9.0
    predictions = predictions._replace(arm_logits=sure)
    refined = model.refined_anchors(predictions)
    assignment = model.odm_loss.assign(refined, [truth], 3)
    filtered = model.without_easy_negatives(assignment, predictions)
    positive = assignment.positive(3)
    assert positive.sum() >= 3
    assert torch.equal(filtered.labels[positive], assignment.labels[positive])
    assert (filtered.labels[~positive] == -1).all()


def test_no_gradient_of_the_second_step_reaches_the_first(model, make_batch):
    model.train()
    losses = model(make_batch([3, 1]))
    (losses["loss_odm_cls"] + losses["loss_odm_box"]).backward()
    for part in (model.head.arm_score, model.head.arm_bbox):
        assert all(x.grad is None or not x.grad.any() for x in part.parameters())
    assert all(x.grad.any() for x in model.head.transfer.parameters())
    assert any(x.grad.any() for x in model.backbone.parameters())


def test_a_transfer_block_is_what_its_weights_say():
    torch.manual_seed(0)
    block = TransferBlock(3, 4, is_coarsest=False)
    x, coarser = torch.randn(1, 3, 5, 7), torch.randn(1, 4, 3, 4)
    inner = block.conv2(block.conv1(x).clamp(min=0))
    for row in range(5):
        for column in range(7):
            # A 2 x 2 deconvolution of stride 2 is a linear map of the cell above.
            tap = block.up.weight[:, :, row % 2, column % 2]
            inner[0, :, row, column] += coarser[0, :, row // 2, column // 2] @ tap + block.up.bias
    expected = block.conv3(inner.clamp(min=0)).clamp(min=0)
    torch.testing.assert_close(block(x, coarser), expected, rtol=1e-4, atol=1e-5)
    coarsest = TransferBlock(3, 4, is_coarsest=True)
    assert coarsest.up is None
    expected = F.relu(coarsest.conv3(F.relu(coarsest.conv2(F.relu(coarsest.conv1(x))))))
    torch.testing.assert_close(coarsest(x, None), expected)


def test_detections_go_two_steps_from_an_anchor(model):
    generator = torch.Generator().manual_seed(0)
    predictions = random_predictions(generator, 2, 30, 3)
    found = model.detect(predictions, [(100, 100)] * 2)
    for image, instances in enumerate(found):
        expected = {}
        for i, anchor in enumerate(predictions.anchors.tensor.double().tolist()):
            a, b = predictions.arm_logits[image, i].double().tolist()
            if 1 / (1 + math.exp(b - a)) < 0.01:
                continue
            box = decode_by_hand(anchor, predictions.arm_deltas[image, i].double().tolist())
            box = decode_by_hand(box, predictions.deltas[image, i].double().tolist())
            for k, score in enumerate(predictions.logits[image, i].double().softmax(0)[:-1]):
                expected[round(score.item(), 6)] = (k, box)
        assert 10 < len(instances) < len(expected) < 90
        for score, k, box in zip(
            instances.scores.tolist(), instances.pred_classes.tolist(), instances.pred_boxes
        ):
            wanted = min(expected, key=lambda x: abs(x - score))
            assert score == pytest.approx(wanted, abs=2e-6)
            assert expected[wanted][0] == k
            assert box.tolist() == pytest.approx(expected[wanted][1], abs=1e-3)


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("classes", [1, 3, 80])
def test_losses_are_finite_and_reach_every_parameter(small_cfg, make_batch, objects, classes):
    model = build_model(small_cfg(QUICK, "MODEL.RETINANET.NUM_CLASSES", str(classes))).train()
    losses = model(make_batch(objects, classes))
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all((loss > 0) == (sum(objects) > 0) for loss in losses.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_box_loss_trains_a_step(small_cfg, make_batch, kind):
    model = build_model(small_cfg(QUICK, "MODEL.MULTIBOX.BOX_LOSS", kind)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        losses = model(make_batch([3, 1]))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("side", [64, 97])
def test_its_vgg_trains_on_images_of_any_size(small_cfg, make_batch, side):
    cfg = small_cfg("configs/refinedet320_VGG16_voc.yaml", "MODEL.REFINEDET.CHANNELS", "8")
    model = build_model(cfg).train()
    losses = model(make_batch([2], side=side))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_pixels_that_are_no_numbers_give_no_detections_or_a_loss_that_says_so(model, make_batch):
    batch = make_batch([2])
    batch[0]["image"] = torch.full((3, 96, 96), float("nan"))
    with torch.no_grad():
        assert not torch.isfinite(model.train()(batch)["loss_arm_cls"])
        assert len(model.eval()(batch)[0]["instances"]) == 0


def test_images_of_odd_sizes_and_of_a_pixel(model):
    sizes = [(71, 33), (1, 1), (3, 200)]
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8)} for size in sizes]
    with torch.no_grad():
        assert [x["instances"].image_size for x in model.eval()(inputs)] == sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(model, make_batch, dtype):
    model.train()
    with torch.autocast("cpu", dtype=dtype):
        losses = model(make_batch([3, 0]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_it_learns_two_boxes_from_scratch(small_cfg, make_batch):
    torch.manual_seed(0)
    model = build_model(small_cfg(QUICK, "MODEL.RETINANET.NUM_CLASSES", "2"))
    assert_learns_two_boxes(model, *make_batch([2], classes=2, side=128))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("MODEL.REFINEDET.ARM_IOU_THRESHOLDS", "[0.7]", "REFINEDET.ARM_IOU_THRESHOLDS is two"),
        ("MODEL.REFINEDET.MIN_OBJECTNESS", "1.5", "MIN_OBJECTNESS lies in"),
        ("MODEL.RETINANET.IN_FEATURES", "('fc7',)", "'fc7'.*resnet10_fpn.*puts out p3"),
    ],
)
def test_wrong_settings_are_named(small_cfg, key, value, sentence):
    with pytest.raises(InputError, match=sentence):
        build_model(small_cfg(QUICK, key, value))


def test_settings_are_those_of_the_config(small_cfg):
    model = build_model(
        small_cfg(
            QUICK,
            *("MODEL.MULTIBOX.NMS", "soft_linear", "MODEL.RETINANET.NMS_THRESH_TEST", "0.3"),
            *("MODEL.REFINEDET.ARM_IOU_THRESHOLDS", "[0.3, 0.7]"),
            *("MODEL.REFINEDET.MIN_OBJECTNESS", "0.05"),
        )
    )
    assert model.nms == SoftNMS(0.01, 400, 0.3, 100, "linear")
    assert (model.arm_loss.matcher.negative, model.arm_loss.matcher.positive) == (0.3, 0.7)
    assert (model.odm_loss.matcher.negative, model.odm_loss.matcher.positive) == (0.5, 0.5)
    assert model.min_objectness == 0.05
    assert isinstance(model.head.transfer, nn.ModuleList)
