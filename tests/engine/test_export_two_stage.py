"""Files of two-stage detectors in ONNX Runtime and TorchScript, against the models themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import fast_rcnn

from exported_models import (
    SMALL_C4,
    SMALL_TWO_STAGE,
    TWO_LEVELS,
    noise,
    small_two_stage,
    write_model,
)
from iou_d2 import get_config
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.agreement import NOTHING
from iou_d2.engine.export.check import compare, load
from iou_d2.errors import InputError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FASTER = "configs/quick/faster_rcnn_shapes.yaml"
IOU_NET = "configs/quick/iou_net_shapes.yaml"
CASCADE = ("MODEL.ROI_HEADS.NAME", "BoxLossCascadeROIHeads")
IOU_NET_HEADS = ("MODEL.ROI_HEADS.NAME", "IoUNetROIHeads")
IOU_NET_CASCADE = ("MODEL.ROI_HEADS.NAME", "IoUNetCascadeROIHeads")
IOU_NET_RES5 = (
    *("MODEL.ROI_HEADS.NAME", "IoUNetRes5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['p4']"),
)
RPN = ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
AGNOSTIC = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
MASKS = ("MODEL.MASK_ON", "True")
# Images, height, width: sides that nothing divides, one image and three, fewer anchors than top-k.
SHAPES = ((2, 97, 131), (1, 65, 64), (3, 160, 96), (1, 40, 201))
# One box for all classes, another pooler, small boxes left out, as mmdetection and torchvision do.
OTHER_WAYS = (
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.ROI_HEADS.MIN_SIZE_TEST", "12.0"),
    *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"),
    *("2", "MODEL.RPN.MIN_SIZE", "9.0", "TEST.DETECTIONS_PER_IMAGE", "10"),
)


def agreement_of(path, cfg, model, shapes=SHAPES, **options):
    """How the file and the model agree, and the graph that was written."""
    graph = write_model(cfg, model, path, **options)
    run, total = load(path, options.get("format", "onnx")), NOTHING
    for shape in shapes:
        total = total.joined(compare(run, graph, noise(*shape), cfg))
    return total, graph


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
@pytest.mark.parametrize("overrides", [(), OTHER_WAYS], ids=["usual", "others"])
def test_a_file_of_faster_rcnn_detects_what_the_model_detects(tmp_path, format, overrides):
    options = {"format": format, "opset": 21 if overrides else 17}
    found, graph = agreement_of(tmp_path / "model", *small_two_stage(FASTER, *overrides), **options)
    assert set(graph.names) == {"boxes", "scores", "classes", "counts"}
    assert found.pairs >= 70 and found.holds()


@pytest.mark.parametrize(
    ("format", "overrides"),
    [
        ("onnx", (*CASCADE, *AGNOSTIC, *MASKS, *TWO_LEVELS)),
        (
            "torchscript",
            (
                *(*CASCADE, *AGNOSTIC, *MASKS, "MODEL.ROI_BOX_CASCADE_HEAD.SCORE_MEAN", "logits"),
                *("MODEL.ROI_MASK_HEAD.NAME", "CascadeMaskHead"),
                *("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"),
                *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPool"),
                *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "PrRoIPoolLegacy"),
            ),
        ),
        ("onnx", ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPoolLegacy", *TWO_LEVELS, *MASKS)),
    ],
)
def test_cascades_and_masks_are_those_of_the_model(tmp_path, format, overrides):
    cfg, model = small_two_stage(FASTER, *overrides)
    found, graph = agreement_of(tmp_path / "model", cfg, model, SHAPES[:3], format=format)
    assert graph.names == ["boxes", "scores", "classes", "counts", "masks"]
    assert found.pairs > 30 and found.holds()
    masks = graph(noise(2, 97, 131))[4]
    assert masks.shape == (2, 100, 28, 28) and masks[0, 0].std() > 0.01


@pytest.mark.parametrize(
    ("format", "overrides"),
    [
        ("onnx", ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPool")),
        ("torchscript", ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", *RPN, *MASKS)),
    ],
)
def test_a_file_of_heads_with_res5_detects_what_the_model_detects(tmp_path, format, overrides):
    few = ("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "10")
    config = "configs/faster_rcnn_R_50_C4_1x.yaml"
    cfg, model = small_two_stage(config, *SMALL_C4, *few, *overrides)
    found, graph = agreement_of(tmp_path / "model", cfg, model, SHAPES[1:2], format=format)
    assert ("masks" in graph.names) == ("MODEL.MASK_ON" in overrides)
    assert found.pairs > 5 and found.holds()


IOU_NETS = {
    "usual": (),
    "cascade": (
        *(*IOU_NET_CASCADE, *AGNOSTIC, *MASKS, "MODEL.IOU_NET.SCORE_TIMES_IOU", "True"),
        *("MODEL.IOU_NET.RANK_BY", "product", "MODEL.IOU_NET.LOSS_TYPE", "bce"),
    ),
    "iterated": (
        *("MODEL.IOU_NET.REFINE_BY", "regression", "MODEL.IOU_NET.NMS", "plain"),
        *("MODEL.IOU_NET.BOX_OF", "best_class"),
    ),
    "by_score": (
        *("MODEL.IOU_NET.RANK_BY", "score", "MODEL.IOU_NET.CLASS_AGNOSTIC", "True"),
        *("MODEL.IOU_NET.REFINE_ROLL_BACK", "True", "TEST.DETECTIONS_PER_IMAGE", "20"),
    ),
}


@pytest.mark.parametrize(
    ("format", "name"),
    [("onnx", "usual"), ("onnx", "cascade"), *(("torchscript", name) for name in IOU_NETS)],
)
def test_a_file_of_iou_net_detects_what_the_model_detects(tmp_path, format, name):
    # Writing a file takes seconds for each step.
    steps = ("MODEL.IOU_NET.REFINE_STEPS", "1" if name == "cascade" else "2")
    levels = () if name == "usual" else TWO_LEVELS
    cfg, model = small_two_stage(IOU_NET, *steps, *levels, *IOU_NETS[name])
    found, graph = agreement_of(tmp_path / "model", cfg, model, SHAPES[:3], format=format)
    fields = {"boxes", "scores", "classes", "counts", "cls_scores", "pred_ious"}
    assert set(graph.names) == fields | ({"masks"} if name == "cascade" else set())
    assert found.pairs >= 100 and found.holds()


def test_refinement_moves_the_boxes_of_the_graph():
    boxes = []
    for steps in ("0", "5"):
        cfg, model = small_two_stage(IOU_NET, "MODEL.IOU_NET.REFINE_STEPS", steps)
        boxes.append(build_graph(cfg, model)(noise(1, 97, 131))[0])
    assert (boxes[0] - boxes[1]).abs().max() > 1


NO_DETECTION = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99999")
NO_PROPOSAL = ("MODEL.RPN.MIN_SIZE", "10000.0")


@pytest.mark.parametrize(
    ("format", "config", "overrides"),
    [
        ("onnx", FASTER, (*MASKS, *TWO_LEVELS, *NO_PROPOSAL)),
        ("onnx", IOU_NET, ("MODEL.IOU_NET.REFINE_STEPS", "1", *TWO_LEVELS, *NO_DETECTION)),
        ("torchscript", FASTER, (*MASKS, *TWO_LEVELS, *NO_DETECTION)),
        ("torchscript", IOU_NET, (*TWO_LEVELS, *NO_PROPOSAL)),
    ],
)
def test_without_a_detection_or_a_proposal_all_is_padding(tmp_path, format, config, overrides):
    cfg, model = small_two_stage(config, *overrides)
    graph = write_model(cfg, model, tmp_path / "model", format=format)
    outputs = dict(zip(graph.names, load(tmp_path / "model", format)(noise(2, 70, 90))))
    assert outputs["counts"].tolist() == [0, 0]
    assert outputs["boxes"].shape == (2, 100, 4) and not outputs["boxes"].any()
    assert not outputs["scores"].any() and (outputs["classes"] == -1).all()
    assert config == IOU_NET or not outputs["masks"].any()


def test_candidates_are_those_that_nms_is_given(tmp_path, monkeypatch):
    cfg, model = small_two_stage(FASTER, *TWO_LEVELS)
    graph = write_model(cfg, model, tmp_path / "model", outputs="candidates")
    images, seen, nms = noise(1, 97, 131), [], fast_rcnn.batched_nms
    outputs = dict(zip(graph.names, load(tmp_path / "model", "onnx")(images)))
    monkeypatch.setattr(fast_rcnn, "batched_nms", lambda *x: seen.append(x) or nms(*x))
    with torch.no_grad():
        model([{"image": images[0]}])
    boxes, scores, classes, _ = (x.numpy() if torch.is_tensor(x) else x for x in seen[0])
    order = np.argsort(-scores)
    count = int(outputs["counts"][0])
    assert count == len(scores) > 40 and outputs["scores"].shape == (1, 150)
    np.testing.assert_allclose(outputs["scores"][0, :count], scores[order], atol=1e-4)
    np.testing.assert_allclose(
        np.sort(outputs["boxes"][0, :count], axis=0), np.sort(boxes, axis=0), atol=0.01
    )
    assert sorted(outputs["classes"][0, :count]) == sorted(classes)


def test_raw_outputs_are_all_proposals_with_all_classes(tmp_path):
    cfg, model = small_two_stage(FASTER, *TWO_LEVELS)
    graph = write_model(cfg, model, tmp_path / "model", outputs="raw")
    images = noise(2, 97, 131)
    outputs = dict(zip(graph.names, load(tmp_path / "model", "onnx")(images)))
    with torch.no_grad():
        batch = model.preprocess_image([{"image": image} for image in images])
        features = model.backbone(batch.tensor)
        proposals, _ = model.proposal_generator(batch, features)
        boxes, probabilities = model.roi_heads.regress(features, proposals)
    for image, proposed in enumerate(proposals):
        count = len(proposed)
        expected = boxes[image].view(count, 3, 4).numpy()
        np.testing.assert_allclose(outputs["boxes"][image, :count], expected, atol=0.01)
        scores = outputs["scores"][image]
        np.testing.assert_allclose(scores[:count], probabilities[image][:, :3], atol=1e-4)
        assert not scores[count:].any()


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (FASTER, ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", *RPN)),
        (FASTER, ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", *RPN, *AGNOSTIC)),
        (FASTER, ("MODEL.ROI_HEADS.IN_FEATURES", "['p4']", *MASKS)),
        (FASTER, ("TEST.DETECTIONS_PER_IMAGE", "-1")),
        (IOU_NET, ("MODEL.META_ARCHITECTURE", "StandaloneIoUNet")),
        (IOU_NET, ("TEST.DETECTIONS_PER_IMAGE", "-1", "MODEL.IOU_NET.REFINE_STEPS", "0")),
    ],
)
def test_the_graph_of_other_heads_detects_what_the_model_detects(config, overrides):
    cfg, model = small_two_stage(config, *overrides)
    graph = build_graph(cfg, model)
    images = noise(2, 97, 131)
    outputs = [x.numpy() for x in graph(images)]
    found = compare(lambda _: outputs, graph, images, cfg)
    assert found.pairs > 40 and found.holds()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "part", ["roi_heads.box_predictor.cls_score", "proposal_generator.rpn_head.objectness_logits"]
)
def test_scores_that_are_no_numbers_are_no_detections(part, value):
    cfg, model = small_two_stage(FASTER)
    model.get_submodule(part).bias.data.fill_(value)
    images = noise(1, 64, 64)
    with torch.no_grad():
        assert not len(model([{"image": images[0]}])[0]["instances"])
    assert build_graph(cfg, model)(images)[3].tolist() == [0]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
            "RoIMaxPool cannot be exported: MODEL.ROI_BOX_HEAD.POOLER_TYPE has to be 'ROIAlignV2'",
        ),
        (
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoISPP"),
            "A pooler of SPPPooler, SpatialPyramidPool cannot be exported: MODEL.ROI_BOX_HEAD",
        ),
        (
            (*MASKS, "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIPool"),
            "cannot be exported: MODEL.ROI_MASK_HEAD.POOLER_TYPE has to be",
        ),
        (("MODEL.KEYPOINT_ON", "True"), "Keypoints cannot be exported: MODEL.KEYPOINT_ON False"),
        (
            (*IOU_NET_HEADS, "MODEL.IOU_NET.NMS", "soft_linear", "MODEL.IOU_NET.REFINE_STEPS", "0"),
            "SoftNMS is a loop that no graph can hold: set MODEL.IOU_NET.NMS guided or plain",
        ),
        (
            (*IOU_NET_HEADS, "MODEL.IOU_NET.REFINE_STEPS", "0"),
            "An IoU branch is exported with precise RoI pooling alone",
        ),
        (
            (*IOU_NET_RES5, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPool"),
            "MODEL.ROI_HEADS.NAME IoUNetRes5ROIHeads cannot be exported: only StandardROIHeads, ",
        ),
        (
            ("MODEL.META_ARCHITECTURE", "ProposalNetwork"),
            "MODEL.META_ARCHITECTURE ProposalNetwork cannot be exported",
        ),
    ],
)
def test_what_cannot_be_exported_names_the_key(overrides, sentence):
    cfg = get_config(FASTER, [*SMALL_TWO_STAGE, *overrides])
    with pytest.raises(InputError, match=sentence):
        build_graph(cfg, build_model(cfg))


def test_heads_of_ones_own_are_not_exported_as_their_parents():
    cfg, model = small_two_stage(FASTER)
    model.roi_heads.__class__ = type("Own", (type(model.roi_heads),), {})
    with pytest.raises(InputError, match="MODEL.ROI_HEADS.NAME Own cannot be exported"):
        build_graph(cfg, model)


def test_an_opset_that_onnx_runtime_has_not_is_refused(tmp_path):
    cfg, model = small_two_stage(FASTER)
    with pytest.raises(InputError, match="no RoiAlign of opset 22: --opset is 17 to 21 for this"):
        write_model(cfg, model, tmp_path / "model", opset=22)
    cfg, model = small_two_stage(IOU_NET)
    assert build_graph(cfg, model).last_opset == 22


def test_a_program_of_torch_export_detects_what_the_model_detects(tmp_path):
    low = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01")
    cfg, model = small_two_stage(FASTER, *MASKS, *TWO_LEVELS, *low)
    shapes = [(1, 128, 192), (3, 192, 128)]
    found, _ = agreement_of(tmp_path / "model", cfg, model, shapes, format="pt2")
    assert found.pairs > 20 and found.holds()


def test_torch_export_is_refused_where_pooling_is_a_loop(tmp_path):
    with pytest.raises(InputError, match="'PrRoIPool': --format is onnx or torchscript"):
        write_model(*small_two_stage(IOU_NET), tmp_path / "model", format="pt2")
    assert not list(tmp_path.iterdir())
