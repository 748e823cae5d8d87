"""What is mended in a user's COCO JSON."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from coco_files import (
    HEIGHT,
    WIDTH,
    annotation,
    average_precision,
    perfect_predictions,
    two_images,
    write,
)
from iou_d2.data.cleaning import Findings
from iou_d2.data.coco import register_coco
from iou_d2.data.coco_reading import mend_boxes


def clean_annotations(data: dict) -> tuple[list[dict], Findings]:
    mended, findings = dict(data), Findings()
    mend_boxes(Path("train.json"), mended, findings)
    return mended["annotations"], findings


@pytest.fixture
def data() -> dict:
    return two_images()


def test_dropped_and_clipped_boxes_are_counted_and_reported_once(tmp_path, data, caplog):
    data["annotations"] += [
        annotation(10, [5, 5, 0, 9]),
        annotation(11, [5, 5, 9, -2]),
        annotation(12, [WIDTH, 5, 9, 9]),
        annotation(13, [-20, -20, 10, 10]),
        annotation(14, [40, 30, 100, 100]),
    ]
    with caplog.at_level(logging.WARNING):
        name = register_coco(write(tmp_path, data), None, tmp_path / "clean")
        register_coco(tmp_path / "train.json", None, tmp_path / "clean")
    (message,) = [r.getMessage() for r in caplog.records if r.name == "iou_d2.data.coco"]
    assert "train.json" in message
    assert "2 boxes without area were dropped (first: annotations[2] (id 10))" in message
    assert "2 boxes outside their image were dropped (first: annotations[4] (id 12))" in message
    assert "1 boxes were clipped to their image (first: annotations[6] (id 14))" in message
    boxes = [a["bbox"] for a in DatasetCatalog.get(name)[0]["annotations"]]
    assert boxes == [[4, 4, 20, 20], [40, 30, WIDTH - 40, HEIGHT - 30]]
    assert Path(MetadataCatalog.get(name).json_file).parent == tmp_path / "clean"
    assert average_precision(name, tmp_path, perfect_predictions(name)) == pytest.approx(100)


def test_overshoot_by_rounding_is_left_alone(data):
    data["annotations"] = [annotation(1, [-1, -0.3, WIDTH + 2, HEIGHT + 1])]
    kept, findings = clean_annotations(data)
    assert not findings and kept == data["annotations"]


@pytest.mark.parametrize("side", range(4))
def test_overshoot_beyond_a_pixel_is_clipped(data, side):
    box = np.array([0.0, 0.0, WIDTH, HEIGHT])
    box[side] += [-1.5, -1.5, 1.5, 1.5][side]
    data["annotations"] = [annotation(1, [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()])]
    ((kept,), findings) = clean_annotations(data)
    assert kept["bbox"] == [0, 0, WIDTH, HEIGHT]
    assert kept["area"] == WIDTH * HEIGHT
    assert sum(findings.count.values()) == 1


def test_missing_fields_are_filled_in(data):
    box = [4, 4, 20, 10]
    data["annotations"] = [
        {"image_id": 1, "category_id": 5, "bbox": box},
        annotation(3, box, area=0, id="a7"),
        annotation(4, box, area=math.nan),
    ]
    untouched = copy.deepcopy(data)
    kept, findings = clean_annotations(data)
    assert [a["id"] for a in kept] == [5, 6, 4]
    assert [a["area"] for a in kept] == [200] * 3
    assert [a["iscrowd"] for a in kept] == [0] * 3
    assert sum(findings.count.values()) == 6
    assert str(data) == str(untouched)


def test_mask_area_of_a_whole_box_is_kept(data):
    data["annotations"] = [annotation(1, [4, 4, 20, 10], area=77)]
    kept, findings = clean_annotations(data)
    assert kept[0]["area"] == 77 and not findings


@pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4]], [[]], "x", [1, 2, 3, 4, 5], {"a": 1}])
def test_objects_with_a_broken_mask_keep_their_box(tmp_path, data, segmentation):
    data["annotations"][0]["segmentation"] = segmentation
    name = register_coco(write(tmp_path, data), None, tmp_path / "clean")
    assert [len(record["annotations"]) for record in DatasetCatalog.get(name)] == [1, 1]


@pytest.mark.parametrize(
    "segmentation",
    [[], [[4, 4, 24, 4, 24, 24]], {"size": [HEIGHT, WIDTH], "counts": [10, WIDTH * HEIGHT - 10]}],
)
def test_good_masks_are_kept(tmp_path, data, segmentation):
    data["annotations"][0]["segmentation"] = segmentation
    name = register_coco(write(tmp_path, data), None, tmp_path / "clean")
    loaded = DatasetCatalog.get(name)[0]["annotations"][0]
    assert bool(loaded.get("segmentation")) == bool(segmentation)
    assert not (tmp_path / "clean").exists()


def test_annotation_id_zero_counts_as_a_match(tmp_path, data):
    data["annotations"][0]["id"] = 0
    name = register_coco(write(tmp_path, data), None, tmp_path / "clean")
    assert average_precision(name, tmp_path, perfect_predictions(name)) == pytest.approx(100)


@pytest.mark.parametrize("iscrowd", [0, 1])
def test_crowds_of_a_mended_test_set_still_forgive(tmp_path, data, iscrowd):
    data["annotations"] += [
        annotation(3, [30, 20, 30, 25], iscrowd=iscrowd),
        annotation(4, [0, 0, 0, 0]),
    ]
    name = register_coco(write(tmp_path, data), None, tmp_path / "clean")
    pairs = perfect_predictions(name)
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor([[4.0, 4, 24, 24], [32, 22, 36, 26]]))
    instances.scores = torch.tensor([0.5, 0.9])
    instances.pred_classes = torch.tensor([0, 0])
    pairs[0] = (pairs[0][0], {"instances": instances})
    found = average_precision(name, tmp_path, pairs)
    assert found == pytest.approx(100) if iscrowd else found < 90
