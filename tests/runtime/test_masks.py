"""Masks of an exported Mask R-CNN in their image, against Detectron2's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import paste_masks_in_image

from exported_models import TWO_LEVELS, small_two_stage, write_model
from iou_d2.commands.exported import ExportedPredictor
from iou_d2.engine.export.agreement import agreement
from iou_d2.runtime import Detector, paste_masks


def test_pasted_masks_are_detectron2s():
    generator = np.random.default_rng(0)
    masks = generator.random((40, 28, 28), dtype=np.float32)
    corner = generator.random((40, 2), dtype=np.float32) * [60, 40]
    boxes = np.hstack([corner, corner + generator.random((40, 2)) ** 3 * [60, 60] + 0.01])
    boxes = boxes.clip(0, [70, 50] * 2).astype(np.float32)
    boxes[:3] = [[0, 0, 70, 50], [69.5, 49.5, 70, 50], [3, 3, 4, 40]]
    expected = paste_masks_in_image(torch.tensor(masks), torch.tensor(boxes), (50, 70)).numpy()
    found = paste_masks(masks, boxes, (50, 70))
    assert found.shape == (40, 50, 70) and found.dtype == bool
    assert expected.mean() > 0.02
    # A probability that rounding puts on the other side of 0.5.
    assert (found != expected).sum() <= 2
    np.testing.assert_array_equal(
        paste_masks(masks, boxes, (50, 70), threshold=0.9),
        paste_masks_in_image(torch.tensor(masks), torch.tensor(boxes), (50, 70), 0.9).numpy(),
    )


def test_no_masks_and_boxes_without_an_area_have_no_pixels():
    assert paste_masks(np.ones((0, 28, 28)), np.ones((0, 4)), (5, 7)).shape == (0, 5, 7)
    empty = np.array([[2, 2, 2, 4], [3, 1, 2, 4], [7, 5, 7, 5]], dtype=np.float32)
    assert not paste_masks(np.ones((3, 28, 28), np.float32), empty, (5, 7)).any()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported Mask R-CNN: its config, the model, the file."""
    pytest.importorskip("onnx")
    cfg, model = small_two_stage(
        "configs/quick/faster_rcnn_shapes.yaml",
        *("MODEL.MASK_ON", "True", "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "150"),
        *("TEST.DETECTIONS_PER_IMAGE", "20", *TWO_LEVELS),
    )
    path = str(tmp_path_factory.mktemp("exported") / "model.onnx")
    write_model(cfg, model, path)
    return cfg, model, path


@pytest.mark.parametrize("size", [(60, 100), (200, 130)])
def test_detections_have_the_masks_of_the_predictor(exported, size):
    cfg, model, path = exported
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    predictor = DefaultPredictor(cfg)
    predictor.model = model
    kinds = predictor(image)["instances"], ExportedPredictor(path)(image)["instances"]
    assert Detector(path)(image)["masks"].shape == (len(kinds[1]), 28, 28)
    assert kinds[1].pred_masks.shape == (len(kinds[1]), *size)
    arrays = [
        {
            "boxes": x.pred_boxes.tensor.numpy(),
            "scores": x.scores.numpy(),
            "classes": x.pred_classes.numpy(),
        }
        for x in kinds
    ]
    found = agreement(arrays[:1], arrays[1:], 20, 0.05)
    assert found.pairs == 20 and found.holds()
    # Of random scores, none of which are equal, the order is that of the model.
    expected, masks = (x.pred_masks.numpy() for x in kinds)
    assert 0.001 < expected.mean() < 0.9
    assert (masks != expected).mean() < 1e-4
