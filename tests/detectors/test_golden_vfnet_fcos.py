"""VarifocalNet in FCOS mode, the head alone: golden/vfnet_fcos.pt holds what tests/vfnet_by_hand.py
computes in float64 from mmdetection's names."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

import vfnet_by_hand as by_hand
from checkpoint_helpers import assert_same
from iou_d2 import get_config
from iou_d2.engine.convert import translate_tensors
from peers import assert_detections, assert_gradients

# Their name of a loss -> ours.
LOSSES = {"loss_cls": "loss_cls", "loss_bbox": "loss_box_initial", "loss_bbox_rf": "loss_box"}
SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.FPN.OUT_CHANNELS", str(by_hand.CHANNELS)),
    *("MODEL.RETINANET.NUM_CLASSES", str(by_hand.CLASSES)),
    *("MODEL.POINT_DETECTOR.NUM_GROUPS", str(by_hand.GROUPS)),
    *("MODEL.POINT_DETECTOR.ASSIGNER", "fcos"),
)
SIZES = [(by_hand.HEIGHT, by_hand.WIDTH)] * 2


@pytest.fixture(scope="module")
def golden():
    return torch.load(by_hand.GOLDEN, weights_only=True)


@pytest.fixture
def model(golden):
    """Ours with their head, and the features of the file in place of a backbone's."""
    model = build_model(get_config("configs/vfnet_R_50_FPN_1x.yaml", SMALL))
    ours = translate_tensors(golden["state_dict"], "mmdet", "detectron2")
    assert not ours.told and len(ours.tensors) == len(golden["state_dict"])
    back = translate_tensors(ours.tensors, "detectron2", "mmdet").tensors
    assert_same(back, golden["state_dict"])
    head = {name.removeprefix("head."): x for name, x in ours.tensors.items()}
    model.head.load_state_dict(head)
    model.features = lambda images: golden["features"]
    return model


def test_losses_and_gradients(golden, model):
    truth = []
    for boxes, labels in zip(golden["gt_boxes"], golden["gt_labels"]):
        truth.append(Instances(SIZES[0], gt_boxes=Boxes(boxes), gt_classes=labels))
    found = model.losses(model.predict(None), SIZES, truth)
    assert set(found) == set(LOSSES.values())
    for theirs, ours in LOSSES.items():
        assert found[ours].item() == pytest.approx(golden["losses"][theirs], rel=1e-5)
    sum(found.values()).backward()
    gradients = translate_tensors(golden["grads"], "mmdet", "detectron2").tensors
    assert len(gradients) == len(list(model.head.parameters()))
    assert_gradients(model, gradients)


def test_detections(golden, model):
    with torch.no_grad():
        found = model.detect(model.predict(None), SIZES)
    for instances, expected in zip(found, golden["detections"]):
        assert_detections(instances, expected["boxes"], expected["scores"], expected["labels"])


def test_the_losses_of_the_file_are_those_of_the_script(golden):
    state = {name: x.double() for name, x in golden["state_dict"].items()}
    predictions = by_hand.outputs(state, [x.double() for x in golden["features"]])
    truth = list(zip(golden["gt_boxes"].tolist(), golden["gt_labels"].tolist()))
    found = {name: x.item() for name, x in by_hand.losses(predictions, truth).items()}
    assert found == pytest.approx(golden["losses"], rel=1e-9)
