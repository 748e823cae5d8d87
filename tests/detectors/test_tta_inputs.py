"""What test-time augmentation takes, what it gives where nothing is found, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from iou_d2.detectors.test_time_augmentation import build_merge, with_tta
from iou_d2.errors import InputError
from views_by_hand import random_image, resized

VIEWS = (
    *("TEST.AUG.MIN_SIZES", "(48, 64)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
)
MASKS = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")
NOTHING = (
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "1.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"),
)
IMAGE = random_image(50, 70)


@pytest.fixture
def build(small_cfg):
    """A function: (name of a quick config, overrides) -> its config, and a model in test mode."""

    def make(name: str, *overrides: str):
        cfg = small_cfg(f"configs/quick/{name}_shapes.yaml", *VIEWS, *overrides)
        torch.manual_seed(0)
        return cfg, build_model(cfg).eval()

    return make


@pytest.mark.parametrize("merge", ["nms", "vote", "soft_vote"])
@pytest.mark.parametrize(
    "name, overrides",
    [("retinanet", ()), ("unitbox", ()), ("ssd", ()), ("faster_rcnn", MASKS), ("iou_net", ())],
)
def test_no_detection_is_an_empty_result(build, name, overrides, merge):
    cfg, model = build(name, *NOTHING, *overrides, "TEST.AUG.MERGE", merge)
    found = with_tta(cfg, model)([{"image": IMAGE}])[0]["instances"]
    assert len(found) == 0 and found.image_size == (50, 70)
    assert found.pred_boxes.tensor.shape == (0, 4) and found.scores.shape == (0,)
    assert found.has("pred_masks") == bool(overrides)


def test_boxes_of_no_size_leave_nothing(build):
    cfg, model = build("retinanet", "TEST.AUG.BOX_SIZES", "[[0, 1e-9], [1e6, 1e7]]")
    assert len(with_tta(cfg, model)([{"image": IMAGE}])[0]["instances"]) == 0


def assert_equal(found, expected):
    assert len(found) == len(expected) > 5 and found.image_size == expected.image_size
    for key, value in expected.get_fields().items():
        both = [getattr(x, "tensor", x) for x in (value, found.get(key))]
        assert torch.equal(*both), key


def test_images_come_as_they_are_as_floats_or_as_files(build, tmp_path):
    cfg, model = build("retinanet")
    assert cfg.INPUT.FORMAT == "BGR"
    path = tmp_path / "x.png"
    Image.fromarray(IMAGE.flip(0).permute(1, 2, 0).numpy()).save(path)
    size = {"height": 50, "width": 70}
    detect = with_tta(cfg, model)
    (expected,) = detect([{"image": IMAGE}])
    for inputs in (
        {"image": IMAGE.float(), **size},
        {"file_name": str(path)},
        {"image": resized(IMAGE, (64, 90)), "file_name": str(path), **size},
    ):
        assert_equal(detect([inputs])[0]["instances"], expected["instances"])


def test_images_of_a_batch_are_looked_at_one_by_one(build):
    cfg, model = build("faster_rcnn")
    detect = with_tta(cfg, model)
    other = {"image": random_image(90, 40, seed=1), "height": 180, "width": 80}
    first, second = detect([{"image": IMAGE}, other])
    assert_equal(first["instances"], detect([{"image": IMAGE}])[0]["instances"])
    assert second["instances"].image_size == (180, 80)
    assert detect([]) == []


def test_it_is_a_module_in_test_mode_that_leaves_the_detector_alone(build):
    cfg, model = build("retinanet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detect = with_tta(cfg, model)
    assert not detect.training and not model.training
    detect([{"image": IMAGE}])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="test mode"):
        detect.train()([{"image": IMAGE}])


def test_ellipses_have_no_nms_but_can_vote(build):
    ellipses = ("MODEL.UNITBOX.INFERENCE", "ellipses", "MODEL.UNITBOX.REGION_THRESH_TEST", "0.01")
    cfg, model = build("unitbox", *ellipses)
    with pytest.raises(InputError, match="MODEL.UNITBOX.INFERENCE 'ellipses' has no NMS"):
        with_tta(cfg, model)
    cfg.TEST.AUG.MERGE = "vote"
    assert len(with_tta(cfg, model)([{"image": IMAGE}])[0]["instances"]) > 0


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("MODEL.ROI_HEADS.NAME", "StandardROIHeads"), "NAME is StandardROIHeads.*BoxLossROIHeads"),
        (("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"), "NAME is CascadeROIHeads"),
        (("MODEL.KEYPOINT_ON", "True"), "keypoints"),
        (("MODEL.META_ARCHITECTURE", "ProposalNetwork"), "ProposalNetwork cannot be merged"),
    ],
)
def test_what_cannot_be_merged_is_refused(build, overrides, said):
    class_agnostic = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
    cfg, model = build("faster_rcnn", *class_agnostic, *overrides)
    with pytest.raises(InputError, match=said):
        with_tta(cfg, model)


@pytest.mark.parametrize("key, value", [("MERGE", "mean"), ("VOTE_THRESH", 1.5)])
def test_what_no_merge_can_follow_is_named(small_cfg, key, value):
    cfg = small_cfg("configs/quick/retinanet_shapes.yaml")
    cfg.TEST.AUG[key] = value
    with pytest.raises(InputError, match=f"TEST.AUG.{key}"):
        build_merge(cfg)
