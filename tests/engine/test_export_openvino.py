"""Files of `iou-d2 export` in OpenVINO, against the models themselves."""

from __future__ import annotations

import numpy as np
import pytest

from exported_models import noise, small_model, small_two_stage, write_model
from iou_d2.engine.export.agreement import NOTHING
from iou_d2.engine.export.check import compare, load
from iou_d2.engine.export.quantize import quantize

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

# Not UnitBox, whose equal scores at the edges it orders in its own way.
NAMES = ("retinanet", "iou_retinanet", "vfnet", "fcos", "ssd_iou", "refinedet", "iou_net")
TWO_STAGE = ("faster_rcnn", "iou_net")
# In bfloat16, the default of CPUs that multiply it, nothing is equal.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.mark.parametrize("name", (*NAMES, "faster_rcnn"))
def test_openvino_detects_what_the_model_detects(tmp_path, name):
    build = small_two_stage if name in TWO_STAGE else small_model
    cfg, model = build(f"configs/quick/{name}_shapes.yaml")
    path = str(tmp_path / "model.onnx")
    graph = write_model(cfg, model, path)
    compiled = openvino.Core().compile_model(path, "CPU", EXACT)
    found = NOTHING
    for shape in ((2, 97, 131), (1, 65, 64)):
        run = lambda images: list(compiled(images.numpy()).values())  # noqa: E731
        found = found.joined(compare(run, graph, noise(*shape), cfg))
    assert found.pairs > 60 and found.holds(graph.doubtful)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_openvino_reads_two_stage_detectors_in_8_bits(tmp_path, name):
    pooler = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "PrRoIPool")
    steps = ("MODEL.IOU_NET.REFINE_STEPS", "0")
    cfg, model = small_two_stage(f"configs/quick/{name}_shapes.yaml", *pooler, *steps)
    path, small = tmp_path / "model.onnx", str(tmp_path / "int8.onnx")
    names = write_model(cfg, model, path).names
    images = noise(1, 96, 128)
    quantize(path, small, [images.numpy()])
    compiled = openvino.Core().compile_model(small, "CPU", EXACT)
    found = dict(zip(names, compiled(images.numpy()).values()))
    expected = dict(zip(names, load(small, "onnx")(images)))
    assert abs(int(found["counts"][0]) - int(expected["counts"][0])) < 5 < found["counts"][0]
    # They round differently, and a random model has proposals of nearly one score.
    assert np.abs(found["scores"] - expected["scores"])[:, :40].mean() < 0.1
