"""Files of `iou-d2 export` in OpenVINO, against the models themselves."""

from __future__ import annotations

import pytest

from exported_models import noise, small_model, small_two_stage, write_model
from iou_d2.engine.export.agreement import NOTHING
from iou_d2.engine.export.check import compare

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

# Not UnitBox, whose equal scores at the edges it orders in its own way.
NAMES = ("retinanet", "iou_retinanet", "vfnet", "fcos", "ssd_iou", "refinedet", "iou_net")
# In bfloat16, the default of CPUs that multiply it, nothing is equal.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.mark.parametrize("name", NAMES)
def test_openvino_detects_what_the_model_detects(tmp_path, name):
    build = small_two_stage if name == "iou_net" else small_model
    cfg, model = build(f"configs/quick/{name}_shapes.yaml")
    path = str(tmp_path / "model.onnx")
    graph = write_model(cfg, model, path)
    compiled = openvino.Core().compile_model(path, "CPU", EXACT)
    found = NOTHING
    for shape in ((2, 97, 131), (1, 65, 64)):
        run = lambda images: list(compiled(images.numpy()).values())  # noqa: E731
        found = found.joined(compare(run, graph, noise(*shape), cfg))
    assert found.pairs > 60 and found.holds(graph.doubtful)
