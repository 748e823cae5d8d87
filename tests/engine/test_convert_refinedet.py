"""RefineDet of luuuyi/RefineDet.PyTorch: its names, shapes and network by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from iou_d2 import get_config
from iou_d2.commands import convert
from iou_d2.engine.convert import recognise, translate, translate_tensors

LAYOUT, CLASSES = "luuuyi", 21  # VOC, with the background
# Index in vgg -> inputs and outputs of its convolutions; fc6 and fc7 are the last two.
VGG = {
    **{0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256)},
    **{14: (256, 256), 17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512)},
    **{26: (512, 512), 28: (512, 512), 31: (512, 1024), 33: (1024, 1024)},
}
POOLS = (4, 9, 16, 23, 30)
SOURCES = (512, 512, 1024, 512)  # channels of conv4_3, conv5_3, fc7 and conv6_2
NAMES = {
    "vgg.0.weight": "backbone.vgg.features.0.weight",
    "vgg.28.bias": "backbone.vgg.features.28.bias",
    "vgg.31.weight": "backbone.fc6.weight",
    "vgg.33.bias": "backbone.fc7.bias",
    "conv4_3_L2Norm.weight": "backbone.norms.conv4_3.weight",
    "conv5_3_L2Norm.weight": "backbone.norms.conv5_3.weight",
    "extras.0.bias": "backbone.extra.conv6_2.0.bias",
    "extras.1.weight": "backbone.extra.conv6_2.2.weight",
    "arm_loc.0.weight": "head.arm_bbox.0.weight",
    "arm_conf.3.bias": "head.arm_score.3.bias",
    "odm_loc.3.weight": "head.odm_bbox.3.weight",
    "odm_conf.0.weight": "head.odm_score.0.weight",
    "tcb0.0.weight": "head.transfer.0.conv1.weight",
    "tcb0.11.bias": "head.transfer.3.conv2.bias",
    "tcb1.2.weight": "head.transfer.2.up.weight",
    "tcb2.4.weight": "head.transfer.1.conv3.weight",
    "tcb2.10.bias": "head.transfer.3.conv3.bias",
}


def shapes_of_file() -> dict[str, tuple[int, ...]]:
    """All weights of a file of VOC, of 320 and of 512 px alike."""
    shapes = {"conv4_3_L2Norm": (512,), "conv5_3_L2Norm": (512,)}
    for index, (inputs, outputs) in VGG.items():
        side = 1 if index == 33 else 3
        shapes[f"vgg.{index}"] = (outputs, inputs, side, side)
    shapes["extras.0"], shapes["extras.1"] = (256, 1024, 1, 1), (512, 256, 3, 3)
    for level, channels in enumerate(SOURCES):
        shapes[f"arm_loc.{level}"] = (12, channels, 3, 3)
        shapes[f"arm_conf.{level}"] = (6, channels, 3, 3)
        shapes[f"odm_loc.{level}"] = (12, 256, 3, 3)
        shapes[f"odm_conf.{level}"] = (3 * CLASSES, 256, 3, 3)
        shapes[f"tcb0.{3 * level}"] = (256, channels, 3, 3)
        shapes[f"tcb0.{3 * level + 2}"] = (256, 256, 3, 3)
        shapes[f"tcb2.{3 * level + 1}"] = (256, 256, 3, 3)
        if level < 3:
            shapes[f"tcb1.{level}"] = (256, 256, 2, 2)
    return shapes


@pytest.fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    """A synthetic file, of which the norms keep numbers as they are."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes_of_file().items():
        if len(shape) == 1:
            tensors[f"{name}.weight"] = 8 + 4 * torch.rand(shape)
            continue
        tensors[f"{name}.weight"] = torch.randn(shape) * math.sqrt(2 / math.prod(shape[1:]))
        tensors[f"{name}.bias"] = torch.randn(shape[0]) * 0.1
    return tensors


def test_names_in_both_directions():
    assert recognise(NAMES, LAYOUT).title == "RefineDet"
    assert recognise(NAMES.values(), "detectron2").title == "RefineDet"
    assert translate(list(NAMES), LAYOUT, "detectron2") == NAMES
    back = {ours: theirs for theirs, ours in NAMES.items()}
    assert translate(list(back), "detectron2", LAYOUT) == back


def test_the_background_moves_from_the_first_to_the_last_class_of_both_steps():
    tensors = {"tcb0.0.bias": torch.zeros(1)}
    for step, classes in (("arm", 2), ("odm", CLASSES)):
        numbers = torch.arange(3)[:, None] * 1000.0 + torch.arange(classes)
        tensors[f"{step}_conf.1.weight"] = numbers.flatten()[:, None, None, None]
        tensors[f"{step}_conf.1.bias"] = numbers.flatten()
        tensors[f"{step}_loc.1.weight"] = torch.zeros(12, 1, 1, 1)
    converted = translate_tensors(tensors, LAYOUT, "detectron2")
    assert ["background class is the last" in x for x in converted.told] == [True]
    for step, classes in (("arm", 2), ("odm", CLASSES)):
        expected = [1000.0 * box + k for box in range(3) for k in [*range(1, classes), 0]]
        for kind in ("weight", "bias"):
            found = converted.tensors[f"head.{step}_score.1.{kind}"]
            assert found.flatten().tolist() == expected


def test_a_file_goes_there_and_back(theirs, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("theirs.pth", "ours.pth", "back.pth")]
    torch.save(theirs, files[0])
    config = ["--config-file", "refinedet320_VGG16_voc", "--opts", "MODEL.DEVICE", "cpu"]
    convert.main([*files[:2], "--from", LAYOUT, "--to", "detectron2", *config])
    printed = capsys.readouterr().out
    assert "Left over" not in printed and "not filled" not in printed
    assert "Not in the model" not in printed
    assert "the background class is the last one" in printed
    assert "The config needs: MODEL.ANCHOR_GENERATOR.NAME ClippedAnchorGenerator\n" in printed
    assert "MODEL.PIXEL_MEAN [123.0, 117.0, 104.0] MODEL.PIXEL_STD [1.0, 1.0, 1.0]" in printed
    convert.main([*files[1:], "--from", "detectron2", "--to", LAYOUT, *config])
    assert "ANCHOR_GENERATOR" not in capsys.readouterr().out
    back = torch.load(files[2], weights_only=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.items())


def conv(state, name, x, **where):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **where)


def l2_norm(state, name, x):
    norm = x.double().pow(2).sum(1, keepdim=True).sqrt()
    return (x / norm * state[f"{name}.weight"].view(1, -1, 1, 1)).float()


def outputs_by_hand(state, images):
    """arm_loc, arm_conf, odm_loc and odm_conf, (N, R, values) each, from the file's own names."""
    x, sources = images, []
    for index in sorted([*VGG, *POOLS]):
        if index in POOLS:
            x = F.max_pool2d(x, 2)
            continue
        where = {"padding": 1} if index < 31 else {"padding": 3, "dilation": 3}
        x = conv(state, f"vgg.{index}", x, **(where if index < 33 else {})).relu()
        if index in (21, 28):
            name = "conv4_3_L2Norm" if index == 21 else "conv5_3_L2Norm"
            sources.append(l2_norm(state, name, x))
    sources.append(x)
    x = conv(state, "extras.0", x).relu()
    sources.append(conv(state, "extras.1", x, stride=2, padding=1).relu())

    transferred = {}
    for level in (3, 2, 1, 0):
        x = conv(state, f"tcb0.{3 * level}", sources[level], padding=1).relu()
        x = conv(state, f"tcb0.{3 * level + 2}", x, padding=1)
        if level < 3:
            up = state[f"tcb1.{level}.weight"], state[f"tcb1.{level}.bias"]
            x = x + F.conv_transpose2d(transferred[level + 1], *up, stride=2)
        transferred[level] = conv(state, f"tcb2.{3 * level + 1}", x.relu(), padding=1).relu()

    outputs = []
    for name, values in (("arm_loc", 4), ("arm_conf", 2), ("odm_loc", 4), ("odm_conf", CLASSES)):
        maps = sources if name.startswith("arm") else transferred
        levels = [conv(state, f"{name}.{level}", maps[level], padding=1) for level in range(4)]
        levels = [x.permute(0, 2, 3, 1).reshape(len(x), -1, values) for x in levels]
        outputs.append(torch.cat(levels, dim=1))
    return outputs


def priors_by_hand(side):
    """(centre x, centre y, width, height) in images, none over 1."""
    priors = []
    for step, size in zip((8, 16, 32, 64), (32, 64, 128, 256)):
        for row, column in itertools.product(range(side // step), repeat=2):
            center = [(column + 0.5) * step / side, (row + 0.5) * step / side]
            for ratio in (1.0, 2.0, 0.5):
                sides = size * math.sqrt(ratio) / side, size / math.sqrt(ratio) / side
                priors.append([*center, *(min(x, 1.0) for x in sides)])
    return torch.tensor(priors, dtype=torch.float64)


def decode_by_hand(priors, deltas):
    deltas = deltas.double()
    center = priors[:, :2] + deltas[:, :2] * 0.1 * priors[:, 2:]
    half = priors[:, 2:] * (deltas[:, 2:] * 0.2).exp() / 2
    return torch.cat([center - half, center + half], dim=1)


@pytest.mark.parametrize("side", [64, 128])
def test_a_converted_model_says_what_the_port_says(theirs, side):
    keys = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.SQUARE_SIZE", str(side)]
    keys += ["MODEL.ANCHOR_GENERATOR.NAME", "ClippedAnchorGenerator"]
    model = build_model(get_config("refinedet320_VGG16_voc", keys)).eval()
    model.load_state_dict(translate_tensors(theirs, LAYOUT, "detectron2").tensors, strict=True)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found, expected = model.predict(images), outputs_by_hand(theirs, images)
        refined = model.refined_anchors(found)
    arm_loc, arm_conf, odm_loc, odm_conf = expected
    assert min(x.std() for x in expected) > 0.1
    for ours, port in (
        (found.arm_deltas, arm_loc),
        (found.arm_logits, arm_conf.roll(-1, dims=-1)),
        (found.deltas, odm_loc),
        (found.logits, odm_conf.roll(-1, dims=-1)),
    ):
        torch.testing.assert_close(ours, port, atol=1e-3, rtol=1e-4)
    priors = priors_by_hand(side)
    boxes = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
    torch.testing.assert_close(found.anchors.tensor.double() / side, boxes, atol=1e-6, rtol=0)
    for image in (0, 1):
        port = decode_by_hand(priors, arm_loc[image]) * side
        torch.testing.assert_close(refined[image].double(), port, atol=0.02, rtol=1e-4)


def test_50_anchors_of_6375_are_longer_than_an_image_of_320_px_and_none_of_512():
    for side, count, longer in ((320, 6375, 50), (512, 16320, 0)):
        sides = [
            [size * math.sqrt(ratio), size / math.sqrt(ratio)]
            for step, size in zip((8, 16, 32, 64), (32, 64, 128, 256))
            for _ in range((side // step) ** 2)
            for ratio in (1.0, 2.0, 0.5)
        ]
        assert (len(sides), sum(max(x) > side for x in sides)) == (count, longer)
        assert sum(max(x) == 1.0 for x in priors_by_hand(side)[:, 2:].tolist()) == longer
