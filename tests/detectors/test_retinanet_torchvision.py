"""RetinaNet with torchvision's weights against torchvision itself, with a thin ResNet-50 and all
other settings of `retinanet_resnet50_fpn` and `retinanet_resnet50_fpn_v2`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from detections import paired
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from iou_d2.engine.convert import translate
from retinanet_by_hand import THIN, ThinResNet

CLASSES, CHANNELS = 91, 64
CONFIGS = {1: "torchvision/retinanet_R_50_FPN", 2: "torchvision/retinanet_R_50_FPN_v2"}
# Their shorter side is the 200 that they are scaled to; 224 rows are 4 of p6, whose stride is 56.
SIZES = [(200, 264), (248, 200)]


def made_up(version, eps=1e-5):
    """Theirs, with random weights that detect something."""
    torch.manual_seed(0)
    resnet = ThinResNet(norm_layer=FrozenBatchNorm2d if version == 1 else nn.BatchNorm2d)
    backbone = BackboneWithFPN(
        resnet,
        {"layer2": "0", "layer3": "1", "layer4": "2"},
        [64, 128, 256],
        CHANNELS,
        extra_blocks=LastLevelP6P7(CHANNELS if version == 1 else 256, CHANNELS),
    )
    norm = None if version == 1 else partial(nn.GroupNorm, 32)
    head = RetinaNetHead(CHANNELS, 9, CLASSES, norm_layer=norm)
    if version == 2:
        head.regression_head._loss_type = "giou"
    model = RetinaNet(
        backbone,
        CLASSES,
        min_size=200,
        anchor_generator=_default_anchorgen(),
        head=head,
        _skip_resize=True,
    )
    overwrite_eps(model, eps)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
                x[0] = 1e-9  # of a filter that never fires
            elif name.startswith("backbone.body") and name.endswith(("bias", "running_mean")):
                x.uniform_(-0.1, 0.1)
            elif name.startswith("backbone.body") and x.ndim == 1 and name.endswith("weight"):
                x.uniform_(0.3, 0.7)
                x[0] = 1e-5
            elif name.startswith("head") and ".conv." in name and x.ndim == 4:
                nn.init.normal_(x, std=0.08)
        for layer, bias in (
            (head.classification_head.cls_logits, (-4, -2)),
            (head.regression_head.bbox_reg, (-0.3, 0.3)),
        ):
            nn.init.normal_(layer.weight, std=0.06 if version == 1 else 0.02)
            layer.bias.uniform_(*bias)
    return model.eval()


def options(eps=1e-5):
    return (*THIN, "MODEL.RESNETS.FROZEN_BN_EPS", str(eps))


def converted(theirs, version, folder, eps=1e-5):
    a, b = str(folder / "a.pth"), str(folder / "b.pth")
    torch.save(theirs.state_dict(), a)
    arguments = ["--from", "torchvision", "--to", "detectron2", "--config-file", CONFIGS[version]]
    convert([a, b, *arguments, "--opts", *options(eps)])
    ours = build_model(get_config(CONFIGS[version], options(eps)))
    ours.load_state_dict(torch.load(b, weights_only=True)["model"])
    return ours.eval()


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, *s), generator=generator, dtype=torch.uint8) for s in SIZES]


# The version, and the epsilon of its frozen batch norm: 0 is that of the published version 1.
@pytest.mark.parametrize(("version", "eps"), [(1, 0.0), (1, 1e-5), (2, 1e-5)])
def test_detections(tmp_path, version, eps):
    theirs = made_up(version, eps)
    ours = converted(theirs, version, tmp_path, eps)
    with torch.no_grad():
        expected = theirs([image / 255 for image in images()])
        found = [x["instances"] for x in ours([{"image": image} for image in images()])]
    for ours_of, theirs_of in zip(found, expected):
        boxes = theirs_of["boxes"]
        assert len(boxes) == 300
        # A box in the padding is clipped to one without area, which Detectron2 leaves out.
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        assert kept.sum() > 150 and len(set(ours_of.pred_classes.tolist())) > 3
        paired(ours_of, *(theirs_of[name][kept] for name in ("boxes", "scores", "labels")))


def test_the_epsilon_of_frozen_batch_norm_matters(tmp_path):
    theirs = made_up(1, eps=0.0)
    found = []
    for eps in (0.0, 1e-5):
        with torch.no_grad():
            ours = converted(theirs, 1, tmp_path, eps)
            found.append(ours([{"image": images()[0]}])[0]["instances"].scores)
        (tmp_path / "b.pth").unlink()
    assert len(found[0]) != len(found[1]) or (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("objects", [(3, 1), (0, 2), (0, 0)], ids=str)
def test_losses_and_gradients(tmp_path, event_storage, version, objects):
    theirs = made_up(version)
    ours = converted(theirs, version, tmp_path).train()
    theirs.train().backbone.eval()
    generator = torch.Generator().manual_seed(2)
    batch, targets = [], []
    for image, count in zip(images(), objects):
        corner = torch.rand(count, 2, generator=generator) * 100
        boxes = torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=generator) * 80], 1)
        labels = torch.randint(1, CLASSES, (count,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels})
        truth = Instances(tuple(image.shape[1:]))
        truth.gt_boxes, truth.gt_classes = Boxes(boxes), labels
        batch.append({"image": image, "instances": truth})
    expected = theirs([image / 255 for image in images()], targets)
    losses = ours(batch)
    names = {"classification": "loss_cls", "bbox_regression": "loss_box_reg"}
    assert set(losses) == set(names.values())
    for theirs_name, name in names.items():
        assert losses[name].item() == pytest.approx(expected[theirs_name].item(), rel=1e-4), name

    sum(losses.values()).backward()
    sum(expected.values()).backward()
    parameters = dict(ours.named_parameters())
    renamed = translate(list(theirs.state_dict()), "torchvision", "detectron2")
    order = [ratio * 3 + size for size in range(3) for ratio in range(3)]
    heads = [(n, x) for n, x in theirs.named_parameters() if n.startswith("head.")]
    assert len(heads) == len(list(ours.head.parameters()))
    for name, x in heads:
        gradient = x.grad
        if "cls_logits" in name or "bbox_reg" in name:
            gradient = gradient.view(9, -1, *x.shape[1:])[order].reshape(x.shape)
        difference = parameters[renamed[name]].grad - gradient
        assert difference.norm() <= 1e-3 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("version", [1, 2])
def test_there_and_back_is_bit_for_bit(tmp_path, version):
    theirs = made_up(version)
    converted(theirs, version, tmp_path)
    b, c = str(tmp_path / "b.pth"), str(tmp_path / "c.pth")
    convert([b, c, "--from", "detectron2", "--to", "torchvision"])
    back = torch.load(c, weights_only=True)
    state = theirs.state_dict()
    assert set(back) == set(state)
    assert all(torch.equal(back[name], x) for name, x in state.items())


def test_the_names_of_the_published_version_1(tmp_path):
    """Written before torchvision 0.13: a tower counts its ReLUs, the FPN has no ".0"."""
    theirs = made_up(1)
    state = theirs.state_dict()
    old = {}
    for name, x in state.items():
        for layer in range(4):
            name = name.replace(f"_head.conv.{layer}.0.", f"_head.conv.{2 * layer}.")
        if "_blocks." in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        old[name] = x
    assert len(old) == len(state) and set(old) != set(state)
    new = translate(list(state), "torchvision", "detectron2")
    renamed = translate(list(old), "torchvision", "detectron2")
    assert dict(zip(state, old)) == {a: b for a, b in zip(new, renamed) if new[a] == renamed[b]}
    # torchvision reads what comes back.
    there = {renamed[name]: x for name, x in old.items()}
    assert set(translate(list(there), "detectron2", "torchvision").values()) == set(state)


def test_anchors():
    generator = _default_anchorgen()
    ours = build_model(get_config(CONFIGS[1], options())).anchor_generator
    shapes = [(28, 36), (14, 18), (7, 9), (4, 5), (2, 3)]  # of 224x288
    features = [torch.zeros(1, 1, *s) for s in shapes]
    (expected,) = generator(ImageList(torch.zeros(1, 3, 224, 288), [(200, 264)]), features)
    order = [ratio * 3 + size for size in range(3) for ratio in range(3)]
    found = torch.cat([level.tensor for level in ours(features)])
    assert torch.equal(found, expected.view(-1, 9, 4)[:, order].reshape(-1, 4))
