"""Files of two-stage detectors in ONNX Runtime and TorchScript, against the models themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import fast_rcnn

from exported_models import SMALL_TWO_STAGE, noise, small_two_stage, write_model
from iou_d2 import get_config
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.agreement import NOTHING
from iou_d2.engine.export.check import compare, load
from iou_d2.errors import InputError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FASTER = "configs/quick/faster_rcnn_shapes.yaml"
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
    found, graph = agreement_of(
        tmp_path / "model", *small_two_stage(FASTER, *overrides), format=format
    )
    assert set(graph.names) == {"boxes", "scores", "classes", "counts"}
    assert found.pairs >= 70 and found.holds()


@pytest.mark.parametrize(
    "overrides",
    [
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99999"),
        ("MODEL.RPN.MIN_SIZE", "10000.0"),  # no proposal
    ],
    ids=["detection", "proposal"],
)
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_without_a_detection_or_a_proposal_all_is_padding(tmp_path, format, overrides):
    cfg, model = small_two_stage(FASTER, *overrides)
    graph = write_model(cfg, model, tmp_path / "model", format=format)
    outputs = dict(zip(graph.names, load(tmp_path / "model", format)(noise(2, 70, 90))))
    assert outputs["counts"].tolist() == [0, 0]
    assert outputs["boxes"].shape == (2, 100, 4) and not outputs["boxes"].any()
    assert not outputs["scores"].any() and (outputs["classes"] == -1).all()


def test_candidates_are_those_that_nms_is_given(tmp_path, monkeypatch):
    cfg, model = small_two_stage(FASTER)
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
    cfg, model = small_two_stage(FASTER)
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
    ("overrides", "sentence"),
    [
        (
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
            "RoIPool cannot be exported: set MODEL",
        ),
        (
            ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['p4']"),
            "MODEL.ROI_HEADS.NAME Res5ROIHeads cannot be exported: only StandardROIHeads, ",
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
