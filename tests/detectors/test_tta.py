"""Test-time augmentation of detectors with random weights: what one view gives, and that several
give what is found in each of them by hand and merged in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from iou_d2.detectors.dense import rescale_detections
from iou_d2.detectors.test_time_augmentation import with_tta
from views_by_hand import (
    mirrored_rows,
    nms_by_loops,
    nms_rows,
    random_image,
    resized,
    rows,
    rows_of,
    sorted_rows,
    to_image,
    views_of,
    vote_by_loops,
)

DENSE = ["retinanet", "iou_retinanet", "vfnet", "unitbox", "ssd_iou", "refinedet"]
TWO_STAGE = ["faster_rcnn", "iou_net"]
MASKS = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "BoxLossCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
)
# Few candidates, so that a detection more or less shows.
FEW = (
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "40", "MODEL.RPN.POST_NMS_TOPK_TEST", "30"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("INPUT.MIN_SIZE_TEST", "96", "TEST.DETECTIONS_PER_IMAGE", "60"),
)
# Weights of class scores, which are small at random.
SCORES = ("cls_score.weight", "cls_pred.weight", "confidence.weight", "objectness_logits.weight")
IMAGE = random_image(80, 100)
SIZES = [(64, 80), (96, 120)]  # of the views of MIN_SIZES 64 and 96
SQUARES = [(64, 64), (96, 96)]
VIEWS = ("TEST.AUG.MIN_SIZES", "(64, 96)", "TEST.AUG.MAX_SIZE", "1000")


@pytest.fixture
def build(small_cfg):
    """A function: (name of a quick config, overrides) -> its config, and a model in test mode."""

    def make(name: str, *overrides: str):
        cfg = small_cfg(f"configs/quick/{name}_shapes.yaml", *FEW, *VIEWS, *overrides)
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        with torch.no_grad():  # so that scores differ by more than rounding
            for name, parameter in model.named_parameters():
                if name.endswith(SCORES):
                    parameter.mul_(8)
        return cfg, model

    return make


def detect(cfg, model, image=IMAGE, **more):
    return with_tta(cfg, model)([{"image": image, **more}])[0]["instances"]


def sizes_of(name: str) -> list[tuple[int, int]]:
    return SQUARES if name in ("ssd_iou", "refinedet") else SIZES


@pytest.mark.parametrize(
    "name, overrides",
    [(name, ()) for name in DENSE + TWO_STAGE]
    + [("iou_net", ("MODEL.IOU_NET.NMS", "soft_linear", "MODEL.IOU_NET.SCORE_TIMES_IOU", "True"))]
    + [("iou_net", ("MODEL.IOU_NET.NMS", "soft_linear", "MODEL.IOU_NET.SOFT_NMS_BY", "product"))]
    + [("iou_net", ("MODEL.IOU_NET.REFINE_BY", "regression", "MODEL.IOU_NET.BOX_OF", "best_class"))]
    + [("faster_rcnn", MASKS), ("iou_net", MASKS), ("faster_rcnn", CASCADE)]
    + [("faster_rcnn", ("MODEL.ROI_HEADS.MIN_SIZE_TEST", "20.0"))],
)
@torch.no_grad()
def test_one_view_is_plain_inference_to_the_last_bit(build, name, overrides):
    one = ("TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.FLIP", "False", "INPUT.SQUARE_SIZE", "96")
    cfg, model = build(name, *overrides, *one)
    inputs = {"image": resized(IMAGE, sizes_of(name)[1]), "height": 80, "width": 100}
    plain = model([inputs])[0]["instances"].get_fields()
    found = detect(cfg, model).get_fields()
    assert found.keys() == plain.keys() and len(plain["scores"]) > 5
    for key, value in plain.items():
        both = [getattr(x, "tensor", x) for x in (value, found[key])]
        assert torch.equal(*both), key


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_C4_1x", "iou_net_R_50_C4_1x"])
@torch.no_grad()
def test_one_view_of_a_single_map_is_plain_inference(small_cfg, name):
    small = ("MODEL.RESNETS.NORM", "BN", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32, 64]]")
    one = ("TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.FLIP", "False")
    everything = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    cfg = small_cfg(f"configs/{name}.yaml", *FEW, *MASKS, *small, *one, *everything)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    inputs = {"image": resized(IMAGE, SIZES[1]), "height": 80, "width": 100}
    plain = model([inputs])[0]["instances"].get_fields()
    found = detect(cfg, model).get_fields()
    assert found.keys() == plain.keys() and len(plain["scores"]) > 5
    for key, value in plain.items():
        assert torch.equal(*(getattr(x, "tensor", x) for x in (value, found[key]))), key
    cfg.TEST.AUG.FLIP = True
    assert len(detect(cfg, model)) > 5


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_a_dense_detector_suppresses_the_candidates_of_all_views(build, name):
    cfg, model = build(name)
    boxes, scores, classes = [], [], []
    for view, mirrored in views_of(IMAGE, sizes_of(name), mirrors=True):
        images = model.preprocess_image([{"image": view}])
        (levels,) = model.image_candidates(model.predict(images.tensor), images.image_sizes)
        for x in levels:
            boxes.append(to_image(x.pred_boxes.tensor, view, mirrored, IMAGE))
            scores.append(x.scores)
            classes.append(x.pred_classes)
    found = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
    threshold = cfg.MODEL.RETINANET.NMS_THRESH_TEST
    expected = nms_rows(*found, IMAGE, threshold, cfg.TEST.DETECTIONS_PER_IMAGE)
    result = rows_of(detect(cfg, model), IMAGE)
    assert len(expected) > 20 and result.shape == expected.shape
    torch.testing.assert_close(sorted_rows(result), sorted_rows(expected), rtol=0, atol=2e-3)


def views_of_rcnn(model, heads_of):
    """What `heads_of` (features, proposals) gives of each view, with the view."""
    found = []
    for view, mirrored in views_of(IMAGE, SIZES, mirrors=True):
        images = model.preprocess_image([{"image": view}])
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        found.append((view, mirrored, heads_of(features, proposals)))
    return found


@pytest.mark.parametrize("overrides", [(), CASCADE], ids=["faster", "cascade"])
@torch.no_grad()
def test_an_rcnn_has_the_proposals_of_each_view(build, overrides):
    cfg, model = build("faster_rcnn", *overrides)
    boxes, scores, classes = [], [], []
    for view, mirrored, regressed in views_of_rcnn(model, model.roi_heads.regress):
        of_classes, probabilities = (x[0] for x in regressed)
        for class_ in range(3):
            column = 4 * class_ if of_classes.shape[1] > 4 else 0
            above = probabilities[:, class_] > 0.05
            own = of_classes[above, column : column + 4].clone()
            own[:, 0::2].clamp_(0, view.shape[2])
            own[:, 1::2].clamp_(0, view.shape[1])
            boxes.append(to_image(own, view, mirrored, IMAGE))
            scores.append(probabilities[above, class_])
            classes.append(torch.full((len(own),), class_))
    found = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
    threshold = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
    expected = nms_rows(*found, IMAGE, threshold, cfg.TEST.DETECTIONS_PER_IMAGE)
    result = rows_of(detect(cfg, model), IMAGE)
    assert len(expected) > 20 and result.shape == expected.shape
    torch.testing.assert_close(sorted_rows(result), sorted_rows(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_iou_net_ranks_by_the_iou_that_each_view_predicts(build, tmp_path, calibrated):
    predicted, true = knots = [0, 0.49, 0.52, 1], [0, 0.1, 0.9, 1]
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"knots": dict(zip(("predicted", "true"), knots))}))
    keys = ("MODEL.CALIBRATION", str(file), "MODEL.IOU_NET.RANK_BY", "product")
    cfg, model = build("iou_net", "MODEL.IOU_NET.REFINE_STEPS", "0", *(keys if calibrated else ()))
    heads, merged = model.roi_heads, []
    for view, mirrored, (features, candidates) in views_of_rcnn(
        model, lambda features, proposals: (features, heads.candidates(features, proposals))
    ):
        (x,) = candidates
        ious = heads.iou_branch.predict(heads.levels(features), [x.pred_boxes], x.pred_classes)
        boxes = to_image(x.pred_boxes.tensor, view, mirrored, IMAGE)
        merged.append((boxes, ious, x.scores, x.pred_classes))
    boxes, ious, scores, classes = (torch.cat(x) for x in zip(*merged))
    worth = scores * torch.from_numpy(np.interp(ious, predicted, true))
    ranks = worth if calibrated else ious
    # Algorithm 1: NMS by the predicted IoU; what is kept takes the best score that it suppresses.
    kept = nms_by_loops(boxes, ranks, scores, classes, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)
    kept.sort(key=lambda x: -x[1])
    index = torch.tensor([i for i, _ in kept[:60]])
    taken = torch.tensor([score for _, score in kept[:60]])
    expected = rows(boxes[index], taken, classes[index], IMAGE)
    result = rows_of(detect(cfg, model), IMAGE)
    assert len(expected) > 20 and result.shape == expected.shape
    torch.testing.assert_close(sorted_rows(result), sorted_rows(expected), rtol=0, atol=2e-3)


@torch.no_grad()
def test_iou_net_refines_on_the_view_of_the_size_that_was_trained(build):
    cfg, model = build("iou_net")
    found = detect(cfg, model)
    view = resized(IMAGE, SIZES[1])  # INPUT.MIN_SIZE_TEST is 96
    features = model.backbone(model.preprocess_image([{"image": view}]).tensor)
    boxes = found.pred_boxes.clone()
    boxes.scale(1.2, 1.2)
    heads = model.roi_heads
    ious = heads.iou_branch.predict(heads.levels(features), [boxes], found.pred_classes)
    torch.testing.assert_close(found.pred_ious, ious.clamp(0, 1), rtol=1e-3, atol=1e-4)
    cfg.MODEL.IOU_NET.REFINE_STEPS = 0
    still = build_model(cfg).eval()
    still.load_state_dict(model.state_dict())
    before = detect(cfg, still)
    assert not torch.equal(before.pred_boxes.tensor, found.pred_boxes.tensor)
    assert found.pred_ious.mean() > before.pred_ious.mean()


@torch.no_grad()
def test_masks_are_the_mean_over_the_views(build):
    cfg, model = build("faster_rcnn", *MASKS)
    found = detect(cfg, model)
    tta = with_tta(cfg, model)
    views, chosen = tta.make_views(IMAGE)
    readings = [tta.reader.read(view, True) for view in views]
    boxes = tta.merge(readings, chosen, tta.reader.suppress)
    masks = []
    for view, mirrored in views_of(IMAGE, SIZES, mirrors=True):
        there = boxes.pred_boxes.clone()
        there.scale(view.shape[2] / 120, view.shape[1] / 96)
        if mirrored:
            there.tensor[:, [0, 2]] = view.shape[2] - there.tensor[:, [2, 0]]
        given = type(boxes)((view.shape[1:]), pred_boxes=there, pred_classes=boxes.pred_classes)
        (output,) = model.inference([{"image": view}], [given], do_postprocess=False)
        masks.append(output.pred_masks.flip(3) if mirrored else output.pred_masks)
    boxes.pred_masks = sum(masks) / len(masks)
    (expected,) = rescale_detections([boxes], [{"height": 80, "width": 100}])
    expected = expected["instances"].pred_masks
    assert found.pred_masks.shape == expected.shape == (len(found), 80, 100)
    assert 0 < expected.float().mean() < 1
    assert (found.pred_masks == expected).float().mean() > 0.9999


@pytest.mark.parametrize("name", ["retinanet", "unitbox", "refinedet", "faster_rcnn"])
@torch.no_grad()
def test_the_mirror_image_has_the_mirrored_detections(build, name):
    cfg, model = build(name)
    found, of_mirror = (rows_of(detect(cfg, model, x), x) for x in (IMAGE, IMAGE.flip(2)))
    expected = sorted_rows(mirrored_rows(of_mirror, 100))
    torch.testing.assert_close(sorted_rows(found), expected, rtol=0, atol=2e-3)
    cfg.TEST.AUG.FLIP = False
    found, of_mirror = (rows_of(detect(cfg, model, x), x) for x in (IMAGE, IMAGE.flip(2)))
    assert not torch.equal(sorted_rows(found), sorted_rows(mirrored_rows(of_mirror, 100)))


@torch.no_grad()
def test_a_symmetric_image_has_symmetric_boxes(build):
    everything = ("MODEL.RETINANET.NMS_THRESH_TEST", "1.0", "TEST.DETECTIONS_PER_IMAGE", "-1")
    cfg, model = build("vfnet", *everything)
    image = torch.cat([IMAGE, IMAGE.flip(2)], dim=2)
    found = rows_of(detect(cfg, model, image), image)
    assert len(found) > 100
    expected = sorted_rows(mirrored_rows(found, 200))
    torch.testing.assert_close(sorted_rows(found), expected, rtol=0, atol=2e-3)


def detections_of_views(model, sizes) -> list:
    """What is detected in each view alone: boxes in the image, scores and classes."""
    found = []
    for view, mirrored in views_of(IMAGE, sizes, mirrors=True):
        images = model.preprocess_image([{"image": view}])
        (x,) = model.detect(model.predict(images.tensor), images.image_sizes)
        boxes = to_image(x.pred_boxes.tensor, view, mirrored, IMAGE)
        found.append((boxes, x.scores, x.pred_classes))
    return found


def assert_voted(found, voted: list) -> None:
    expected, result = rows(*map(torch.tensor, zip(*voted)), IMAGE), rows_of(found, IMAGE)
    assert result.shape == expected.shape
    torch.testing.assert_close(sorted_rows(result), sorted_rows(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("merge, soft", [("vote", None), ("soft_vote", 0.01)])
@torch.no_grad()
def test_refinedet_votes_with_the_boxes_of_each_size(build, merge, soft):
    limits = [(45.0, 1e5), (0.0, 25.0)]
    cfg, model = build("refinedet", "TEST.AUG.MERGE", merge)
    cfg.TEST.AUG.BOX_SIZES = limits
    within = []
    for index, found in enumerate(detections_of_views(model, SQUARES)):
        sides = found[0][:, 2:] - found[0][:, :2]
        low, high = limits[index // 2]
        kept = (sides.max(dim=1).values > low) & (sides.min(dim=1).values < high)
        assert 0 < kept.sum() < len(kept)
        within.append([x[kept] for x in found])
    boxes, scores, classes = map(torch.cat, zip(*within))
    assert_voted(detect(cfg, model), vote_by_loops(boxes, scores, classes, 0.45, soft)[:60])


@torch.no_grad()
def test_all_classes_vote_together_where_one_nms_is_for_all(build):
    agnostic = ("MODEL.POINT_DETECTOR.CLASS_AGNOSTIC_NMS", "True", "TEST.AUG.MERGE", "vote")
    cfg, model = build("atss", *agnostic)
    boxes, scores, classes = map(torch.cat, zip(*detections_of_views(model, SIZES)))
    found = detect(cfg, model)
    assert len(classes.unique()) > 1 and len(found.pred_classes.unique()) > 1
    none = torch.zeros_like(classes)
    found.pred_classes = torch.zeros_like(found.pred_classes)
    assert_voted(found, vote_by_loops(boxes, scores, none, cfg.TEST.AUG.VOTE_THRESH)[:60])
