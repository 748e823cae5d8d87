"""FCOS of torchvision and of Detectron2's main branch, number for number, through the converter."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from iou_d2.engine.convert import translate
from peers import assert_detections, assert_gradients, converted, randomize

# Two channels a group of the norms: with one, biases before them have no gradient.
CHANNELS, CLASSES = 64, 7
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", str(CHANNELS)),
    *("MODEL.RETINANET.NUM_CLASSES", str(CLASSES)),
)
SIZES = [(256, 320), (224, 288)]


class ThinResNet(ResNet):
    """torchvision's ResNet with an eighth of the channels behind the stem."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def torchvision_fcos() -> FCOS:
    resnet = ThinResNet(Bottleneck, (3, 4, 6, 3), norm_layer=FrozenBatchNorm2d)
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    top = LastLevelP6P7(CHANNELS, CHANNELS)
    backbone = BackboneWithFPN(resnet, layers, [64, 128, 256], CHANNELS, top)
    return randomize(FCOS(backbone, num_classes=CLASSES, min_size=256, max_size=320))


def inputs():
    """Images and ground truth of two sizes, whose boxes end at limits of the levels, too."""
    generator = torch.Generator().manual_seed(1)
    batch = []
    for height, width in SIZES:
        corner = torch.rand(6, 2, generator=generator) * 120
        size = 10 + torch.rand(6, 2, generator=generator) ** 2 * 100
        boxes = torch.cat([corner, corner + size], dim=1)
        # From the point (64, 64) the right side is at 64, the limit of the first two levels.
        boxes[0] = torch.tensor([40.0, 40.0, 128.0, 100.0])
        boxes[1] = torch.tensor([44.0, 40.0, 132.0, 100.0])  # the same from (68, 68)
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(boxes)
        truth.gt_classes = torch.randint(CLASSES, (6,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": truth, "height": height, "width": width})
    return batch


def spread_scores(state: dict, cls: str, box: str) -> None:
    """Classes that differ, and boxes of which some have no area."""
    state[f"{cls}.weight"] *= 4
    state[f"{box}.weight"] *= 6
    state[f"{box}.bias"] -= 0.3


def of_our_head(names: dict[str, str], gradients) -> dict[str, torch.Tensor]:
    return {names[name]: x for name, x in gradients.items() if names[name].startswith("head.")}


def test_torchvision(tmp_path, capsys):
    peer = torchvision_fcos()
    spread_scores(
        peer.state_dict(), "head.classification_head.cls_logits", "head.regression_head.bbox_reg"
    )
    peer.score_thresh = 0.55
    options = [*SMALL, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.55"]
    config = "configs/torchvision/fcos_R_50_FPN.yaml"
    model = converted(tmp_path, capsys, peer.state_dict(), "torchvision", config, options)
    batch = inputs()
    images = [x["image"].float() / 255 for x in batch]
    # Images of both are at the size that their networks see.
    peer.transform.resize = lambda image, target: (image, target)
    targets = [
        {"boxes": x["instances"].gt_boxes.tensor, "labels": x["instances"].gt_classes}
        for x in batch
    ]
    expected = peer.train()(images, targets)
    sum(expected.values()).backward()
    found = model.train()(batch)
    sum(found.values()).backward()
    for theirs, ours in (
        ("classification", "loss_cls"),
        ("bbox_regression", "loss_box"),
        ("bbox_ctrness", "loss_quality"),
    ):
        assert found[ours].item() == pytest.approx(expected[theirs].item(), rel=1e-4)
    names = translate(list(peer.state_dict()), "torchvision", "detectron2")
    gradients = {n: x.grad for n, x in peer.named_parameters() if x.grad is not None}
    assert_gradients(model, of_our_head(names, gradients))

    with torch.no_grad():
        expected, found = peer.eval()(images), model.eval()(batch)
    for a, b in zip(found, expected):
        # Detectron2 leaves boxes without area out of what a model gives.
        area = (b["boxes"][:, 2:] > b["boxes"][:, :2]).all(dim=1)
        assert len(area) == 100 and not area.all()
        assert_detections(a["instances"], b["boxes"][area], b["scores"][area], b["labels"][area])


def test_detectron2_main(tmp_path, capsys):
    fcos = pytest.importorskip(
        "detectron2.modeling.meta_arch.fcos", reason="Only Detectron2's main branch has FCOS."
    )
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import FPN, BasicStem
    from detectron2.modeling.backbone import ResNet as Detectron2ResNet
    from detectron2.modeling.backbone.fpn import LastLevelP6P7 as Detectron2P6P7
    from detectron2.modeling.backbone.resnet import BottleneckBlock

    stages, in_channels = [], 64
    for index, blocks in enumerate((3, 4, 6, 3)):
        stages.append(
            Detectron2ResNet.make_stage(
                BottleneckBlock,
                blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                in_channels=in_channels,
                out_channels=32 * 2**index,
                bottleneck_channels=8 * 2**index,
                norm="FrozenBN",
                stride_in_1x1=True,
            )
        )
        in_channels = 32 * 2**index
    levels = ["res3", "res4", "res5"]
    bottom_up = Detectron2ResNet(BasicStem(norm="FrozenBN"), stages, out_features=levels)
    backbone = FPN(bottom_up, levels, CHANNELS, top_block=Detectron2P6P7(CHANNELS, CHANNELS, "p5"))
    head = fcos.FCOSHead(
        input_shape=[ShapeSpec(channels=CHANNELS)] * 5,
        num_classes=CLASSES,
        conv_dims=[CHANNELS] * 4,
        prior_prob=0.01,
        norm="GN",
    )
    peer = randomize(
        fcos.FCOS(
            backbone=backbone,
            head=head,
            head_in_features=["p3", "p4", "p5", "p6", "p7"],
            num_classes=CLASSES,
            pixel_mean=[103.53, 116.28, 123.675],
            pixel_std=[1.0, 1.0, 1.0],
        )
    )
    spread_scores(peer.state_dict(), "head.cls_score", "head.bbox_pred")
    config = "configs/detectron2/fcos_R_50_FPN.yaml"
    model = converted(tmp_path, capsys, peer.state_dict(), "detectron2_main", config, SMALL)
    batch = inputs()
    with EventStorage() as storage:
        expected = peer.train()(batch)
        positives = storage.latest()["num_pos_anchors"][0] * len(batch)
    sum(expected.values()).backward()
    found = model.train()(batch)
    sum(found.values()).backward()
    # Theirs are divided by a running mean.
    ratio = (0.9 * 300 + 0.1 * positives) / positives
    for theirs, ours in (
        ("loss_fcos_cls", "loss_cls"),
        ("loss_fcos_loc", "loss_box"),
        ("loss_fcos_ctr", "loss_quality"),
    ):
        assert found[ours].item() == pytest.approx(expected[theirs].item() * ratio, rel=1e-4)
    names = translate(list(peer.state_dict()), "detectron2_main", "detectron2")
    gradients = {n: x.grad * ratio for n, x in peer.named_parameters() if x.grad is not None}
    assert_gradients(model, of_our_head(names, gradients))

    with torch.no_grad():
        expected, found = peer.eval()(batch), model.eval()(batch)
    for a, b in zip(found, expected):
        b = b["instances"]
        assert_detections(a["instances"], b.pred_boxes.tensor, b.scores, b.pred_classes)
