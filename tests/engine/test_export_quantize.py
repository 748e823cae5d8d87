"""Files in 8 bits."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

import quantize as tool
from exported_models import TWO_LEVELS, noise, small_model, small_two_stage, write_model
from iou_d2.engine.export.check import load
from iou_d2.engine.export.files import InputSpec
from iou_d2.engine.export.quantize import quantize
from iou_d2.errors import InputError
from iou_d2.runtime import Detector

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CONFIG, LEVELS = "configs/quick/vfnet_shapes.yaml", 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of all points, and the same in 8 bits with ranges of its own inputs."""
    folder = tmp_path_factory.mktemp("files")
    path, small = folder / "model.onnx", folder / "int8.onnx"
    write_model(*small_model(CONFIG), path, outputs="raw")
    count = quantize(path, small, [noise(1, 96, 128).numpy(), noise(2, 64, 100).numpy()])
    return path, small, count


def test_it_says_nearly_the_same_in_a_smaller_file(files):
    path, small, _ = files
    assert small.stat().st_size < 0.5 * path.stat().st_size
    images = noise(1, 96, 128)
    (expected, *_), (found, *_) = load(path, "onnx")(images), load(small, "onnx")(images)
    side = np.abs(expected[..., 2:] - expected[..., :2]).mean()
    difference = np.abs(found - expected).mean()
    assert 0 < difference < 0.1 * side


def test_all_but_the_last_convolutions_have_integer_weights(files):
    _, small, count = files
    graph = onnx.load(small).graph
    integers = {x.name for x in graph.initializer if x.data_type == onnx.TensorProto.INT8}
    made_of = {node.output[0]: node for node in graph.node}
    kinds = {"float": [], "integer": []}
    for node in graph.node:
        if node.op_type == "Conv":
            source = made_of.get(node.input[1])
            is_integer = source is not None and source.input[0] in integers
            kinds["integer" if is_integer else "float"].append(node.name)
    assert len(kinds["integer"]) == count > 30
    assert all("pred" in name for name in kinds["float"]) and len(kinds["float"]) == 3 * LEVELS
    assert sum("star" in name for name in kinds["integer"]) == 2 * LEVELS


def test_it_is_still_a_file_for_the_detector(tmp_path):
    cfg, model = small_model("configs/quick/ssd_shapes.yaml", "MODEL.CLASS_NAMES", "['a','b','c']")
    spec = InputSpec((128, 128), 1)
    write_model(cfg, model, tmp_path / "model.onnx", spec=spec)
    picture = noise(1, 90, 70)[0].permute(1, 2, 0).numpy()
    images, _ = Detector(tmp_path / "model.onnx").prepare(picture)
    assert images.shape == (1, 3, 128, 128)
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx", [images])
    detector = Detector(tmp_path / "int8.onnx")
    assert detector.description.class_names == ["a", "b", "c"]
    assert len(detector(picture)["scores"]) > 10


def test_the_tool_takes_pictures_at_equal_steps(tmp_path, capsys):
    write_model(*small_model("configs/quick/ssd_shapes.yaml"), tmp_path / "model.onnx")
    for grey in range(9):
        picture = np.full((20, 30, 3), grey, dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{grey}.png"), picture)
    inputs = tool.inputs_of(tmp_path / "model.onnx", [str(tmp_path)], 3)
    assert [image.mean() for image in inputs] == [0, 4, 8]
    arguments = ["--model", str(tmp_path / "model.onnx"), "--images", str(tmp_path)]
    arguments += ["--output", str(tmp_path / "int8.onnx"), "--count", "2"]
    tool.main(arguments)
    assert "convolutions in 8 bits" in capsys.readouterr().out
    assert Detector(tmp_path / "int8.onnx").description.outputs == "detections"


def test_two_stage_detectors_have_integer_box_heads_and_types_behind_loops(tmp_path):
    pooler = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPool")
    cascade = ("MODEL.ROI_HEADS.NAME", "BoxLossCascadeROIHeads")
    agnostic = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
    config = "configs/quick/faster_rcnn_shapes.yaml"
    path, small = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    write_model(*small_two_stage(config, *pooler, *TWO_LEVELS, *cascade, *agnostic), path)
    quantize(path, small, [noise(1, 96, 128).numpy()])
    nodes = onnx.load(small).graph.node
    made_of = {name: node.op_type for node in nodes for name in node.output}
    of_box_heads = [x for x in nodes if x.op_type == "Gemm" and x.name.startswith("/box_head.")]
    assert len(of_box_heads) == 3 * 2
    assert all(made_of[node.input[1]] == "DequantizeLinear" for node in of_box_heads)
    # What OpenVINO needs to read them.
    assert sum(kind == "ConcatFromSequence" for kind in made_of.values()) == 3
    used = [made_of.get(name) for node in nodes for name in node.input if node.op_type != "Cast"]
    assert "ConcatFromSequence" not in used
    assert load(small, "onnx")(noise(2, 64, 100))[-1].min() > 5


def test_what_cannot_be_quantized_is_a_sentence(files, tmp_path):
    path, *_ = files
    with pytest.raises(InputError, match="There is no picture from which 8 bits get"):
        quantize(path, tmp_path / "int8.onnx", [])
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="other.onnx is no file of `iou-d2 export`"):
        quantize(tmp_path / "other.onnx", tmp_path / "int8.onnx", [noise(1, 64, 64).numpy()])
