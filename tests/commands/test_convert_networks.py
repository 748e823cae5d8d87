"""The networks behind `iou-d2 convert`: the same outputs on both sides, and back bit for
bit. Small networks of random weights."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from checkpoint_helpers import CONFIG, DEFORMABLE, SMALL, assert_same, read
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert


def randomize(model):
    """Every parameter and statistic at random, so that none can be taken for another."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            spread = torch.rand(x.shape, generator=generator) - (name[-3:] != "var") * 0.5
            x.copy_(spread * 2 / max(1, x[0].numel()) ** 0.5 if x.ndim == 4 else spread + 0.1)
    return model.eval()


class Packed(torchvision.ops.DeformConv2d):
    """mmcv's ModulatedDeformConv2dPack on torchvision's module: names and layout."""

    def __init__(self, conv):
        super().__init__(
            *(conv.in_channels, conv.out_channels, 3),
            stride=conv.stride,
            padding=1,
            groups=conv.groups,
            bias=False,
        )
        self.conv_offset = nn.Conv2d(conv.in_channels, 27, 3, stride=conv.stride, padding=1)

    def forward(self, x):
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        return super().forward(x, torch.cat([first, second], dim=1), mask.sigmoid())


class ThinResNet(ResNet):
    """torchvision's ResNet with an eighth of the channels behind the stem."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def torchvision_resnet(groups, deformable=False):
    """ResNet-50, with groups ResNeXt-50, of 8 channels in the first 3x3 convolutions."""
    width = 64 if groups == 1 else 64 // groups
    model = ThinResNet(
        Bottleneck, (3, 4, 6, 3), num_classes=7, groups=groups, width_per_group=width
    )
    assert model.layer1[0].conv2.out_channels == 8
    if deformable:
        for module in (*model.layer2, *model.layer3, *model.layer4):
            module.conv2 = Packed(module.conv2)
    return randomize(model)


def features(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    found = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        found.append(x)
    return found


def detectron2_resnet(path, depth, groups=1, deformable=False):
    """The ResNet of Detectron2 with the weights in `path`; all have to be there."""
    cfg = get_cfg()
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.NUM_GROUPS, node.WIDTH_PER_GROUP = depth, groups, 8 // groups
    node.RES2_OUT_CHANNELS = 64 if depth == 18 else 32
    node.STRIDE_IN_1X1 = False
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if deformable:
        node.DEFORM_ON_PER_STAGE, node.DEFORM_MODULATED = [False, True, True, True], True
        cfg.MODEL.BACKBONE.NAME = "build_deformable_resnet_fpn_p6p7_backbone"
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    fpn = nn.Module()
    fpn.backbone = build_backbone(cfg, ShapeSpec(channels=3))
    before = {name: x.clone() for name, x in fpn.state_dict().items()}
    DetectionCheckpointer(fpn).load(str(path))
    kept = [n for n, x in fpn.state_dict().items() if "bottom_up" in n and x.equal(before[n])]
    assert not kept, kept
    return fpn.backbone.bottom_up.eval()


@pytest.mark.parametrize(
    ("depth", "groups", "suffix"),
    [(18, 1, "pth"), (50, 1, "pth"), (50, 1, "pkl"), (50, 4, "pth"), (50, 8, "pkl")],
)
def test_a_torchvision_resnet_is_the_same_in_detectron2(tmp_path, capsys, depth, groups, suffix):
    if depth == 18:
        model = randomize(ResNet(BasicBlock, (2, 2, 2, 2), num_classes=7))
    else:
        model = torchvision_resnet(groups)
    source, ours, back = (tmp_path / name for name in ("a.pth", f"b.{suffix}", "c.pth"))
    torch.save(model.state_dict(), source)
    convert([str(source), str(ours), "--from", "torchvision", "--to", "detectron2"])
    printed = capsys.readouterr().out
    assert "Left over" not in printed and "INPUT.FORMAT RGB" in printed

    x = torch.randn(1, 3, 64, 96)
    resnet = detectron2_resnet(ours, depth, groups)
    with torch.no_grad():
        for mine, theirs in zip(resnet(x).values(), features(model, x)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

    convert([str(ours), str(back), "--from", "detectron2", "--to", "torchvision"])
    assert_same(read(back), model.state_dict())
    model.load_state_dict(read(back))


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_deformable_resnext_of_mmdetection_is_the_same_in_detectron2(tmp_path, order):
    model = torchvision_resnet(groups=4, deformable=True)
    state = {f"backbone.{n}": x for n, x in model.state_dict().items() if n[:3] != "fc."}
    source, ours, back = (str(tmp_path / name) for name in ("a.pth", "b.pth", "c.pth"))
    torch.save({"state_dict": state, "meta": {}}, source)
    convert([source, ours, "--from", "mmdet", "--to", "detectron2", "--format", order])

    x = torch.randn(1, 3, 64, 96)
    resnet = detectron2_resnet(ours, 50, groups=4, deformable=True)
    with torch.no_grad():
        mine = resnet(x if order == "RGB" else x[:, [2, 1, 0]])
        for name, theirs in zip(mine, features(model, x)):
            torch.testing.assert_close(mine[name], theirs, rtol=1e-4, atol=1e-4)

    convert([ours, back, "--from", "detectron2", "--to", "mmdet", "--format", order])
    assert_same(read(back)["state_dict"], state)


def mmdet_vfnet_names(blocks=(3, 4, 6, 3), deformable=False):
    """Every name in mmdetection's VFNet, by hand."""
    norm = ("weight", "bias", "running_mean", "running_var")
    names = ["conv1.weight", *(f"bn1.{x}" for x in norm)]
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            here = f"layer{stage}.{block}"
            for i in (1, 2, 3):
                names += [f"{here}.conv{i}.weight", *(f"{here}.bn{i}.{x}" for x in norm)]
            if block == 0:
                names += [f"{here}.downsample.0.weight"]
                names += [f"{here}.downsample.1.{x}" for x in norm]
            if deformable and stage > 1:
                names += [f"{here}.conv2.conv_offset.{x}" for x in norm[:2]]
    names = [f"backbone.{name}" for name in names]
    for part in [f"lateral_convs.{i}" for i in range(3)] + [f"fpn_convs.{i}" for i in range(5)]:
        names += [f"neck.{part}.conv.{x}" for x in norm[:2]]
    head = []
    for tower in ("cls_convs", "reg_convs"):
        for i in range(3):
            head += [f"{tower}.{i}.conv.weight", f"{tower}.{i}.gn.weight", f"{tower}.{i}.gn.bias"]
        if deformable:
            head += [f"{tower}.2.conv.conv_offset.{x}" for x in norm[:2]]
    head += [f"vfnet_reg_conv.{x}" for x in ("conv.weight", "gn.weight", "gn.bias")]
    for part in ("vfnet_reg", "vfnet_reg_refine", "vfnet_cls"):
        head += [f"{part}.weight", f"{part}.bias"]
    head += ["vfnet_reg_refine_dconv.weight", "vfnet_cls_dconv.weight"]
    for scales in ("scales", "scales_refine"):
        head += [f"{scales}.{i}.scale" for i in range(5)]
    return set(names + [f"bbox_head.{name}" for name in head])


def vfnet(overrides):
    cfg = get_config(CONFIG, [*overrides, "MODEL.DEVICE", "cpu"])
    return randomize(build_model(cfg))


@pytest.mark.parametrize(
    ("overrides", "order", "suffix"),
    [(SMALL, "RGB", "pkl"), (SMALL + DEFORMABLE, "RGB", "pth"), (SMALL + DEFORMABLE, "BGR", "pkl")],
)
def test_vfnet_there_and_back_bit_for_bit(tmp_path, capsys, overrides, order, suffix):
    state = vfnet(overrides).state_dict()
    ours, theirs, back = (str(tmp_path / name) for name in ("a.pth", "b.pth", f"c.{suffix}"))
    names = ["ship", "car", "plane"]
    torch.save({"model": state, "class_names": names, "iteration": 9}, ours)
    with_config = ["--config-file", CONFIG, "--opts", *overrides, "INPUT.FORMAT", order]
    convert([ours, theirs, "--from", "detectron2", "--to", "mmdet", *with_config])
    assert "Left over" not in capsys.readouterr().out
    content = read(theirs)
    assert set(content["state_dict"]) == mmdet_vfnet_names(deformable=overrides is not SMALL)
    assert content["meta"]["CLASSES"] == tuple(names)
    first = content["state_dict"]["backbone.conv1.weight"]
    assert torch.equal(
        first, state["backbone.bottom_up.stem.conv1.weight"].flip(1 if order == "BGR" else ())
    )

    convert([theirs, back, "--from", "mmdet", "--to", "detectron2", *with_config])
    printed = capsys.readouterr().out
    assert not any(word in printed for word in ("Left over", "not filled", "Not in the model"))
    # The test config has the mean and deviation of RGB; for BGR they are the other way round.
    assert ("The config needs" in printed) == (order == "BGR")
    fresh = vfnet(overrides)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    loaded = DetectionCheckpointer(fresh).load(back)
    assert_same(fresh.state_dict(), state)
    assert loaded["class_names"] == names
