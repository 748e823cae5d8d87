"""Files of dense detectors in ONNX Runtime and TorchScript, against the models themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from exported_models import TWO_DENSE_LEVELS, agreement_at, noise, small_model, write_model
from iou_d2 import get_config
from iou_d2.detectors.dense import DenseNMS
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.check import compare, load
from iou_d2.engine.export.files import InputSpec, program_example
from iou_d2.engine.export.readers import reader_of
from iou_d2.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

DENSE = {
    "retinanet": {"boxes", "scores", "classes", "counts"},
    "iou_retinanet": {"boxes", "scores", "classes", "counts", "cls_scores", "pred_ious"},
    "atss_iou": {"boxes", "scores", "classes", "counts", "cls_scores", "pred_ious"},
    "fcos": {"boxes", "scores", "classes", "counts", "cls_scores", "pred_centernesses"},
    "vfnet": {"boxes", "scores", "classes", "counts"},
    "unitbox": {"boxes", "scores", "classes", "counts"},
}
# Images, height, width: sides that nothing divides, one image and three, fewer points than top-k.
SHAPES = ((2, 97, 131), (1, 65, 64), (3, 160, 96), (1, 40, 201))


def config_of(name: str) -> str:
    return f"configs/quick/{name}_shapes.yaml"


@pytest.mark.parametrize("name", DENSE)
def test_onnx_runtime_detects_what_the_model_detects(tmp_path, name):
    cfg, model = small_model(config_of(name))
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path)
    assert set(graph.names) == DENSE[name]
    found = agreement_at(SHAPES, load(path, "onnx"), graph, cfg)
    assert found.pairs > 80 and found.holds(graph.doubtful)
    assert (graph.doubtful > 0) == (name == "unitbox")


@pytest.mark.parametrize("name", ["iou_retinanet", "vfnet", "unitbox"])
def test_torchscript_detects_what_the_model_detects(tmp_path, name):
    cfg, model = small_model(config_of(name))
    path = tmp_path / "model.pt"
    graph = write_model(cfg, model, path, format="torchscript")
    found = agreement_at(SHAPES, load(path, "torchscript"), graph, cfg)
    assert found.pairs > 80 and found.holds()
    extra = {"iou_d2.json": ""}
    torch.jit.load(path, _extra_files=extra)
    assert b'"iou_d2.method"' in extra["iou_d2.json"]


def test_torch_export_detects_what_the_model_detects(tmp_path):
    cfg, model = small_model(config_of("unitbox"))
    path = tmp_path / "model.pt2"
    spec = InputSpec(size=(64, 96))
    graph = write_model(cfg, model, path, format="pt2", spec=spec)
    run = load(path, "pt2")
    found = agreement_at([(1, 64, 96), (3, 64, 96)], run, graph, cfg)
    assert found.pairs > 10 and found.holds()
    assert program_example(graph, spec).shape == (2, 3, 64, 96)


@pytest.mark.parametrize("name", ["retinanet", "unitbox"])
def test_without_a_detection_all_is_padding(tmp_path, name):
    levels = TWO_DENSE_LEVELS if name == "retinanet" else ()
    cfg, model = small_model(
        config_of(name), *levels, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.9999"
    )
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path)
    outputs = dict(zip(graph.names, load(path, "onnx")(noise(2, 70, 90))))
    assert outputs["counts"].tolist() == [0, 0]
    assert outputs["boxes"].shape == (2, 100, 4) and not outputs["boxes"].any()
    assert not outputs["scores"].any() and (outputs["classes"] == -1).all()


@pytest.mark.parametrize("limit", ["7", "-1"])
def test_the_limit_of_detections_is_that_of_the_config(tmp_path, limit):
    cfg, model = small_model(
        config_of("atss"),
        *("TEST.DETECTIONS_PER_IMAGE", limit, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "50"),
        *("MODEL.POINT_DETECTOR.CLASS_AGNOSTIC_NMS", "True", *TWO_DENSE_LEVELS),
    )
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path)
    run = load(path, "onnx")
    assert agreement_at(SHAPES[:2], run, graph, cfg).holds()
    length = 7 if limit == "7" else 50 * 2
    assert run(noise(1, 64, 64))[graph.names.index("scores")].shape == (1, length)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("retinanet", "MODEL.RETINANET.BEFORE_NMS", "clipped_with_area"),
        ("fcos", "MODEL.POINT_DETECTOR.INFERENCE", "mmdetection"),
        ("atss_iou", "MODEL.POINT_DETECTOR.INFERENCE", "detectron2"),
    ],
)
def test_the_inference_of_other_codes_is_exported_too(tmp_path, name, key, value):
    cfg, model = small_model(config_of(name), key, value, *TWO_DENSE_LEVELS)
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path)
    found = agreement_at(SHAPES[:2], load(path, "onnx"), graph, cfg)
    assert found.pairs > 40 and found.holds()


@pytest.mark.parametrize("name", ["iou_retinanet", "vfnet", "unitbox"])
def test_candidates_are_those_that_nms_is_given(tmp_path, monkeypatch, name):
    levels = () if name == "unitbox" else TWO_DENSE_LEVELS
    cfg, model = small_model(config_of(name), *levels, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20")
    path, seen, suppress = tmp_path / "model.onnx", [], DenseNMS.__call__
    graph = write_model(cfg, model, path, outputs="candidates")
    images = noise(1, 97, 131)
    outputs = dict(zip(graph.names, load(path, "onnx")(images)))
    monkeypatch.setattr(DenseNMS, "__call__", lambda nms, x: suppress(nms, seen.extend(x) or x))
    with torch.no_grad():
        model([{"image": images[0]}])
    expected = torch.cat([x.scores for x in seen]).sort(descending=True).values.numpy()
    count = int(outputs["counts"][0])
    assert count == len(expected) > 20
    np.testing.assert_allclose(outputs["scores"][0, :count], expected, atol=1e-5)
    if name == "unitbox":  # of equal pixels any may be among the best
        return
    boxes = torch.cat([x.pred_boxes.tensor for x in seen]).numpy()
    found = outputs["boxes"][0, :count]
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(boxes, axis=0), atol=0.01)


def test_raw_outputs_are_all_points_with_all_classes(tmp_path):
    cfg, model = small_model(config_of("iou_retinanet"), *TWO_DENSE_LEVELS)
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path, outputs="raw")
    images = noise(2, 97, 131)
    outputs = dict(zip(graph.names, load(path, "onnx")(images)))
    with torch.no_grad():
        batch = model.preprocess_image([{"image": image} for image in images])
        predictions = model.predict(batch.tensor)
        for image in range(2):
            ranked = [model.rank(level, image) for level in predictions]
            for name in ("scores", "cls_scores", "pred_ious"):
                expected = torch.cat([x[name] for x in ranked]).numpy()
                np.testing.assert_allclose(outputs[name][image], expected, atol=1e-5)
            boxes = [
                model.boxes(x, image, torch.arange(len(x.anchors)), (97, 131)) for x in predictions
            ]
            np.testing.assert_allclose(outputs["boxes"][image], torch.cat(boxes), atol=0.01)


@pytest.mark.parametrize("opset", [17, 18, 20, 21, 22])
def test_every_opset_is_written_and_runs(tmp_path, opset):
    cfg, model = small_model(config_of("unitbox"))
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path, opset=opset)
    assert [x.version for x in onnx.load(path).opset_import if not x.domain] == [opset]
    found = agreement_at(SHAPES[:1], load(path, "onnx"), graph, cfg)
    assert found.pairs > 10 and found.holds(graph.doubtful)


@pytest.mark.parametrize(("opset", "kind"), [(17, "GridSample"), (19, "DeformConv")])
def test_deformable_convolutions_are_the_operator_that_is_asked_for(tmp_path, opset, kind):
    keys = ("DEFORMABLE_TOWER", "STAR_NORM")
    cfg, model = small_model(
        config_of("vfnet"),
        *TWO_DENSE_LEVELS,
        *(x for key in keys for x in (f"MODEL.POINT_DETECTOR.{key}", "True")),
    )
    path = tmp_path / "model.onnx"
    graph = write_model(cfg, model, path, opset=opset, deform_conv=kind)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    other = {"GridSample": "DeformConv", "DeformConv": "GridSample"}[kind]
    # Two stars and two towers a level.
    assert kinds.count(kind) == 4 * 2
    assert other not in kinds
    found = agreement_at(SHAPES[:2], load(path, "onnx"), graph, cfg)
    assert found.pairs > 80 and found.holds()


def test_a_file_for_one_size_and_batch_says_so(tmp_path):
    cfg, model = small_model(config_of("unitbox"))
    path = tmp_path / "model.onnx"
    spec = InputSpec(size=(75, 90), batch=1, dtype=torch.float32)
    graph = write_model(cfg, model, path, spec=spec)
    content = onnx.load(path)
    (images,) = content.graph.input
    assert [x.dim_value for x in images.type.tensor_type.shape.dim] == [1, 3, 75, 90]
    run = load(path, "onnx")
    found = compare(lambda x: run(x.float()), graph, noise(1, 75, 90), cfg)
    assert found.pairs > 3 and found.holds(graph.doubtful)


@pytest.mark.parametrize(
    ("config", "overrides", "sentence"),
    [
        ("unitbox", ("MODEL.UNITBOX.INFERENCE", "ellipses"), "set MODEL.UNITBOX.INFERENCE nms"),
    ],
)
def test_what_cannot_be_exported_names_the_key(tmp_path, config, overrides, sentence):
    cfg = get_config(config_of(config), ["MODEL.DEVICE", "cpu", *overrides])
    with pytest.raises(InputError, match=sentence):
        build_graph(cfg, build_model(cfg))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"opset": 16}, "--opset is 17 to 22, but it is 16"),
        ({"opset": 18, "deform_conv": "DeformConv"}, "DeformConv from opset 19 on, but --opset"),
    ],
)
def test_an_opset_that_there_is_not_leaves_no_file(tmp_path, arguments, sentence):
    cfg, model = small_model(config_of("unitbox"))
    with pytest.raises(InputError, match=sentence):
        write_model(cfg, model, tmp_path / "model.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_another_nms_is_not_exported_as_the_usual_one():
    _, model = small_model(config_of("retinanet"))
    model.nms = type("SoftNMS", (), {})()
    with pytest.raises(InputError, match="SoftNMS is a loop that no graph can hold"):
        reader_of(model)


def test_another_way_of_choosing_candidates_is_not_exported_as_this_one():
    _, model = small_model(config_of("retinanet"))
    model.__class__ = type("Own", (type(model),), {"candidates": lambda self, *x: None})
    with pytest.raises(InputError, match="MODEL.META_ARCHITECTURE Own cannot be exported"):
        reader_of(model)
