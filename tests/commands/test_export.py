"""`iou-d2 export`, and what `detect` and `eval` make of its files."""

from __future__ import annotations

import json
import os
import sys

import cv2
import numpy as np
import pytest
import torch

from command_line import metrics_of, run_alone
from exported_models import SMALL, small_model
from iou_d2.commands import detect, export
from iou_d2.commands import eval as evaluate
from iou_d2.data.shapes_image import CLASSES
from iou_d2.errors import InputError
from iou_d2.runtime import ShortestEdge, Square

pytest.importorskip("onnx")

CONFIG = "configs/quick/unitbox_shapes.yaml"


@pytest.fixture
def weights(tmp_path) -> str:
    _, model = small_model(CONFIG)
    path = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict(), "class_names": ["a", "b", "c"]}, path)
    return path


def run_export(tmp_path, weights, *arguments, name="model.onnx", overrides=()) -> str:
    path = str(tmp_path / name)
    pairs = [*SMALL, "MODEL.WEIGHTS", weights, *overrides]
    export.main(["--config", CONFIG, "--output", path, *arguments, *pairs])
    return path


def test_it_writes_checks_and_tells(tmp_path, weights, capsys):
    run_export(tmp_path, weights, "--size", "64x96", "--batch", "1", "--opset", "18")
    printed = capsys.readouterr().out
    assert "gives boxes, scores, classes, counts of images." in printed
    assert "It and the model agree about" in printed
    run_export(tmp_path, weights, "--with", "raw", "--format", "torchscript", name="model.pt")
    assert "boxes (2, " in capsys.readouterr().out


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "detectron2", "fvcore"):
    sys.modules[name] = None  # an import of it fails
from iou_d2.commands.main import main
arguments = ["detect", "--input", sys.argv[2], "--output", sys.argv[3]]
try:
    main([*arguments, "--config", "x.yaml"])
except SystemExit as ended:
    print(ended)
main([*arguments, "--model", sys.argv[1], "--confidence-threshold", "0"])
"""


def test_detect_takes_the_file(tmp_path, weights):
    path = run_export(tmp_path, weights)
    cv2.imwrite(str(tmp_path / "x.png"), np.full((48, 64, 3), 90, dtype=np.uint8))
    arguments = ["--input", str(tmp_path / "x.png"), "--output", str(tmp_path / "out")]
    arguments += ["--confidence-threshold", "0"]
    program = [sys.executable, "-c", WITHOUT_TORCH, path, arguments[1], arguments[3]]
    printed = run_alone({**os.environ, "PYTHONPATH": os.getcwd()}, program)
    assert "Exported models alone run without it: see --model." in printed
    (record,) = json.loads((tmp_path / "out/detections.json").read_text())
    assert cv2.imread(str(tmp_path / "out/x.png")).shape == (600, 800, 3)
    detect.main(["--config", CONFIG, *arguments, *SMALL, "MODEL.WEIGHTS", weights])
    (expected,) = json.loads((tmp_path / "out/detections.json").read_text())
    assert len(record["detections"]) == len(expected["detections"]) > 10
    for found, other in zip(record["detections"], expected["detections"]):
        assert found["score"] == pytest.approx(other["score"], abs=1e-4)
        assert found.keys() == other.keys()
    assert {x["class"] for x in record["detections"]} <= {"a", "b", "c"}
    with pytest.raises(InputError, match="--model has no config, of which MODEL.DEVICE could be"):
        detect.main(["--model", path, *arguments, "MODEL.DEVICE", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "overrides", "sentence"),
    [
        ((), ("MODEL.WEIGHTS", ""), "Nothing is trained: give MODEL.WEIGHTS"),
        ((), ("MODEL.UNITBOX.INFERENCE", "ellipses"), "set MODEL.UNITBOX.INFERENCE nms"),
        (("--opset", "23"), (), "--opset is 17 to 22, but it is 23"),
    ],
)
def test_what_is_wrong_is_a_sentence(tmp_path, weights, arguments, overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        run_export(tmp_path, weights, *arguments, overrides=overrides)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("arguments", [("--size", "64"), ("--size", "0x9"), ("--batch", "0")])
def test_sizes_and_batches_are_numbers(tmp_path, weights, arguments, capsys):
    with pytest.raises(SystemExit):
        run_export(tmp_path, weights, *arguments)
    assert "not" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_for_one_size_has_that_of_the_square():
    export.require_size((300, 300), Square(300))
    export.require_size(None, Square(300))
    export.require_size((256, 300), ShortestEdge(800, 1333))
    with pytest.raises(InputError, match="--size is 256x300, but .*give --size 300x300 or dynamic"):
        export.require_size((256, 300), Square(300))


def test_a_file_that_disagrees_ends_in_a_sentence(tmp_path, weights, monkeypatch):
    check = sys.modules["iou_d2.engine.export.check"]
    monkeypatch.setattr(check, "agreement", lambda *_: check.Agreement(3, 3, 0, 0.0, 0.0))
    with pytest.raises(SystemExit, match="do not agree about 3 detections in 2 random images"):
        run_export(tmp_path, weights)


def test_eval_of_the_file_is_that_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    small = ("MODEL.RETINANET.NUM_CLASSES", str(len(CLASSES)), "INPUT.MIN_SIZE_TEST", "80")
    cfg, model = small_model(CONFIG, *small)
    weights = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict(), "class_names": list(CLASSES)}, weights)
    path = run_export(tmp_path, weights, overrides=small)
    tables = []
    for source in (["--model", path], ["--config", CONFIG, "--num-gpus", "0"]):
        pairs = ["OUTPUT_DIR", str(tmp_path / source[0])]
        if source[0] == "--config":
            pairs += [*SMALL, *small, "MODEL.WEIGHTS", weights, "TEST.EXPECTED_RESULTS", "[]"]
        evaluate.main([*source, "--test", "shapes_val_6x64", *pairs])
        tables.append(metrics_of(tmp_path / source[0]))
        record = json.loads((tmp_path / source[0] / "evaluation.json").read_text())
        assert record["outcome"] == "finished" and record["results"]["bbox/AP"] is not None
    found, expected = tables
    assert found.keys() == expected.keys() and "bbox/AP" in found
    assert found == pytest.approx(expected, abs=0.05, nan_ok=True)
    with pytest.raises(InputError, match="leave --config out"):
        evaluate.main(["--model", path, "--config", CONFIG])


def test_a_file_computes_in_float32_and_is_no_compiled_code(tmp_path, weights):
    import onnx

    graphs = []
    for keys in ((), ("MODEL.PRECISION", "bfloat16", "MODEL.COMPILE", "True")):
        path = run_export(tmp_path, weights, "--size", "64x96", "--batch", "1", overrides=keys)
        graphs.append(onnx.load(path).graph)
    plain, found = graphs
    assert [x.op_type for x in found.node] == [x.op_type for x in plain.node]
    assert onnx.TensorProto.BFLOAT16 not in {x.data_type for x in found.initializer}
    assert list(found.initializer) == list(plain.initializer)
