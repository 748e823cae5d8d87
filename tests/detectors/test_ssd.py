"""SSD against torchvision's, and what every dense detector here is asked."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import nn

from checkpoint_helpers import nothing_drawn
from iou_d2 import get_config
from iou_d2.detectors.multibox_inference import SoftNMS
from iou_d2.engine.convert import translate_tensors
from iou_d2.errors import InputError
from iou_d2.ops.box_losses import KINDS
from learning import assert_learns_two_boxes

QUICK = "configs/quick/ssd_shapes.yaml"
AWARE = "configs/quick/ssd_iou_shapes.yaml"
CLASSES = 3
# The settings of torchvision's SSD300 beside those of the config for COCO.
LIKE_TORCHVISION = (
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", str(CLASSES)),
    *("MODEL.PIXEL_MEAN", "[122.99925, 116.9991, 103.9992]", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
    *("MODEL.SSD.CLIP", "sides", "MODEL.MULTIBOX.CLIP_BEFORE_NMS", "True"),
)


def copy_weights(peer: nn.Module, ours: nn.Module) -> None:
    """torchvision's weights, layer by layer; its background is the first class, ours the last."""
    convs = [x for x in peer.backbone.modules() if isinstance(x, nn.Conv2d)]
    own = [x for x in ours.backbone.modules() if isinstance(x, nn.Conv2d)]
    assert len(convs) == len(own) == 23
    pairs = list(zip(own, convs))
    pairs += zip(ours.head.bbox_pred, peer.head.regression_head.module_list)
    for to, source in pairs:
        to.load_state_dict(source.state_dict())
    ours.backbone.norms["conv4_3"].weight.data.copy_(peer.backbone.scale_weight)
    for to, source in zip(ours.head.cls_score, peer.head.classification_head.module_list):
        for name in ("weight", "bias"):
            value = getattr(source, name)
            by_class = value.reshape(-1, CLASSES + 1, *value.shape[1:]).roll(-1, dims=1)
            getattr(to, name).data.copy_(by_class.reshape(value.shape))


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    peer = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1
    )
    nn.init.uniform_(peer.backbone.scale_weight, 10, 30)
    # Untrained features are of any size: make the outputs of every level about 1.
    with torch.no_grad():
        features = list(peer.eval().backbone(make_images(1) - 120.0).values())
        for part in (peer.head.regression_head, peer.head.classification_head):
            for conv, feature in zip(part.module_list, features):
                conv.weight /= conv(feature).std(dim=None)
                nn.init.normal_(conv.bias, std=0.5)
    with nothing_drawn():
        ours = build_model(get_config("ssd300_VGG16_coco", LIKE_TORCHVISION))
    copy_weights(peer, ours)
    return peer, ours.eval()


def test_the_converter_gives_the_weights_that_are_copied_here(pair):
    peer, ours = pair
    expected = ours.state_dict()
    found = translate_tensors(peer.state_dict(), "torchvision", "detectron2").tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    back = translate_tensors(expected, "detectron2", "torchvision").tensors
    assert back.keys() == peer.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in peer.state_dict().items())


def make_images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(256, (count, 3, 10, 10), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(30, dim=2).repeat_interleave(30, dim=3)


def test_detections_are_those_of_torchvision(pair):
    peer, ours = pair
    images = make_images(1)
    with torch.no_grad():
        expected = peer(list(images / 255))
        found = ours([{"image": image} for image in images])
    for a, b in zip(found, expected):
        a = a["instances"]
        assert len(a) == len(b["scores"]) == 200
        assert len(set(a.pred_classes.tolist())) == CLASSES
        assert torch.equal(a.scores, a.scores.sort(descending=True).values)
        # Scores that are equal but for rounding may come in either order.
        far = (a.pred_boxes.tensor[:, None] - b["boxes"]).abs().amax(dim=2)
        far[a.pred_classes[:, None] != b["labels"] - 1] = torch.inf
        gap, other = far.min(dim=1)
        assert gap.max() < 1e-2 and len(other.unique()) == 200
        torch.testing.assert_close(a.scores, b["scores"][other], atol=1e-5, rtol=0)


def test_losses_are_those_of_torchvision(pair, make_batch):
    """Where each object has a best box of its own, its matching is that of Caffe."""
    peer, ours = pair
    batch = make_batch([5, 0], CLASSES, side=300)
    for entry, image in zip(batch, make_images(2)):
        entry["image"] = image
    targets = [
        {"boxes": x["instances"].gt_boxes.tensor, "labels": x["instances"].gt_classes + 1}
        for x in batch
    ]
    with torch.no_grad():
        expected = peer.train()([x["image"] / 255 for x in batch], targets)
        found = ours.train()(batch)
    peer.eval(), ours.eval()
    assert found["loss_cls"].item() == pytest.approx(expected["classification"].item(), rel=1e-5)
    assert found["loss_box"].item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-5)


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("classes", [1, 3, 80])
@pytest.mark.parametrize("config", [QUICK, AWARE])
def test_losses_are_finite_and_reach_every_parameter(
    small_cfg, make_batch, config, objects, classes
):
    model = build_model(small_cfg(config, "MODEL.RETINANET.NUM_CLASSES", str(classes))).train()
    losses = model(make_batch(objects, classes))
    assert set(losses) == {"loss_cls", "loss_box"} | ({"loss_iou"} if config == AWARE else set())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    # As in Caffe, images without objects teach nothing.
    assert all((loss > 0) == (sum(objects) > 0) for loss in losses.values())


def test_images_without_objects_teach_what_the_key_says(small_cfg, make_batch):
    key = "MODEL.MULTIBOX.NEGATIVES_WITHOUT_OBJECTS"
    model = build_model(small_cfg(QUICK, key, "6")).train()
    batch = make_batch([0])
    losses = model(batch)
    with torch.no_grad():
        images = model.preprocess_image(batch)
        logits = model.predict(images.tensor).logits[0].double()
    hardest = sorted((-logits.log_softmax(dim=1)[:, -1]).tolist())[-6:]
    assert losses["loss_cls"].item() == pytest.approx(sum(hardest), rel=1e-4)
    assert losses["loss_box"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [QUICK, AWARE])
def test_every_box_loss_trains_a_step(small_cfg, make_batch, config, kind):
    model = build_model(small_cfg(config, "MODEL.MULTIBOX.BOX_LOSS", kind)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        losses = model(make_batch([3, 1]))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_box"] > 0


@pytest.mark.parametrize("backbone", ["mobilenet", "vgg"])
def test_other_backbones(small_cfg, make_batch, backbone):
    config = {
        "mobilenet": "configs/quick/ssd_own_data.yaml",
        "vgg": "configs/ssd300_VGG16_voc.yaml",
    }[backbone]
    features = ("conv4_3", "fc7", "conv6_2")
    few = (
        *("MODEL.SSD_VGG.OUT_FEATURES", str(features), "MODEL.RETINANET.IN_FEATURES"),
        *(str(features), "MODEL.SSD.ASPECT_RATIOS", "[[2], [2, 3], [2]]"),
        *("MODEL.SSD.STEPS", "[8, 16, 32]"),
    )
    narrow = ("MODEL.MOBILENET_V2.WIDTH", "0.25")
    model = build_model(small_cfg(config, *(few if backbone == "vgg" else narrow))).train()
    losses = model(make_batch([2], side=64))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(loss > 0 for loss in losses.values())


def test_single_features_of_mobilenet_v2_without_an_fpn(small_cfg, make_batch):
    cfg = small_cfg(
        QUICK,
        *("MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone", "MODEL.BACKBONE.FREEZE_AT", "0"),
        *("MODEL.MOBILENET_V2.WIDTH", "0.25", "MODEL.MOBILENET_V2.NORM", "BN"),
        *("MODEL.MOBILENET_V2.OUT_FEATURES", "('res3', 'res4', 'res5')"),
        *("MODEL.RETINANET.IN_FEATURES", "('res3', 'res4', 'res5')"),
        *("MODEL.SSD.ASPECT_RATIOS", "[[2], [2], [2]]"),
    )
    losses = build_model(cfg).train()(make_batch([2, 1]))
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("config", [QUICK, AWARE])
def test_pixels_that_are_no_numbers_give_no_detections_or_a_loss_that_says_so(
    small_cfg, make_batch, config
):
    model = build_model(small_cfg(config, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"))
    batch = make_batch([2])
    batch[0]["image"] = torch.full((3, 96, 96), float("nan"))
    assert not torch.isfinite(sum(model.train()(batch).values()))
    with torch.no_grad():
        assert len(model.eval()(batch)[0]["instances"]) == 0


def test_images_of_odd_sizes_and_of_a_pixel(small_cfg):
    model = build_model(small_cfg(QUICK)).eval()
    sizes = [(71, 33), (1, 1), (3, 200)]
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8)} for size in sizes]
    with torch.no_grad():
        assert [x["instances"].image_size for x in model(inputs)] == sizes


def test_the_iou_changes_the_scores_as_alpha_says(small_cfg, make_batch):
    torch.manual_seed(0)
    settings = ("MODEL.IOU_RETINANET.ALPHA", "0.3", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.2")
    model = build_model(small_cfg(AWARE, *settings)).eval()
    for conv in model.head.iou_pred:
        nn.init.normal_(conv.weight, std=0.1)
    with torch.no_grad():
        found = model(make_batch([0]))[0]["instances"]
    assert len(found) > 20 and found.pred_ious.std() > 0.01
    torch.testing.assert_close(found.scores, found.cls_scores**0.3 * found.pred_ious**0.7)
    assert (found.scores > 0.2).all()
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)


def test_alpha_1_is_plain_ssd(small_cfg, make_batch):
    torch.manual_seed(0)
    settings = ("MODEL.IOU_RETINANET.ALPHA", "1.0")
    plain = build_model(small_cfg(QUICK)).eval()
    aware = build_model(small_cfg(AWARE, *settings)).eval()
    aware.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        a, b = (model(make_batch([0]))[0]["instances"] for model in (plain, aware))
    assert len(a) > 20 and torch.equal(a.scores, b.scores)
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


@pytest.mark.parametrize("flows", [True, False])
def test_target_gradient_reaches_the_box_conv_where_the_key_says_so(small_cfg, make_batch, flows):
    model = build_model(small_cfg(AWARE, "MODEL.IOU_RETINANET.IOU_TARGET_GRADIENT", str(flows)))
    for conv in model.head.iou_pred:
        nn.init.constant_(conv.bias, 1.0)
    model.train()(make_batch([4]))["loss_iou"].backward()
    gradients = [conv.weight.grad for conv in model.head.bbox_pred]
    reached = any(x is not None and x.abs().sum() > 0 for x in gradients)
    assert reached == flows
    assert any(conv.weight.grad.abs().sum() > 0 for conv in model.head.iou_pred)


def test_it_learns_two_boxes_from_scratch(small_cfg, make_batch):
    torch.manual_seed(0)
    model = build_model(small_cfg(QUICK, "MODEL.RETINANET.NUM_CLASSES", "2"))
    assert_learns_two_boxes(model, *make_batch([2], classes=2, side=128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(small_cfg, make_batch, dtype):
    model = build_model(small_cfg(AWARE)).train()
    with torch.autocast("cpu", dtype=dtype):
        losses = model(make_batch([3, 0]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("MODEL.MULTIBOX.BOX_LOSS", "l3", "BOX_LOSS is one of .*'l3'"),
        ("MODEL.MULTIBOX.IOU_THRESHOLDS", "[0.5]", "IOU_THRESHOLDS is two rising"),
        ("MODEL.RETINANET.IN_FEATURES", "('p3', 'fc7')", "'fc7'.*resnet10_fpn.*puts out p3"),
        ("MODEL.RETINANET.IN_FEATURES", "()", "IN_FEATURES is .*puts out p3"),
        ("MODEL.IOU_RETINANET.ALPHA", "2.0", "ALPHA lies in"),
    ],
)
def test_wrong_settings_are_named(small_cfg, key, value, sentence):
    with pytest.raises((InputError, ValueError), match=sentence):
        build_model(small_cfg(AWARE, key, value))


def test_soft_nms_by_key(small_cfg, make_batch):
    model = build_model(small_cfg(QUICK, "MODEL.MULTIBOX.NMS", "soft_linear")).eval()
    assert isinstance(model.nms, SoftNMS)
    with torch.no_grad():
        found = model(make_batch([0]))[0]["instances"]
    assert len(found) == 100
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
