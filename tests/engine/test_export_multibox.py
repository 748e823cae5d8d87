"""Files of SSD and RefineDet in ONNX Runtime and TorchScript, against the models themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from exported_models import agreement_at, noise, small_model, write_model
from iou_d2.backbones.ssd_vgg import SSD300, SSDVGG16
from iou_d2.detectors.dense import DenseNMS
from iou_d2.engine.export.check import compare, load
from iou_d2.engine.export.describe import describe
from iou_d2.engine.export.files import InputSpec
from iou_d2.engine.export.readers import reader_of
from iou_d2.errors import InputError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OUTPUTS = {
    "ssd": {"boxes", "scores", "classes", "counts"},
    "ssd_iou": {"boxes", "scores", "classes", "counts", "cls_scores", "pred_ious"},
    "refinedet": {"boxes", "scores", "classes", "counts"},
}
# Images, height, width: the square, sides that nothing divides, fewer boxes than the top-k.
SHAPES = ((1, 128, 128), (2, 97, 131), (3, 160, 96), (1, 33, 40))


def config_of(name: str) -> str:
    return f"configs/quick/{name}_shapes.yaml"


@pytest.mark.parametrize("name", OUTPUTS)
def test_onnx_runtime_detects_what_the_model_detects(tmp_path, name):
    cfg, model = small_model(config_of(name))
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path)
    assert set(graph.names) == OUTPUTS[name]
    found = agreement_at(SHAPES, load(path, "onnx"), graph, cfg)
    assert found.pairs > 500 and found.holds()


@pytest.mark.parametrize("name", ["ssd_iou", "refinedet"])
def test_torchscript_detects_what_the_model_detects(tmp_path, name):
    cfg, model = small_model(config_of(name))
    path = tmp_path / "model.pt"
    graph = write_model(cfg, model, path, format="torchscript")
    found = agreement_at(SHAPES, load(path, "torchscript"), graph, cfg)
    assert found.pairs > 500 and found.holds()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("refinedet", ("MODEL.REFINEDET.MIN_OBJECTNESS", "0.5")),
        ("ssd", ("MODEL.MULTIBOX.CLIP_BEFORE_NMS", "True", "MODEL.SSD.CLIP", "corners")),
        ("ssd", ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "9", "TEST.DETECTIONS_PER_IMAGE", "-1")),
    ],
)
def test_keys_of_the_config_are_part_of_the_graph(tmp_path, name, overrides):
    cfg, model = small_model(config_of(name), *overrides)
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path)
    found = agreement_at(SHAPES[:2], load(path, "onnx"), graph, cfg)
    assert found.pairs > 30 and found.holds()


def test_levels_that_are_too_small_are_padded_as_in_the_model():
    """SSD300's last stages do not pad, and images that are smaller than its own leave them less
    than a kernel."""
    torch.manual_seed(0)
    backbone = SSDVGG16(SSD300, ["conv4_3", "conv9_2"]).eval()
    with torch.no_grad():
        traced = torch.jit.trace(
            backbone, torch.rand(1, 3, 300, 310), strict=False, check_trace=False
        )
        for size in ((64, 65), (9, 7), (300, 20)):
            images = torch.rand(2, 3, *size)
            expected, found = backbone(images), traced(images)
            torch.testing.assert_close(found["conv9_2"], expected["conv9_2"])


def test_candidates_are_those_that_nms_is_given(tmp_path, monkeypatch):
    cfg, model = small_model(config_of("ssd_iou"), "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20")
    path, seen, suppress = tmp_path / "model.onnx", [], DenseNMS.__call__
    graph = write_model(cfg, model, path, outputs="candidates")
    images = noise(1, 97, 131)
    outputs = dict(zip(graph.names, load(path, "onnx")(images)))
    monkeypatch.setattr(DenseNMS, "__call__", lambda nms, x: suppress(nms, seen.extend(x) or x))
    with torch.no_grad():
        model([{"image": images[0]}])
    (expected,) = seen
    count = int(outputs["counts"][0])
    assert count == len(expected) == 3 * 20
    order = expected.scores.argsort(descending=True)
    for name in ("scores", "cls_scores", "pred_ious"):
        values = expected.get(name)[order]
        np.testing.assert_allclose(outputs[name][0, :count], values, atol=1e-5)
    np.testing.assert_array_equal(outputs["classes"][0, :count], expected.pred_classes[order])


def test_raw_outputs_are_all_boxes_with_all_classes(tmp_path):
    """Against the softmax and the decoding written out."""
    cfg, model = small_model(config_of("refinedet"))
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path, outputs="raw")
    images = noise(2, 97, 131)
    outputs = dict(zip(graph.names, load(path, "onnx")(images)))
    with torch.no_grad():
        batch = model.preprocess_image([{"image": image} for image in images])
        predictions = model.predict(batch.tensor)
    anchors, arm_logits, arm_deltas, logits, deltas = predictions[:5]
    objectness = F.softmax(arm_logits.double(), dim=2)[..., :1]
    scores = F.softmax(logits.double(), dim=2)[..., :-1] * (objectness >= 0.01)
    np.testing.assert_allclose(outputs["scores"], scores, atol=1e-5)
    boxes = anchors.tensor.double().expand(2, -1, -1)
    for step in (arm_deltas, deltas):
        boxes = moved(boxes, step.double() / torch.tensor(cfg.MODEL.MULTIBOX.BBOX_REG_WEIGHTS))
    np.testing.assert_allclose(outputs["boxes"], boxes, atol=0.01)


def moved(boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    center = boxes[..., :2] + sides / 2 + deltas[..., :2] * sides
    sides = sides * deltas[..., 2:].clamp(max=np.log(1000 / 16)).exp()
    return torch.cat([center - sides / 2, center + sides / 2], dim=-1)


def test_a_file_for_one_size_and_batch_detects_the_same(tmp_path):
    cfg, model = small_model(config_of("ssd"))
    path = tmp_path / "model.onnx"
    spec = InputSpec(size=(128, 128), batch=1, dtype=torch.float32)
    graph = write_model(cfg, model, path, spec=spec)
    run = load(path, "onnx")
    found = compare(lambda x: run(x.float()), graph, noise(1, 128, 128), cfg)
    assert found.pairs > 80 and found.holds()


def test_without_a_detection_all_is_padding(tmp_path):
    cfg, model = small_model(config_of("ssd"), "MODEL.RETINANET.SCORE_THRESH_TEST", "0.99999")
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path)
    outputs = dict(zip(graph.names, load(path, "onnx")(noise(2, 70, 90))))
    assert outputs["counts"].tolist() == [0, 0]
    assert outputs["boxes"].shape == (2, 100, 4) and not outputs["boxes"].any()


def test_what_scores_are_is_said():
    for name, kind in (
        ("ssd_iou", "cls_scores^0.5 * pred_ious^0.5"),
        ("refinedet", "class probability"),
    ):
        assert describe(*small_model(config_of(name)), "detections").score == kind


def test_soft_nms_is_a_sentence():
    _, model = small_model(config_of("ssd"), "MODEL.MULTIBOX.NMS", "soft_linear")
    with pytest.raises(InputError, match="SoftNMS is a loop that no graph can hold"):
        reader_of(model)
