"""RetinaNet with mmdetection's weights against what mmdetection computes, by hand in float64."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from detections import paired
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from iou_d2.engine.convert import translate
from retinanet_by_hand import (
    CLASSES,
    THIN,
    MmdetRetinaNet,
    anchors_by_hand,
    detections_by_hand,
    losses_by_hand,
)

OPTIONS = (*THIN, "MODEL.RETINANET.NUM_CLASSES", str(CLASSES))
CONFIGS = {False: "mmdet/retinanet_R_50_FPN", True: "mmdet/iou_retinanet_R_50_FPN"}
# No box lies between two anchors, of which rounding would choose one. The second object has its
# best anchors in common with the first. What the larger image adds to the smaller learns nothing.
SIZES = [(64, 96), (90, 130)]
BOXES = [
    [[9.1, 8.3, 49.2, 47.9], [9.7, 7.4, 48.1, 49.8], [69.3, 20.6, 95.2, 61.7]],
    [[10.3, 12.1, 99.2, 81.6]],
]
LABELS = [[3, 1, 0], [4]]
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


def made_up(iou_aware):
    torch.manual_seed(0)
    model = MmdetRetinaNet(iou_aware)
    head = model.bbox_head
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "bbox_head" in name and x.ndim == 4:
                torch.nn.init.normal_(x, std=0.003 if "retina" in name else 0.05)
            elif "neck" in name and x.ndim == 4:
                torch.nn.init.xavier_uniform_(x)
        for x in model.buffers():
            if x.is_floating_point():
                x.add_(torch.rand_like(x) * 0.2)
        head.retina_cls.bias.uniform_(-4, -2)
        head.retina_reg.bias.uniform_(-0.3, 0.3)
        if iou_aware:
            head.retina_iou.bias.uniform_(-1, 1)
    return model.eval()


def images_of(sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, *s), generator=generator, dtype=torch.uint8) for s in sizes]


def padded(images):
    """RGB -> a normalised batch (N, 3, H, W) in float64."""
    side = [-(-max(x.shape[i] for x in images) // 32) * 32 for i in (1, 2)]
    batch = torch.zeros(len(images), 3, *side, dtype=torch.float64)
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = (
            image.double() - MEAN.view(3, 1, 1)
        ) / STD.view(3, 1, 1)
    return batch


@pytest.fixture(params=[False, True], ids=["plain", "iou_aware"])
def pair(request, tmp_path):
    """Their model in float64, ours with their weights by way of the converter, and `extra`."""
    theirs, config = made_up(request.param), CONFIGS[request.param]
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.pth")
    convert(
        [str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--from", "mmdet"]
        + ["--to", "detectron2", "--config-file", config, "--opts", *OPTIONS]
    )
    ours = build_model(get_config(config, OPTIONS))
    ours.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True)["model"])
    return theirs.double(), ours, int(request.param)


def test_there_and_back_is_bit_for_bit(pair, tmp_path):
    theirs, _, extra = pair
    convert(
        [str(tmp_path / "b.pth"), str(tmp_path / "c.pth")] + "--from detectron2 --to mmdet".split()
    )
    back = torch.load(tmp_path / "c.pth", weights_only=True)["state_dict"]
    state = theirs.float().state_dict()
    assert set(back) == set(state)
    for name, x in state.items():
        assert torch.equal(back[name], x), name


def test_losses_and_gradients(pair, event_storage):
    theirs, ours, extra = pair
    images = images_of(SIZES)
    outputs = theirs(padded(images))
    truth = list(zip(SIZES, BOXES, LABELS))
    expected = losses_by_hand(*outputs, truth, beta=0.11 * extra, extra=extra)
    batch = []
    for image, boxes, labels in zip(images, BOXES, LABELS):
        instances = Instances(tuple(image.shape[1:]))
        instances.gt_boxes = Boxes(torch.tensor(boxes))
        instances.gt_classes = torch.tensor(labels)
        batch.append({"image": image, "instances": instances})
    losses = ours.train()(batch)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-4), name

    sum(losses.values()).backward()
    sum(expected.values()).backward()
    moved = translate_gradients(theirs)
    parameters = dict(ours.named_parameters())
    assert len(moved) == len(list(ours.head.parameters()))
    for name, gradient in moved.items():
        difference = parameters[name].grad - gradient
        assert difference.norm() <= 1e-3 * gradient.norm(), name


def translate_gradients(theirs):
    """Gradients of their head by our names; of anchors from ratio first to size first."""
    names = translate(list(theirs.state_dict()), "mmdet", "detectron2")
    found = {}
    for name, x in theirs.named_parameters():
        if name.startswith("bbox_head."):
            gradient = x.grad
            if ".retina_" in name:
                order = [ratio * 3 + size for size in range(3) for ratio in range(3)]
                gradient = gradient.view(9, -1, *x.shape[1:])[order].reshape(x.shape)
            found[names[name]] = gradient
    return found


def test_detections(pair):
    theirs, ours, extra = pair
    (image,) = images_of([(64, 96)])
    with torch.no_grad():
        shapes, logits, deltas, ious = theirs(padded([image]))
        found = ours.eval()([{"image": image}])[0]["instances"]
    ious = None if ious is None else ious[0]
    expected = detections_by_hand(shapes, logits[0], deltas[0], ious, (64, 96), extra)
    assert len(expected) > 40
    scores, classes, boxes = (torch.tensor(x) for x in zip(*expected))
    paired(found, boxes, scores, classes)


@pytest.mark.parametrize("iou_aware", [False, True])
def test_anchors(iou_aware):
    cfg = get_config(CONFIGS[iou_aware], OPTIONS)
    model = build_model(cfg)
    shapes = [(7, 11), (4, 6), (2, 3), (1, 2), (1, 1)]
    found = model.anchor_generator([torch.zeros(1, 1, *s) for s in shapes])
    extra = int(iou_aware)
    order = [ratio * 3 + size for size in range(3) for ratio in range(3)]
    for level, theirs in zip(found, anchors_by_hand(shapes, extra)):
        theirs = torch.tensor(theirs, dtype=torch.float32).view(-1, 9, 4)[:, order].view(-1, 4)
        theirs[:, 2:] += extra
        torch.testing.assert_close(level.tensor, theirs)
