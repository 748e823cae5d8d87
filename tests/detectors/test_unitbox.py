from __future__ import annotations

import math

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from iou_d2.detectors.dense import DenseNMS
from iou_d2.detectors.unitbox import UnitBoxHead
from iou_d2.detectors.unitbox_inference import EllipseFit, PixelNMS
from unitbox_by_hand import owner_by_hand, regression_loss_by_hand

QUICK = "configs/quick/unitbox_shapes.yaml"
VGG = "configs/unitbox_vgg16_faces.yaml"


def test_maps_are_upsampled_to_pixel_centres():
    """A map that is linear in the position of its cells' centres is so in those of the pixels."""
    head = UnitBoxHead(ShapeSpec(channels=1, stride=4), ShapeSpec(channels=1, stride=8), 2)
    for conv in (head.confidence, head.box):
        nn.init.zeros_(conv.weight)
        conv.weight.data[:, 0, 1, 1] = 1
        nn.init.zeros_(conv.bias)
    fine = (torch.arange(10) + 0.5)[None, None, None] * 4 + torch.zeros(1, 1, 7, 1)
    coarse = (torch.arange(5) + 0.5)[None, None, None] * 8 + torch.zeros(1, 1, 4, 1)
    logits, distances = head(fine, coarse, (25, 37))
    assert logits.shape == (1, 2, 25, 37) and distances.shape == (1, 4, 25, 37)
    centers = torch.arange(37) + 0.5
    torch.testing.assert_close(logits[0, 1, 9, 2:], centers[2:])
    # The box branch predicts in strides, and replicates the border beyond the outermost cells.
    torch.testing.assert_close(distances[0, 3, 9, 4:36], 8 * centers[4:36])
    assert (head(fine, -coarse, (25, 37))[1] == 0).all()


class PlantedHead(nn.Module):
    """Puts out the maps that it was given."""

    def __init__(self, logits, distances):
        super().__init__()
        self.maps = nn.ParameterList([logits, distances])

    def forward(self, confidence_feature, box_feature, size):
        logits, distances = self.maps
        assert logits.shape[-2:] == size == distances.shape[-2:]
        return logits, distances


def make_inputs(sizes, boxes, classes) -> list[dict]:
    inputs = []
    for (height, width), of_image, classes_of_image in zip(sizes, boxes, classes):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.tensor(of_image).reshape(-1, 4))
        truth.gt_classes = torch.tensor(classes_of_image, dtype=torch.int64)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        inputs.append({"image": image, "instances": truth, "height": height, "width": width})
    return inputs


UNEQUAL = make_inputs(
    [(20, 64), (40, 30), (33, 17)],
    [[[3.0, 2.5, 20.2, 18.0], [10.0, 5.0, 40.0, 15.0]], [], [[0.0, 0.0, 17.0, 30.0]]],
    [[0, 1], [], [1]],
)


@pytest.mark.parametrize("region", ["box", "ellipse"])
@pytest.mark.parametrize("kind", ["unitbox", "l2"])
def test_losses_equal_loops_over_pixels_without_padding(small_cfg, region, kind):
    cfg = small_cfg(
        QUICK,
        *("MODEL.RETINANET.NUM_CLASSES", "2", "MODEL.UNITBOX.REGION", region),
        *("MODEL.UNITBOX.BOX_LOSS", kind, "MODEL.UNITBOX.BOX_LOSS_WEIGHT", "0.5"),
        *("MODEL.UNITBOX.CONFIDENCE_LOSS_WEIGHT", "3.0"),
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.head = PlantedHead(torch.randn(3, 2, 64, 64), 1 + 9 * torch.rand(3, 4, 64, 64))
    losses = model(UNEQUAL)
    sum(losses.values()).backward()

    logits, distances = (x.detach().double().tolist() for x in model.head.maps)
    cross_entropy = box_loss = positives = pixels = 0
    for n, image in enumerate(UNEQUAL):
        boxes = image["instances"].gt_boxes.tensor.tolist()
        classes = image["instances"].gt_classes.tolist()
        for row in range(image["height"]):
            for column in range(image["width"]):
                pixels += 1
                owner = owner_by_hand(boxes, row, column, region)
                for k in range(2):
                    p = 1 / (1 + math.exp(-logits[n][k][row][column]))
                    on = owner >= 0 and classes[owner] == k
                    cross_entropy -= math.log(p if on else 1 - p)
                if owner >= 0:
                    positives += 1
                    x1, y1, x2, y2 = boxes[owner]
                    x, y = column + 0.5, row + 0.5
                    box_loss += regression_loss_by_hand(
                        [distances[n][side][row][column] for side in range(4)],
                        [y - y1, y2 - y, x - x1, x2 - x],
                        kind,
                    )
    assert losses["loss_confidence"].item() == pytest.approx(3 * cross_entropy / pixels, rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(0.5 * box_loss / positives, rel=1e-5)
    for maps in model.head.maps:
        for gradient, image in zip(maps.grad, UNEQUAL):
            gradient[:, : image["height"], : image["width"]] = 0
        assert (maps.grad == 0).all()


@pytest.mark.parametrize("inference", ["nms", "ellipses"])
def test_planted_maps_give_the_objects_at_the_size_asked_for(small_cfg, inference):
    cfg = small_cfg(QUICK, "MODEL.UNITBOX.INFERENCE", inference, "MODEL.RETINANET.NUM_CLASSES", "2")
    model = build_model(cfg).eval()
    logits = torch.full((3, 2, 64, 64), -9.0)
    distances = torch.full((3, 4, 64, 64), 3.0)
    objects = [(0, 1, (8.0, 6.0, 19.0, 17.0)), (2, 0, (1.0, 20.0, 10.0, 33.0))]
    for n, k, (x1, y1, x2, y2) in objects:
        row, column = int((y1 + y2) / 2), int((x1 + x2) / 2)
        logits[n, k, row - 1 : row + 2, column - 1 : column + 2] = 2
        logits[n, k, row, column] = 4
        x, y = column + 0.5, row + 0.5
        distances[n, :, row, column] = torch.tensor([y - y1, y2 - y, x - x1, x2 - x])
    logits[1, 0, 45:, :] = 9  # in the padding
    logits[2, 1, :, 20:] = 9
    model.head = PlantedHead(logits, distances)
    inputs = [dict(image) for image in UNEQUAL]
    inputs[0]["height"], inputs[0]["width"] = 40, 32
    with torch.no_grad():
        found = [output["instances"] for output in model(inputs)]
    assert [len(instances) for instances in found] == [1, 0, 1]
    torch.testing.assert_close(
        found[0].pred_boxes.tensor, torch.tensor([[4.0, 12.0, 9.5, 34.0]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(found[2].pred_boxes.tensor, torch.tensor([objects[1][2]]))
    assert found[0].image_size == (40, 32)
    assert [found[0].pred_classes.item(), found[2].pred_classes.item()] == [1, 0]


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("kind", ["unitbox", "giou", "ciou", "l2"])
def test_losses_are_finite_and_reach_every_parameter(small_cfg, make_batch, objects, classes, kind):
    cfg = small_cfg(
        QUICK, "MODEL.RETINANET.NUM_CLASSES", str(classes), "MODEL.UNITBOX.BOX_LOSS", kind
    )
    model = build_model(cfg).train()
    losses = model(make_batch(objects, classes))
    assert set(losses) == {"loss_confidence", "loss_box"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert (losses["loss_box"] > 0) == (sum(objects) > 0)
    assert losses["loss_confidence"] > 0


def test_an_object_smaller_than_a_pixel_is_background(small_cfg):
    model = build_model(small_cfg(QUICK)).train()
    losses = model(make_inputs([(40, 50)], [[[3.6, 3.6, 4.4, 4.4]]], [[0]]))
    assert losses["loss_box"].item() == 0 and torch.isfinite(losses["loss_confidence"])


@pytest.mark.parametrize("kind", ["unitbox", "l2"])
def test_it_learns_two_boxes_from_scratch(small_cfg, make_batch, kind):
    torch.manual_seed(0)
    weight = "1.0" if kind == "unitbox" else "0.01"
    cfg = small_cfg(QUICK, "MODEL.UNITBOX.BOX_LOSS", kind, "MODEL.UNITBOX.BOX_LOSS_WEIGHT", weight)
    model = build_model(cfg).train()
    batch = make_inputs([(64, 64)], [[[5.0, 8.0, 29.0, 25.0], [34.0, 30.0, 60.0, 63.0]]], [[0, 0]])
    batch[0]["image"][:, 8:25, 5:29] = 200
    batch[0]["image"][0, 30:63, 34:60] = 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(120):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(batch)[0]["instances"]
    best = found.pred_boxes.tensor[:2]
    best = best[best[:, 0].argsort()]
    assert (best - batch[0]["instances"].gt_boxes.tensor).abs().max() < 4


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("REGION", "circle", "'box' or 'ellipse'"),
        ("BOX_LOSS", "l3", "one of .*unitbox"),
        ("INFERENCE", "peaks", "'nms' or 'ellipses'"),
    ],
)
def test_wrong_settings_are_named(small_cfg, key, value, sentence):
    with pytest.raises(ValueError, match=f"MODEL.UNITBOX.{key} is {sentence}.*{value!r}"):
        build_model(small_cfg(QUICK, f"MODEL.UNITBOX.{key}", value))


def test_settings_of_inference_are_those_of_the_config(small_cfg):
    settings = (
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.11"),
        *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "77"),
        *("MODEL.RETINANET.NMS_THRESH_TEST", "0.44", "MODEL.UNITBOX.REGION_THRESH_TEST", "0.22"),
        *("TEST.DETECTIONS_PER_IMAGE", "33"),
    )
    nms = build_model(small_cfg(QUICK, *settings)).extract
    assert nms == PixelNMS(DenseNMS(0.11, 77, 0.44, 33))
    ellipses = build_model(small_cfg(QUICK, *settings, "MODEL.UNITBOX.INFERENCE", "ellipses"))
    assert ellipses.extract == EllipseFit(0.22, 33)


def test_a_class_beyond_those_of_the_config_is_named(small_cfg, make_batch):
    batch = make_batch([3], classes=1)
    batch[0]["instances"].gt_classes[1] = 4
    with pytest.raises(ValueError, match="class 4, but MODEL.RETINANET.NUM_CLASSES is 3"):
        build_model(small_cfg(QUICK)).train()(batch)


@pytest.mark.parametrize("inference", ["nms", "ellipses"])
def test_pictures_of_the_training_change_no_loss(inference, small_cfg, make_batch):
    batch, losses = make_batch([3, 1]), []
    with EventStorage() as storage:
        for period in ("0", "2"):
            torch.manual_seed(0)
            overrides = ("VIS_PERIOD", period, "MODEL.UNITBOX.INFERENCE", inference)
            model = build_model(small_cfg(QUICK, "MODEL.RETINANET.NUM_CLASSES", "3", *overrides))
            losses.append(model.train()(batch))
        assert losses[0] == losses[1] and len(storage._vis_data) == 1
        storage.step()
        model(batch)
    assert len(storage._vis_data) == 1


def test_a_feature_that_the_backbone_lacks_is_named(small_cfg):
    with pytest.raises(ValueError, match="conv5.*build_resnet10_fpn_backbone puts out p3, p4, p5"):
        build_model(small_cfg(QUICK, "MODEL.UNITBOX.BOX_FEATURE", "conv5"))


def test_another_fpn_and_images_of_odd_sizes(small_cfg):
    cfg = small_cfg(
        "configs/retinanet_R_50_FPN_1x.yaml",
        *("MODEL.META_ARCHITECTURE", "UnitBox", "MODEL.RESNETS.NORM", "BN"),
        *("MODEL.UNITBOX.CONFIDENCE_FEATURE", "p3", "MODEL.UNITBOX.BOX_FEATURE", "p5"),
    )
    model = build_model(cfg).train()
    inputs = make_inputs([(71, 33), (50, 101)], [[[1.0, 1.0, 30.0, 70.0]], []], [[0], []])
    assert all(torch.isfinite(loss) for loss in model(inputs).values())
    with torch.no_grad():
        sizes = [x["instances"].image_size for x in model.eval()(inputs)]
    assert sizes == [(71, 33), (50, 101)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(small_cfg, make_batch, dtype):
    model = build_model(small_cfg(QUICK)).train()
    with torch.autocast("cpu", dtype=dtype):
        losses = model(make_batch([3, 0], 1))
        maps = model.head(torch.ones(1, 32, 8, 8), torch.ones(1, 32, 4, 4), (64, 64))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    # Half precision does not tell pixels apart beyond 256 or 2048 pixels.
    assert all(x.dtype == torch.float32 for x in maps)


class ReportingCheckpointer(DetectionCheckpointer):
    """Keeps what Detectron2 only logs."""

    def _load_model(self, checkpoint):
        self.report = super()._load_model(checkpoint)
        return self.report


def test_weights_of_torchvision_load_and_only_the_head_is_new(small_cfg, tmp_path):
    model = build_model(small_cfg(VGG))
    names = [name for name in model.state_dict() if name.startswith("backbone.")]
    torch.manual_seed(1)
    # torchvision's file: a bare state dict of features.* and classifier.*.
    weights = {
        name[len("backbone.") :]: torch.randn_like(model.state_dict()[name]) for name in names
    }
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg16.pth")
    checkpointer = ReportingCheckpointer(model)
    checkpointer.load(str(tmp_path / "vgg16.pth"))
    head = [f"head.{part}.{kind}" for part in ("box", "confidence") for kind in ("bias", "weight")]
    assert sorted(checkpointer.report.missing_keys) == head
    assert checkpointer.report.unexpected_keys == ["classifier.6.bias"]
    assert len(names) == 26
    for name in names:
        assert torch.equal(model.state_dict()[name], weights[name[len("backbone.") :]]), name


def test_its_own_weights_load_again(small_cfg, make_batch, tmp_path):
    model, again = build_model(small_cfg(QUICK)).eval(), build_model(small_cfg(QUICK)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    checkpointer = ReportingCheckpointer(again)
    checkpointer.load(str(tmp_path / "model.pth"))
    assert checkpointer.report.missing_keys == checkpointer.report.unexpected_keys == []
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
