"""The converter, the configs in torchvision/ and our heads against torchvision's own models, with
few channels and random weights."""

from __future__ import annotations

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from checkpoint_helpers import assert_same, read
from detections import paired
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from iou_d2.detectors.faster_rcnn import BoxLossOutputLayers
from iou_d2.engine.convert import translate_tensors
from iou_d2.errors import InputError
from torchvision_rcnn import CLASSES, FC, THIN, build_torchvision_rcnn

# Of 3 and 4 rows in p6, which no stride of 64 gives, and unequal in a batch.
SIZES = ((160, 224), (224, 192))
MODELS = [
    (1, False, "torchvision/faster_rcnn_R_50_FPN"),
    (2, False, "torchvision/faster_rcnn_R_50_FPN_v2"),
    (1, True, "torchvision/mask_rcnn_R_50_FPN"),
    (2, True, "torchvision/mask_rcnn_R_50_FPN_v2"),
]
OTHER_EPS = "MODEL.RESNETS.FROZEN_BN_EPS", "1e-5"
# Every anchor and proposal is sampled, so that nothing is left to chance.
ALL = 100_000
EVERYTHING = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", str(ALL), "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", str(ALL), "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
)
THEIR_EVERYTHING = {
    "rpn_batch_size_per_image": ALL,
    "rpn_positive_fraction": 1.0,
    "box_batch_size_per_image": ALL,
    "box_positive_fraction": 1.0,
}


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, *size), generator=generator) / 255 for size in SIZES]


def as_batch(images):
    return [{"image": (x * 255).round().to(torch.uint8)} for x in images]


def converted(theirs, config, folder, *overrides):
    """Our model with the weights of `theirs`, by way of the converter, which must fill it."""
    source, target = str(folder / "theirs.pth"), str(folder / "ours.pth")
    torch.save(theirs.state_dict(), source)
    options = ["--config-file", config, "--opts", *THIN, *overrides]
    convert([source, target, "--from", "torchvision", "--to", "detectron2", *options])
    model = build_model(get_config(config, [*THIN, *overrides]))
    DetectionCheckpointer(model).load(target)
    return model.eval(), target


@torch.no_grad()
def detections_of_both(theirs, ours, images):
    """Ours and theirs, masks of both as the mask head gives them."""
    theirs.transform.postprocess = lambda found, *sizes: found
    return ours.inference(as_batch(images), do_postprocess=False), theirs(images)


@pytest.mark.parametrize(("version", "mask", "config"), MODELS)
def test_detections(tmp_path, capsys, images, version, mask, config):
    theirs = build_torchvision_rcnn(version, mask, images)
    ours, _ = converted(theirs, config, tmp_path)
    printed = capsys.readouterr().out
    assert not any(x in printed for x in ("Left over", "not filled", "Not in the model"))
    for one, other in zip(*detections_of_both(theirs, ours, images)):
        assert len(one) == 100 and set(one.pred_classes.tolist()) == set(range(CLASSES))
        pairs = paired(one, other["boxes"], other["scores"], other["labels"] - 1)
        if mask:
            torch.testing.assert_close(one.pred_masks, other["masks"][pairs], atol=1e-4, rtol=0)


def test_the_epsilon_of_frozen_batch_norm(tmp_path, images):
    theirs = build_torchvision_rcnn(1, False, images, eps=1e-5)
    for overrides, same in ((OTHER_EPS, True), ((), False)):
        ours, _ = converted(theirs, MODELS[0][2], tmp_path, *overrides)
        (tmp_path / "ours.pth").unlink()
        found, expected = detections_of_both(theirs, ours, images)
        scores = torch.cat([x.scores for x in found]), torch.cat([x["scores"] for x in expected])
        assert scores[0].shape == scores[1].shape
        assert torch.allclose(*scores, atol=1e-4, rtol=0) == same


@pytest.mark.parametrize(("version", "mask", "config"), MODELS)
def test_there_and_back(tmp_path, images, version, mask, config):
    theirs = build_torchvision_rcnn(version, mask, images)
    ours, target = converted(theirs, config, tmp_path)
    back, again = str(tmp_path / "back.pth"), str(tmp_path / "again.pth")
    convert([target, back, "--from", "detectron2", "--to", "torchvision"])
    # What nothing reads is not kept: boxes and masks of the background.
    wanted = {name: x.clone() for name, x in theirs.state_dict().items()}
    for name in ("weight", "bias"):
        wanted[f"roi_heads.box_predictor.bbox_pred.{name}"][:4] = 0
        if mask:
            wanted[f"roi_heads.mask_predictor.mask_fcn_logits.{name}"][:1] = 0
    assert_same(read(back), wanted)
    convert([back, again, "--from", "torchvision", "--to", "detectron2"])
    assert_same(read(again)["model"], read(target)["model"])


def test_names_of_the_published_files(images):
    """Those of torchvision before 0.13, by hand, lead where those of today lead."""
    theirs = build_torchvision_rcnn(1, True, images).state_dict()
    old = {}
    for name, x in theirs.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            name = name.replace(f"_blocks.{i}.0.", f"_blocks.{i}.")
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        old[name] = x
    assert len(old.keys() - theirs.keys()) == 2 + 16 + 8
    new, found = (translate_tensors(x, "torchvision", "detectron2").tensors for x in (theirs, old))
    assert_same(found, new)


def ground_truth(images):
    """The same objects for torchvision and for us."""
    generator = torch.Generator().manual_seed(2)
    theirs, ours = [], as_batch(images)
    for image, batched in zip(images, ours):
        corner = torch.rand(4, 2, generator=generator) * 100
        boxes = torch.cat([corner, corner + 20 + 60 * torch.rand(4, 2, generator=generator)], 1)
        classes = torch.randint(CLASSES, (4,), generator=generator)
        theirs.append({"boxes": boxes, "labels": classes + 1})
        truth = Instances(tuple(image.shape[1:]))
        truth.gt_boxes, truth.gt_classes = Boxes(boxes), classes
        batched["instances"] = truth
    return theirs, ours


@pytest.mark.parametrize(("version", "mask", "config"), MODELS[:2])
def test_losses_and_gradients(tmp_path, images, version, mask, config):
    theirs = build_torchvision_rcnn(version, mask, images, **THEIR_EVERYTHING)
    ours, _ = converted(theirs, config, tmp_path, *EVERYTHING)
    targets, batch = ground_truth(images)
    theirs.training = ours.training = True  # batch norm keeps its statistics
    for module in (theirs.rpn, theirs.roi_heads, ours.proposal_generator, ours.roi_heads):
        module.training = True
    with EventStorage():
        found = ours(batch)
    expected = theirs(images, targets)

    # Detectron2 divides those of the RPN by what it wanted to sample.
    labels = ours.proposal_generator.label_and_sample_anchors
    anchors = ours.proposal_generator.anchor_generator(
        [torch.zeros(1, 1, *size) for size in ((56, 56), (28, 28), (14, 14), (7, 7), (4, 4))]
    )
    sampled = sum((x >= 0).sum() for x in labels(anchors, [x["instances"] for x in batch])[0])
    factor = ALL * len(batch) / sampled
    found = {name: x * (factor if "rpn" in name else 1) for name, x in found.items()}
    names = {
        "loss_classifier": "loss_cls",
        "loss_box_reg": "loss_box_reg",
        "loss_objectness": "loss_rpn_cls",
        "loss_rpn_box_reg": "loss_rpn_loc",
    }
    assert set(found) == set(names.values()) and set(expected) == set(names)
    for name, ours_name in names.items():
        torch.testing.assert_close(found[ours_name], expected[name], rtol=1e-4, atol=0)

    sum(found.values()).backward()
    sum(expected.values()).backward()
    gradients = {n: x.grad for n, x in theirs.named_parameters() if x.grad is not None}
    wanted = translate_tensors(gradients, "torchvision", "detectron2").tensors
    own = {name: x.grad for name, x in ours.named_parameters() if "bottom_up" not in name}
    assert all(name in wanted for name in own)
    for name, gradient in own.items():
        assert (gradient - wanted[name]).norm() <= 1e-3 * wanted[name].norm(), name


def test_small_detections_are_left_out(images):
    """Of proposals at the border, whose boxes mostly end outside."""
    theirs = build_torchvision_rcnn(1, False, images).roi_heads
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(40, 2, generator=generator) * 140
    boxes = torch.cat([corner, torch.full((40, 2), 150.0)], dim=1)
    logits = torch.randn(40, CLASSES + 1, generator=generator)
    deltas = 12 * torch.randn(40, 4 * (CLASSES + 1), generator=generator)
    expected = theirs.postprocess_detections(logits, deltas, [boxes], [(150, 150)])
    assert len(expected[1][0]) < 100  # the limit does not hide anything

    predictions = logits.roll(-1, dims=1), deltas[:, 4:]
    proposals = [Instances((150, 150), proposal_boxes=Boxes(boxes))]
    layers = BoxLossOutputLayers(get_config(MODELS[0][2], THIN), FC)
    (found,), _ = layers.inference(predictions, proposals)
    boxes, scores, labels = (x[0] for x in expected)
    paired(found, boxes, scores, labels - 1)
    layers.min_size_test = 0.0
    assert len(layers.inference(predictions, proposals)[0][0]) > len(found) > 0


def test_what_torchvision_cannot_have_is_named(images):
    theirs = build_torchvision_rcnn(1, True, images).state_dict()
    ours = translate_tensors(theirs, "torchvision", "detectron2").tensors
    for name, rows in (("box_predictor.bbox_pred", 4), ("mask_head.predictor", 1)):
        agnostic = {
            f"roi_heads.{name}.{x}": ours[f"roi_heads.{name}.{x}"][:rows]
            for x in ("weight", "bias")
        }
        with pytest.raises(
            InputError, match=f"has {rows} rows and not {rows * CLASSES}, {rows} for"
        ):
            translate_tensors({**ours, **agnostic}, "detectron2", "torchvision")
