"""What the figures are drawn from, on detectors of random weights, against the detectors' own
inference and against loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_iou

from iou_d2.detectors.iou_net_inference import IteratedRegression
from iou_d2.engine.figures import source_of
from iou_d2.engine.figures.candidates import usable
from iou_d2.engine.figures.gather import path_rows, rows_of
from iou_d2.engine.figures.variants import suppressors, variants_of
from iou_d2.errors import InputError

IOU_NET = "configs/quick/iou_net_shapes.yaml"
FEW = (
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "25", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "40"),
    *("TEST.DETECTIONS_PER_IMAGE", "30"),
)
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "IoUNetCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
)
MASKS = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")


@pytest.fixture
def detector(small_cfg):
    """A function: config file and overrides -> the config and its detector in test mode."""

    def build(config, *overrides):
        torch.manual_seed(0)
        cfg = small_cfg(config, *FEW, *overrides)
        model = build_model(cfg).eval()
        branch = getattr(getattr(model, "roi_heads", None), "iou_branch", None)
        if branch is not None:  # a branch whose slope moves boxes, and class scores that differ
            torch.nn.init.normal_(branch.iou_pred.weight, std=0.5)
        return cfg, model

    return build


def planted(count=40, classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 40
    size = 20 + torch.rand(count, 2, generator=generator) * 30
    candidates = Instances((100, 100), pred_boxes=Boxes(torch.cat([corner, corner + size], 1)))
    candidates.scores = torch.rand(count, generator=generator)
    candidates.pred_ious = torch.rand(count, generator=generator)
    candidates.pred_classes = torch.randint(classes, (count,), generator=generator)
    return candidates


def kept_by_loops(candidates, rank, threshold):
    """Rows that greedy NMS within classes keeps."""
    iou = box_iou(candidates.pred_boxes.tensor, candidates.pred_boxes.tensor)
    kept = []
    for row in sorted(range(len(rank)), key=lambda row: -rank[row]):
        of_class = [k for k in kept if candidates.pred_classes[k] == candidates.pred_classes[row]]
        if all(iou[k, row] <= threshold for k in of_class):
            kept.append(row)
    return kept


def rows_in(kept, candidates):
    boxes = candidates.pred_boxes.tensor.tolist()
    return sorted(boxes.index(box) for box in kept.pred_boxes.tensor.tolist())


def test_each_kind_of_nms_leaves_what_loops_leave():
    candidates = planted()
    found = variants_of(candidates, suppressors(0.5, -1))
    assert list(found) == ["none", "nms", "soft_nms", "iou_nms"]
    assert rows_in(found["none"], candidates) == list(range(40))
    by_score = kept_by_loops(candidates, candidates.scores.tolist(), 0.5)
    by_iou = kept_by_loops(candidates, candidates.pred_ious.tolist(), 0.5)
    assert rows_in(found["nms"], candidates) == sorted(by_score)
    assert rows_in(found["iou_nms"], candidates) == sorted(by_iou) != sorted(by_score)
    assert len(by_score) < len(found["soft_nms"]) <= 40
    for kept in found.values():
        assert kept.scores.tolist() == sorted(kept.scores.tolist(), reverse=True)
    limited = variants_of(candidates, suppressors(0.5, 3))
    assert [len(kept) for kept in limited.values()] == [40, 3, 3, 3]
    candidates.remove("pred_ious")
    assert list(variants_of(candidates, suppressors(0.5, -1))) == ["none", "nms", "soft_nms"]


def test_what_is_no_number_is_no_candidate():
    candidates = planted(5)
    candidates.scores[1] = math.nan
    candidates.pred_boxes.tensor[3, 2] = math.inf
    left = usable(candidates)
    assert left.scores.tolist() == candidates.scores[[0, 2, 4]].tolist()
    nothing = usable(candidates[:0])
    assert [len(x) for x in variants_of(nothing, suppressors(0.5, 10)).values()] == [0] * 4


@pytest.mark.parametrize("overrides", [(), CASCADE, MASKS], ids=["faster", "cascade", "mask"])
def test_paths_are_what_the_detector_does_with_so_many_steps(detector, make_batch, overrides):
    cfg, model = detector(IOU_NET, *overrides)
    source = source_of(cfg, model, steps=4)
    (image,) = make_batch([3])
    with torch.no_grad():
        paths = source(image).paths
    postprocessor = model.roi_heads.postprocessor
    assert list(paths) == ["ascent", "regression"]
    for name, path in paths.items():
        assert len(path) == 5
        for steps, found in enumerate(path):
            ascent = dataclasses.replace(postprocessor.refiner, steps=steps)
            refiner = ascent if name == "ascent" else IteratedRegression(steps)
            model.roi_heads.postprocessor = dataclasses.replace(postprocessor, refiner=refiner)
            with torch.no_grad():
                (expected,) = model.inference([image], do_postprocess=False)
            finished = source.finish(found)
            for field in ("scores", "pred_ious", "pred_classes", "cls_scores"):
                assert torch.equal(finished.get(field), expected.get(field)), (name, steps, field)
            assert torch.equal(finished.pred_boxes.tensor, expected.pred_boxes.tensor)
        model.roi_heads.postprocessor = postprocessor
        first, last = path[0].pred_boxes.tensor, path[-1].pred_boxes.tensor
        assert len(first) == 30 and (first - last).abs().max() > 0.1, name


@pytest.mark.parametrize(
    "config", ["retinanet", "iou_retinanet", "vfnet", "ssd", "refinedet", "unitbox", "faster_rcnn"]
)
def test_nms_of_the_candidates_is_the_detectors_own(detector, make_batch, config):
    cfg, model = detector(f"configs/quick/{config}_shapes.yaml", "INPUT.SQUARE_SIZE", "96")
    source = source_of(cfg, model, steps=4)
    (image,) = make_batch([2])
    with torch.no_grad():
        found = source(image)
        (expected,) = model([image])
    node = cfg.MODEL.ROI_HEADS if config == "faster_rcnn" else cfg.MODEL.RETINANET
    kinds = suppressors(node.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE)
    rows = rows_of(variants_of(found.candidates, kinds)["nms"], image)
    expected = expected["instances"]
    assert [row["score"] for row in rows] == expected.scores.tolist() and len(rows) > 5
    assert list(source.left_out) == ["refinement"] and not found.paths
    assert found.candidates.has("pred_ious") == (config == "iou_retinanet")


def test_an_image_in_which_nothing_is_found(detector, make_batch):
    cfg, model = detector(IOU_NET, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    source = source_of(cfg, model, steps=2)
    (image,) = make_batch([0])
    with torch.no_grad():
        found = source(image)
    assert len(found.candidates) == 0
    for path in found.paths.values():
        assert [len(x) for x in path] == [0, 0, 0]
        assert rows_of(source.finish(path[2]), image) == path_rows(path, image) == []


def test_rows_of_a_path_are_in_pixels_of_the_image():
    first, second = (
        Instances((50, 100), pred_boxes=Boxes([[x, 10.0, 40.0, 30.0]])) for x in (0, 4)
    )
    for found, iou in ((first, 0.5), (second, 1.5)):
        found.scores, found.pred_classes = torch.tensor([0.25]), torch.tensor([1])
        found.pred_ious = torch.tensor([iou])
    (row,) = path_rows([first, second], {"image_id": 9, "height": 100, "width": 50})
    assert row["bbox"] == [0, 20, 20, 40] and row["boxes"] == [[0, 20, 20, 60], [2, 20, 20, 60]]
    assert row["pred_ious"] == [0.5, 1.0] and (row["image_id"], row["category_id"]) == (9, 1)


def test_a_pooler_without_a_gradient_for_boxes_has_no_ascent(detector, make_batch):
    pooler = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", "MODEL.IOU_NET.REFINE_STEPS", "0")
    cfg, model = detector(IOU_NET, *pooler)
    source = source_of(cfg, model, steps=1)
    assert list(source.left_out) == ["ascent"]
    with torch.no_grad():
        assert list(source(make_batch([1])[0]).paths) == ["regression"]


@pytest.mark.parametrize(
    ("config", "overrides", "sentence"),
    [
        ("unitbox_shapes", ("MODEL.UNITBOX.INFERENCE", "ellipses"), "'ellipses' has no NMS"),
        ("faster_rcnn_shapes", ("MODEL.META_ARCHITECTURE", "ProposalNetwork"), "ProposalNetwork"),
        ("faster_rcnn_shapes", ("MODEL.ROI_HEADS.NAME", "StandardROIHeads",
         "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"), "not known before NMS"),
        ("faster_rcnn_shapes", ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"), "RPN"),
    ],
)  # fmt: skip
def test_what_has_no_figures_is_told(detector, config, overrides, sentence):
    cfg, model = detector(f"configs/quick/{config}.yaml", *overrides)
    with pytest.raises(InputError, match=sentence):
        source_of(cfg, model, steps=1)
