"""An exported IoU-Net over the detections of others, against `iou-d2 refine`."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.structures import BoxMode

from exported_models import TWO_LEVELS, small_two_stage, write_model
from iou_d2.commands.refine import refine_image
from iou_d2.engine.export.agreement import agreement
from iou_d2.errors import InputError
from iou_d2.runtime import Detector, Refiner

pytest.importorskip("onnx")

CONFIG = "configs/quick/iou_net_standalone_shapes.yaml"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model and the path of its file."""
    overrides = ("INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "150")
    names = ("MODEL.CLASS_NAMES", "['cat', 'dog', 'cow']", "MODEL.IOU_NET.REFINE_STEPS", "2")
    cfg, model = small_two_stage(CONFIG, *TWO_LEVELS, *overrides, *names)
    model.roi_heads.iou_branch.iou_pred.weight.data *= 0.3
    path = str(tmp_path_factory.mktemp("refiner") / "model.onnx")
    write_model(cfg, model, path, outputs="refinement")
    return cfg, model, path


def given(height, width, count=40):
    """An image and detections, some of which overlap or end at its edge."""
    generator = np.random.default_rng(height)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    middle = generator.random((count, 2)) * [width, height]
    half = 3 + generator.random((count, 2)) * min(height, width) / 3
    boxes = np.concatenate([middle - half, middle + half], axis=1)
    boxes = boxes.clip(0, [width, height] * 2)
    return image, boxes, generator.integers(0, 3, count), generator.random(count)


def by_command(cfg, model, image, boxes, classes, scores):
    """What `iou-d2 refine` makes of the same."""
    from detectron2.data.transforms import ResizeShortestEdge
    from torch import from_numpy

    augmentation = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    resized = augmentation.get_transform(image).apply_image(image)
    pixels = from_numpy(resized.transpose(2, 0, 1).copy())
    size = dict(zip(("height", "width"), image.shape[:2]))
    detections = [
        {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score, "category_id": int(number)}
        for (x1, y1, x2, y2), score, number in zip(boxes.tolist(), scores.tolist(), classes)
    ]
    record = {"image": pixels, "image_id": 1, **size}
    found = refine_image(model, record, detections, {number: number for number in range(3)})
    boxes = np.array([x["bbox"] for x in found], dtype=np.float32).reshape(-1, 4)
    return {
        "boxes": BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
        "scores": np.array([x["score"] for x in found], dtype=np.float32),
        "classes": np.array([x["category_id"] for x in found]),
        "cls_scores": np.array([x["cls_score"] for x in found], dtype=np.float32),
        "pred_ious": np.array([x["pred_iou"] for x in found], dtype=np.float32),
    }


@pytest.mark.parametrize("size", ((60, 100), (200, 130), (40, 300)))
def test_it_refines_as_the_command_does(exported, size):
    cfg, model, path = exported
    detections = given(*size)
    expected = by_command(cfg, model, *detections)
    found = agreement([expected], [Refiner(path)(*detections)], 100, 0.05)
    assert found.pairs > 20 and found.holds(pixels=0.01)


def test_no_detections_stay_none(exported):
    image, boxes, classes, scores = given(60, 100, 0)
    found = Refiner(exported[2])(image, boxes, classes, scores)
    assert found["boxes"].shape == (0, 4) and found["pred_ious"].shape == (0,)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    (
        ("boxes", lambda x: x[:, :3], r"Boxes are \(R, 4\), .* not \(40, 3\), \(40,\), \(40,\)"),
        ("scores", lambda x: x[1:], r"not \(40, 4\), \(40,\), \(39,\)"),
        ("boxes", lambda x: x / 0, "no finite numbers"),
        ("classes", lambda x: x + 1, "Class 3 is none of this model, which knows those of 0 to 2"),
        ("classes", lambda x: x - 0.5, "Class .*5 is none of this model"),
        ("image", lambda x: x[0], "An image is"),
    ),
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_cannot_be_refined_is_a_sentence(exported, name, change, sentence):
    arguments = dict(zip(("image", "boxes", "classes", "scores"), given(60, 100)))
    arguments[name] = change(arguments[name])
    with pytest.raises(InputError, match=sentence):
        Refiner(exported[2])(**arguments)


def test_it_is_no_detector(exported):
    with pytest.raises(InputError, match="puts out refinement, of boxes .* `--with detections`"):
        Detector(exported[2])
