"""IoU-Net for the detections of any detector in ONNX Runtime and TorchScript, against the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exported_models import TWO_LEVELS, noise, small_model, small_two_stage, write_model
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.agreement import NOTHING, agreement, detections_of_outputs
from iou_d2.engine.export.check import compare, load
from iou_d2.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CONFIG = "configs/quick/iou_net_standalone_shapes.yaml"
SHAPES = ((2, 97, 131), (1, 65, 64), (3, 160, 96), (1, 40, 201))


def excited(*overrides):
    steps = ("MODEL.IOU_NET.REFINE_STEPS", "2")
    cfg, model = small_two_stage(CONFIG, *TWO_LEVELS, *steps, *overrides)
    model.roi_heads.iou_branch.iou_pred.weight.data *= 0.3
    return cfg, model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The config, the graph and the path of its file in ONNX."""
    cfg, model = excited()
    path = tmp_path_factory.mktemp("refinement") / "model.onnx"
    return cfg, write_model(cfg, model, path, outputs="refinement"), path


def agreement_at(shapes, run, graph, cfg):
    total = NOTHING
    for shape in shapes:
        total = total.joined(compare(run, graph, noise(*shape), cfg))
    return total


def test_onnx_runtime_refines_as_the_model_does(exported):
    cfg, graph, path = exported
    found = agreement_at(SHAPES, load(path, "onnx"), graph, cfg)
    assert found.pairs > 150 and found.holds(pixels=1e-3)
    images, boxes, scores, classes = graph.inputs_with(noise(1, 97, 131))
    (still,) = build_graph(*excited("MODEL.IOU_NET.REFINE_STEPS", "0"), "refinement").expected(
        images, boxes, scores, classes
    )
    outputs = dict(zip(graph.names, load(path, "onnx")(images, boxes, scores, classes)))
    moved = outputs["boxes"][0, : len(still["boxes"])]
    assert np.abs(moved - still["boxes"]).max() > 0.3


def test_torchscript_refines_as_the_model_does(tmp_path):
    cfg, model = excited("MODEL.IOU_NET.SCORE_TIMES_IOU", "True")
    path = tmp_path / "model.pt"
    graph = write_model(cfg, model, path, outputs="refinement", format="torchscript")
    found = agreement_at(SHAPES[:2], load(path, "torchscript"), graph, cfg)
    assert found.pairs > 70 and found.holds(pixels=1e-3)


@pytest.mark.parametrize("count", (0, 1, 7))
def test_boxes_that_are_none_leave_none(exported, count):
    """Too low a score, no class of the model, no finite side, no area; and no boxes at all."""
    _, graph, path = exported
    boxes = torch.tensor([[10.0, 10, 40, 40]]).repeat(7, 1)
    scores = torch.tensor([0.01, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0])
    classes = torch.tensor([0, -1, 3, 0, 0, 0, 0])
    boxes[3, 0], boxes[4, 2], boxes[5, 2] = torch.nan, torch.inf, 10
    given = boxes[None, :count], scores[None, :count], classes[None, :count]
    outputs = dict(zip(graph.names, load(path, "onnx")(noise(1, 64, 64), *given)))
    assert outputs["counts"].tolist() == [0] and not outputs["boxes"].any()
    assert outputs["boxes"].shape == (1, 100, 4) and (outputs["classes"] == -1).all()


def test_other_models_and_archives_are_refused(tmp_path):
    cfg, model = excited()
    with pytest.raises(InputError, match="does not follow the loops of precise RoI"):
        write_model(cfg, model, tmp_path / "model.pt2", outputs="refinement", format="pt2")
    plain = small_two_stage("configs/quick/faster_rcnn_shapes.yaml")
    with pytest.raises(InputError, match="ROIHeads has no IoU branch to refine boxes with"):
        build_graph(*plain, "refinement")
    with pytest.raises(InputError, match="BoxLossRetinaNet has no IoU branch"):
        build_graph(*small_model("configs/quick/retinanet_shapes.yaml"), "refinement")


def test_what_another_graph_puts_out_as_candidates_is_taken_as_it_is():
    cfg, model = excited()
    graph = build_graph(cfg, model, "refinement")
    detector = build_graph(*small_model("configs/quick/retinanet_shapes.yaml"), "candidates")
    images = noise(2, 97, 131)
    given = dict(zip(("boxes", "scores", "classes"), detector(images)))
    assert (given["classes"] == -1).any()  # behind those that there are
    outputs = [x.numpy() for x in graph(images, *given.values())]
    total = agreement(
        graph.expected(images, *given.values()),
        detections_of_outputs(graph.names, outputs),
        100,
        graph.score_threshold,
    )
    assert total.pairs > 40 and total.holds(pixels=1e-3)
