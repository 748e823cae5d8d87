"""Exported models as users of ONNX Runtime have them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from exported_models import small_model, write_model
from iou_d2.engine.checkpoint import untrained_predictor
from iou_d2.engine.export.agreement import agreement
from iou_d2.engine.export.files import InputSpec
from iou_d2.errors import InputError, MissingFileError
from iou_d2.runtime import Description, Detector, ShortestEdge, Square

onnx = pytest.importorskip("onnx")

CONFIG = "configs/quick/atss_iou_shapes.yaml"
SIZES = ("INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "150")
NAMES = ("MODEL.CLASS_NAMES", "['cat', 'dog', 'cow']")


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported model: its config, the model, the file."""
    cfg, model = small_model(CONFIG, *SIZES, *NAMES, "INPUT.FORMAT", "RGB")
    path = str(tmp_path_factory.mktemp("exported") / "model.onnx")
    write_model(cfg, model, path)
    return cfg, model, path


def predicted(cfg, model, image) -> dict[str, np.ndarray]:
    predictor = untrained_predictor(cfg)
    predictor.model = model
    fields = predictor(image)["instances"].get_fields()
    boxes, classes = fields.pop("pred_boxes").tensor, fields.pop("pred_classes")
    return {name: x.numpy() for name, x in {"boxes": boxes, "classes": classes, **fields}.items()}


@pytest.mark.parametrize("size", [(60, 100), (200, 130), (40, 300), (96, 96)])
def test_it_detects_what_the_predictor_detects(exported, size):
    cfg, model, path = exported
    image = picture(*size)
    found = agreement([predicted(cfg, model, image)], [Detector(path)(image)], 100, 0.01)
    assert found.pairs > 30 and found.holds()


def test_the_file_says_what_it_is(exported):
    description = Detector(exported[2], threads=1).description
    assert description == Description(
        method="PointDetector",
        class_names=["cat", "dog", "cow"],
        pixel_order="RGB",
        pixel_mean=exported[0].MODEL.PIXEL_MEAN,
        size_divisibility=32,
        resize=ShortestEdge(96, 150),
        outputs="detections",
        score="sqrt(cls_scores * pred_ious)",
        version=description.version,
        weights_sha256="",
    )
    metadata = {x.key: x.value for x in onnx.load(exported[2]).metadata_props}
    assert metadata["iou_d2.pixel_order"] == "RGB"


def test_it_needs_neither_torch_nor_detectron2(exported, tmp_path):
    np.save(tmp_path / "image.npy", picture(60, 100))
    program = f"""
import sys
for name in ("torch", "torchvision", "detectron2", "fvcore", "PIL", "onnx"):
    sys.modules[name] = None
import numpy as np
from iou_d2.runtime import Detector
found = Detector({exported[2]!r})(np.load({str(tmp_path / "image.npy")!r}))
np.savez({str(tmp_path / "found.npz")!r}, **found)"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    with np.load(tmp_path / "found.npz") as found:
        expected = Detector(exported[2])(picture(60, 100))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)


def test_a_model_for_one_size_takes_every_image(tmp_path):
    cfg, model = small_model(CONFIG, *SIZES)
    path = str(tmp_path / "model.onnx")
    write_model(cfg, model, path, spec=InputSpec((96, 128), 1, torch.float32))
    detector = Detector(path)
    for size in ((96, 128), (60, 200), (200, 60), (10, 10)):
        found = detector(picture(*size))
        assert len(found["scores"]) and found["boxes"].min() >= 0
        assert (found["boxes"].max(axis=0) <= [size[1], size[0]] * 2).all()
    image = picture(96, 128)  # which fills the model
    agreed = agreement([predicted(cfg, model, image)], [detector(image)], 100, 0.01)
    assert agreed.pairs > 30 and agreed.holds()


@pytest.mark.parametrize("spec", [InputSpec(), InputSpec((128, 128), 1)])
def test_a_model_of_squares_sees_what_its_predictor_sees(tmp_path, spec):
    cfg, model = small_model("configs/quick/ssd_iou_shapes.yaml")
    write_model(cfg, model, tmp_path / "model.onnx", spec=spec)
    detector = Detector(tmp_path / "model.onnx")
    assert detector.description.resize == Square(128)
    # None of which Pillow 13 resizes by rows first: see tests/runtime/test_resize.py.
    for size in ((60, 100), (100, 60), (130, 200), (40, 300), (128, 128)):
        image = picture(*size)
        found = agreement([predicted(cfg, model, image)], [detector(image)], 100, 0.01)
        assert found.pairs > 30 and found.holds()


def test_no_detection_is_empty_arrays(tmp_path):
    cfg, model = small_model(CONFIG, *SIZES, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.9999")
    write_model(cfg, model, tmp_path / "model.onnx")
    found = Detector(tmp_path / "model.onnx")(picture(50, 50))
    assert found["boxes"].shape == (0, 4) and found["pred_ious"].shape == (0,)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
        [[1]],
        None,
    ],
)
def test_what_is_no_image_is_refused(exported, image):
    with pytest.raises(InputError, match="image"):
        Detector(exported[2])(image)


def test_an_image_may_be_a_view(exported):
    image = picture(120, 100)
    detector = Detector(exported[2])
    views = image[::2, ::-1], np.ascontiguousarray(image[::2, ::-1])
    expected, found = map(detector, views)
    np.testing.assert_array_equal(found["boxes"], expected["boxes"])


def test_what_cannot_be_loaded_is_a_sentence(exported, tmp_path):
    with pytest.raises(MissingFileError, match="There is no model .*none.onnx"):
        Detector(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    for content in (b"", b"no model", open(exported[2], "rb").read()[:5000]):
        broken.write_bytes(content)
        with pytest.raises(InputError, match="cannot load .*broken.onnx"):
            Detector(broken)
    with pytest.raises(InputError, match="no provider NoProvider, only .*CPUExecutionProvider"):
        Detector(exported[2], providers=["NoProvider", "CPUExecutionProvider"])
    with pytest.raises(InputError, match="at least 1 thread, not on 0"):
        Detector(exported[2], threads=0)


def changed(source: str, path, **metadata: str | None) -> str:
    """A copy of an exported model whose metadata are others; None removes one."""
    model = onnx.load(source)
    values = {x.key: x.value for x in model.metadata_props}
    values.update({f"iou_d2.{key}": value for key, value in metadata.items()})
    onnx.helper.set_model_props(model, {k: v for k, v in values.items() if v is not None})
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"format": None}, "is none of `iou-d2 export`"),
        ({"format": "2"}, "is of the format 2, but this version of iou_d2 reads 1"),
        ({"resize": None}, "metadata of .* were changed"),
        ({"resize": '{"square": 300}'}, "metadata of .* were changed"),
        ({"resize": '{"side": 300, "longest_edge": 9}'}, "metadata of .* were changed"),
        ({"class_names": "cat"}, "metadata of .* were changed"),
        ({"outputs": "raw"}, "puts out raw, before NMS: export it with"),
    ],
)
def test_files_of_other_programs_are_a_sentence(exported, tmp_path, metadata, sentence):
    with pytest.raises(InputError, match=sentence):
        Detector(changed(exported[2], tmp_path / "other.onnx", **metadata))


def test_a_batch_of_several_is_refused(tmp_path):
    cfg, model = small_model("configs/quick/unitbox_shapes.yaml")
    write_model(cfg, model, tmp_path / "model.onnx", spec=InputSpec(batch=3))
    with pytest.raises(InputError, match="takes 3 images at once: export it with --batch 1"):
        Detector(tmp_path / "model.onnx")
