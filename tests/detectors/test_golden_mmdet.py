"""The converter, VarifocalNet and ATSS against mmdetection 3.3.0, number for number.

A file in golden/ holds what mmdetection computes on the CPU in float32 for a small ResNet-50 with
random weights and two images of 256x320: `state_dict`, `images_bgr_uint8`, `gt_boxes`, `gt_labels`,
`losses`, `grads` of their sum for each parameter of the head, `detections`. The FPN of ATSS has a
ReLU before p7 here, as its authors' and unlike that of mmdetection's config. A file of 3 MB is two
thirds random weights, which do not compress; a network with fewer would not have all its layers.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from checkpoint_helpers import assert_same, read
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from iou_d2.engine.convert import translate

SMALL = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.RETINANET.NUM_CLASSES", "5", "MODEL.POINT_DETECTOR.NUM_GROUPS", "8"),
)


class Case(NamedTuple):
    """A golden file, its config, and their name of each loss -> ours."""

    golden: str
    config: str
    losses: dict[str, str]


VFNET = Case(
    "vfnet_atss",
    "configs/vfnet_R_50_FPN_1x.yaml",
    {"loss_cls": "loss_cls", "loss_bbox": "loss_box_initial", "loss_bbox_rf": "loss_box"},
)
ATSS = Case(
    "atss",
    "configs/atss_R_50_FPN_1x.yaml",
    {"loss_cls": "loss_cls", "loss_bbox": "loss_box", "loss_centerness": "loss_quality"},
)


@pytest.fixture(scope="module", params=[VFNET, ATSS], ids=["vfnet", "atss"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def golden(case):
    return torch.load(f"tests/golden/{case.golden}.pt", weights_only=True)


@pytest.fixture(scope="module")
def converted(case, golden, tmp_path_factory):
    """Our checkpoint with their weights, by way of the converter."""
    folder = tmp_path_factory.mktemp(case.golden)
    theirs, ours = str(folder / "mmdet.pth"), str(folder / "detectron2.pth")
    torch.save({"state_dict": golden["state_dict"]}, theirs)
    convert(
        [theirs, ours, "--from", "mmdet", "--to", "detectron2"]
        + ["--config-file", case.config, "--opts", *SMALL]
    )
    return ours


@pytest.fixture
def model(case, converted):
    model = build_model(get_config(case.config, SMALL))
    DetectionCheckpointer(model).load(converted)
    return model


@pytest.fixture
def batch(golden):
    images = []
    for image, boxes, labels in zip(
        golden["images_bgr_uint8"], golden["gt_boxes"], golden["gt_labels"]
    ):
        truth = Instances(tuple(image.shape[1:]))
        truth.gt_boxes, truth.gt_classes = Boxes(boxes), labels
        images.append({"image": image.flip(0), "instances": truth})  # to RGB
    return images


def test_losses_and_gradients(case, golden, model, batch):
    losses = model.train()(batch)
    assert set(losses) == set(case.losses.values())
    for theirs, ours in case.losses.items():
        assert losses[ours].item() == pytest.approx(golden["losses"][theirs], rel=1e-4)

    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    names = translate(list(golden["state_dict"]), "mmdet", "detectron2")
    assert len(golden["grads"]) == len(list(model.head.parameters()))
    for name, expected in golden["grads"].items():
        difference = parameters[names[name]].grad - expected
        assert difference.norm() <= 1e-3 * expected.norm(), name


def test_detections(golden, model, batch):
    with torch.no_grad():
        found = [x["instances"] for x in model.eval()(batch)]
    for instances, expected in zip(found, golden["detections"]):
        assert len(instances) == len(expected["scores"]) == 100
        torch.testing.assert_close(instances.scores, expected["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            instances.pred_boxes.tensor, expected["boxes"], atol=0.05, rtol=0
        )
        assert torch.equal(instances.pred_classes, expected["labels"])


@pytest.mark.parametrize("with_config", [True, False])
def test_there_and_back_bit_for_bit(case, golden, converted, tmp_path, capsys, with_config):
    config = ["--config-file", case.config, "--opts", *SMALL] if with_config else []
    back = str(tmp_path / "back.pth")
    convert([converted, back, "--from", "detectron2", "--to", "mmdet", *config])
    assert_same(read(back)["state_dict"], golden["state_dict"])
    assert "Left over" not in capsys.readouterr().out
