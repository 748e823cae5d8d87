"""Oracles of dense detectors: what follows from their definitions, and loops beside them."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from assign_by_hand import atss_oracle, iou_by_hand
from dense_detectors import DENSE
from iou_d2.engine.oracle import editor_of
from iou_d2.engine.oracle.evaluation import OracleModel, Row, plan
from iou_d2.engine.oracle.oracles import ORACLES, gt_bbox, gt_cls, gt_cls_iou, gt_ctr, gt_ctr_iou
from iou_d2.errors import InputError
from oracle_scene import Scene

WITH_QUALITY = ["iou_retinanet_shapes", "atss_shapes", "fcos_shapes", "ssd_iou_shapes"]
EVERYTHING = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")


def random_model(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if "iou_pred" in name or "quality_pred" in name:  # other IoUs than 0.5
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def make_scene(small_cfg, make_batch):
    def make(name, objects=(3, 1), *overrides):
        cfg = small_cfg(f"configs/quick/{name}.yaml", *EVERYTHING, *overrides)
        return Scene(random_model(cfg), make_batch(objects))

    return make


def class_scores_of(predictions):
    """(N, R, K) of all levels, read without an editor."""
    if hasattr(predictions, "deltas"):  # SSD, RefineDet
        if predictions.scores is not None:
            return predictions.scores
        return predictions.logits.softmax(dim=-1)[..., :-1]
    levels = predictions if isinstance(predictions, list) else [predictions]
    logits = [x.logits if hasattr(x, "deltas") else x.logits.flatten(2).mT for x in levels]
    return torch.cat(logits, dim=1).sigmoid()


def quality_of(predictions):
    """(N, R)."""
    if hasattr(predictions, "iou_logits"):
        return predictions.iou_logits[..., 0].sigmoid()
    if hasattr(predictions[0], "iou_logits"):
        return torch.cat([x.iou_logits[..., 0] for x in predictions], dim=1).sigmoid()
    return torch.cat([x.quality_logits.flatten(1) for x in predictions], dim=1).sigmoid()


def assert_same(found, expected, tolerance=0.0):
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b) > 0
        assert torch.equal(a.pred_classes, b.pred_classes)
        boxes = (a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert (boxes[0] - boxes[1]).abs().max() <= 100 * tolerance
        assert (a.scores - b.scores).abs().max() <= tolerance


@pytest.mark.parametrize("name", DENSE)
def test_without_objects_every_oracle_leaves_all_as_it_is(make_scene, name):
    scene = make_scene(name, (0, 0))
    assert len(scene.foreground.index) == 0
    for oracle in ORACLES.values():
        if oracle.why_not(scene.editor) is None:
            assert_same(scene.detect(scene.apply(oracle.replace)), scene.detect(scene.predictions))


@pytest.mark.parametrize("name", DENSE)
def test_its_own_values_leave_a_detector_as_it_is(make_scene, name):
    scene = make_scene(name)
    editor, foreground, before = scene.editor, scene.foreground, scene.predictions
    assert len(foreground.index) > 3
    place = (foreground.image, foreground.index)
    own = class_scores_of(before)[(*place, foreground.classes)]
    after = editor.with_class_scores(before, foreground, own)
    after = editor.with_boxes(after, foreground, editor.boxes(before, foreground))
    if editor.has_quality:
        after = editor.with_quality(after, foreground, quality_of(before)[place])
    assert_same(scene.detect(after), scene.detect(before), tolerance=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_gt_cls_leaves_all_other_scores_untouched(make_scene, name):
    scene = make_scene(name)
    before, after = class_scores_of(scene.predictions), class_scores_of(scene.apply(gt_cls))
    places = list(zip(*(x.tolist() for x in scene.foreground[:3])))
    assert len(set(places)) == len(places) > 0
    assert all(after[place] == 1 for place in places)
    for place in places:
        after[place] = before[place]
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", DENSE)
def test_true_boxes_have_an_iou_of_1(make_scene, name):
    scene = make_scene(name)
    edited = scene.apply(gt_bbox)
    boxes = scene.editor.boxes(edited, scene.foreground)
    assert (boxes - scene.foreground.boxes).abs().max() < 1e-3
    one, other = (class_scores_of(scene.apply(gt_bbox, x)) for x in (gt_cls, gt_cls_iou))
    assert (one - other).abs().max() < 1e-4
    # The oracles leave what they are given as it is.
    assert not torch.equal(scene.editor.boxes(scene.predictions, scene.foreground), boxes)
    if scene.editor.has_quality:
        quality = quality_of(scene.apply(gt_bbox, gt_ctr_iou))
        assert quality[scene.foreground.image, scene.foreground.index].min() > 1 - 1e-4
        changed = quality != quality_of(scene.predictions)
        assert changed.sum() == len(scene.foreground.index)


@pytest.mark.parametrize("name", DENSE)
def test_with_its_box_and_class_an_object_is_the_best_detection(make_scene, name):
    scene = make_scene(name, (1, 1))
    predictions = scene.editor.without_quality(scene.apply(gt_bbox, gt_cls))
    for found, truth in zip(scene.detect(predictions), scene.truth):
        assert found.scores[0] == 1 and found.pred_classes[0] == truth.gt_classes[0]
        assert (found.pred_boxes.tensor[0] - truth.gt_boxes.tensor[0]).abs().max() < 1e-3
        same = found.pred_classes == truth.gt_classes[0]
        assert found.scores[same][1:].max() < 1


@pytest.mark.parametrize("name", ["vfnet_shapes", "atss_shapes"])
def test_points_boxes_and_ious_are_those_of_a_loop(make_scene, name):
    # As published: at 0.5 a point of the last cells lies outside of the image and learns nothing.
    scene = make_scene(name, (3, 1), "MODEL.POINT_DETECTOR.POINT_OFFSET", "0.0")
    levels, model = scene.predictions, scene.model
    points = [level.points.tolist() for level in levels]
    flat = [point for level in points for point in level]
    distances = torch.cat([x.distances[-1].flatten(2) for x in levels], dim=2).double()
    expected = class_scores_of(levels)
    places = []
    for image, truth in enumerate(scene.truth):
        objects = truth.gt_boxes.tensor.tolist()
        scale = model.assigner.anchor_scale
        matches = atss_oracle(points, model.grid.strides, objects, 9, scale)
        for index, number in enumerate(matches):
            if number < 0:
                continue
            (x, y), (left, top, right, bottom) = flat[index], distances[image, :, index].tolist()
            iou = iou_by_hand((x - left, y - top, x + right, y + bottom), objects[number])
            expected[image, index, truth.gt_classes[number]] = iou
            places.append((image, index))
    assert places == list(zip(*(x.tolist() for x in scene.foreground[:2])))
    assert (class_scores_of(scene.apply(gt_cls_iou)) - expected).abs().max() < 1e-5


def test_centerness_is_that_of_a_loop(make_scene):
    scene = make_scene("atss_shapes")
    points = torch.cat([level.points for level in scene.predictions]).tolist()
    found = quality_of(scene.apply(gt_ctr))
    for image, index, _, box in zip(*(x.tolist() for x in scene.foreground[:4])):
        (x, y), (x1, y1, x2, y2) = points[index], box
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        value = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        assert found[image, index].item() == pytest.approx(value**0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "key", "plain"),
    [
        ("atss_shapes", "MODEL.POINT_DETECTOR.HEAD", "PointHead"),
        ("iou_retinanet_shapes", "MODEL.META_ARCHITECTURE", "BoxLossRetinaNet"),
        ("ssd_iou_shapes", "MODEL.META_ARCHITECTURE", "SSD"),
    ],
)
def test_without_quality_a_detector_is_the_one_without_that_branch(
    make_scene, small_cfg, name, key, plain
):
    scene = make_scene(name)
    cfg = small_cfg(f"configs/quick/{name}.yaml", *EVERYTHING, key, plain)
    model = build_model(cfg).eval()
    left = model.load_state_dict(scene.model.state_dict(), strict=False)
    assert not left.missing_keys and len(left.unexpected_keys) >= 2
    with torch.no_grad():
        expected = model.detect(model.predict(scene.images.tensor), scene.images.image_sizes)
    assert_same(scene.detect(scene.editor.without_quality(scene.predictions)), expected)


@pytest.mark.parametrize("name", ["vfnet_shapes", "ssd_iou_shapes"])
def test_the_row_of_nothing_is_the_detector(make_scene, name):
    scene = make_scene(name)
    rows, left_out = plan(scene.editor, ["gt_bbox", "gt_cls+gt_bbox", "gt_ctr", "gt_ctr_iou"])
    outputs = OracleModel(scene.model, scene.editor, rows)(scene.batch)
    row = "nothing_with_quality" if scene.editor.has_quality else "nothing"
    with torch.no_grad():
        expected = [x["instances"] for x in scene.model(scene.batch)]
    assert_same([x[row]["instances"] for x in outputs], expected)
    assert "gt_ctr" in left_out and ("gt_ctr_iou" in left_out) == (name == "vfnet_shapes")


def test_a_plan_has_both_rows_where_there_is_a_quality(make_scene):
    rows, left_out = plan(make_scene("atss_shapes").editor, ["gt_ctr", "gt_cls", "gt_iou_rank"])
    found = [(row.name, row.with_quality) for row in rows]
    both = [("gt_cls", False), ("gt_cls", True)]
    assert found == [("nothing", False), ("nothing", True), ("gt_ctr", True), *both]
    assert list(left_out) == ["gt_iou_rank"]


def test_an_image_without_annotations_is_one_without_objects(make_scene):
    scene = make_scene("vfnet_shapes", (0,))
    batch = [{k: v for k, v in scene.batch[0].items() if k != "instances"}]
    outputs = OracleModel(scene.model, scene.editor, [Row("a", False, [ORACLES["gt_cls"]])])(batch)
    assert_same([outputs[0]["a"]["instances"]], scene.detect(scene.predictions))


def test_what_is_no_oracle_is_named(make_scene):
    editor = make_scene("vfnet_shapes").editor
    with pytest.raises(InputError, match="'gt_box', but there are gt_ctr, gt_ctr_iou"):
        plan(editor, ["gt_cls+gt_box"])
    with pytest.raises(InputError, match="no oracle for MODEL.META_ARCHITECTURE Linear"):
        editor_of(torch.nn.Linear(1, 1))
