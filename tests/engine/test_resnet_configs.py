"""The configs of ResNet-18, 34 and 152: each builds, and takes torchvision's weights by name."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from checkpoint_helpers import nothing_drawn
from iou_d2 import get_config
from iou_d2.engine.pretrained import check_pretrained, load_pretrained

METHODS = ("retinanet", "faster_rcnn", "vfnet")
# Blocks of each stage, and channels of the last one (arXiv 1512.03385, Table 1).
RESNETS = {18: ((2, 2, 2, 2), 512), 34: ((3, 4, 6, 3), 512), 152: ((3, 8, 36, 3), 2048)}


def stages_of(peer, images):
    """torchvision's own features, the stem's first."""
    features = [peer.maxpool(peer.relu(peer.bn1(peer.conv1(images))))]
    for stage in (peer.layer1, peer.layer2, peer.layer3, peer.layer4):
        features.append(stage(features[-1]))
    return features


@pytest.mark.parametrize(("depth", "method"), zip(RESNETS, METHODS))
def test_features_are_torchvisions(publish, depth, method):
    """Of one method each: the backbones of the others are the same, as below."""
    peer = publish(f"resnet{depth}")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = stages_of(peer, images)
    blocks, channels = RESNETS[depth]
    cfg = get_config(f"{method}_R_{depth}_FPN_1x", ["MODEL.DEVICE", "cpu"])
    check_pretrained(cfg)
    with nothing_drawn():
        model = build_model(cfg).eval()
    loaded = load_pretrained(model, cfg.MODEL.WEIGHTS)
    net = model.backbone.bottom_up
    names = {f"backbone.bottom_up.{name}" for name in net.state_dict()}
    assert {x for x in loaded if "num_batches" not in x} == names
    assert tuple(len(getattr(net, f"res{i}")) for i in (2, 3, 4, 5)) == blocks
    with torch.no_grad():
        found = net(images)
    assert found["res5"].shape[1] == channels
    for name, feature in found.items():
        theirs = expected[int(name[3:]) - 1]
        assert theirs.std() > 1e-3
        torch.testing.assert_close(feature, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_backbone_differs_from_resnet_50s(method):
    plain = get_config(f"{method}_R_50_FPN_1x")
    backbone = {"DEPTH", "STRIDE_IN_1X1", "RES2_OUT_CHANNELS"}
    for depth in RESNETS:
        cfg = get_config(f"{method}_R_{depth}_FPN_1x")
        assert cfg.MODEL.WEIGHTS == f"torchvision://resnet{depth}"
        first = get_config(f"{METHODS[0]}_R_{depth}_FPN_1x").MODEL.RESNETS
        assert all(cfg.MODEL.RESNETS[key] == first[key] for key in backbone)
        assert {k for k, v in cfg.MODEL.RESNETS.items() if v != plain.MODEL.RESNETS[k]} <= backbone
        for key in ("WEIGHTS", "PIXEL_MEAN", "PIXEL_STD", "RESNETS"):
            cfg.MODEL[key] = plain.MODEL[key]
        cfg.INPUT.FORMAT, cfg.OUTPUT_DIR = plain.INPUT.FORMAT, plain.OUTPUT_DIR
        assert cfg == plain
