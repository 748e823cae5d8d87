"""A user's COCO JSON: each fault is named by file and record; training and evaluation agree."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from iou_d2.data.coco import clean_annotations, read_coco, register_coco

WIDTH, HEIGHT = 64, 48


def annotation(annotation_id: int, box: list[float], **fields) -> dict:
    return {
        "id": annotation_id,
        "image_id": 1,
        "category_id": 5,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        **fields,
    }


@pytest.fixture
def data() -> dict:
    """Two images, two categories with ids in falling order and a gap, two good annotations."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 7, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [
            annotation(1, [4, 4, 20, 20]),
            annotation(2, [30, 10, 30, 30], category_id=9, image_id=7),
        ],
    }


def write(folder: Path, data: object, images: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for name in images:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / name)
    file = folder / "train.json"
    file.write_text(json.dumps(data))
    return file


def perfect_predictions(name: str) -> list[tuple[dict, dict]]:
    """Inputs and outputs of a detector that finds every object but the crowds of a dataset."""
    pairs = []
    for record in DatasetCatalog.get(name):
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.pred_boxes.clip((record["height"], record["width"]))
        instances.scores = torch.full((len(objects),), 0.9)
        instances.pred_classes = torch.tensor([a["category_id"] for a in objects])
        pairs.append((record, {"instances": instances}))
    return pairs


def average_precision(name: str, output_dir: Path, pairs: list[tuple[dict, dict]]) -> float:
    evaluator = COCOEvaluator(
        name, distributed=False, output_dir=str(output_dir), use_fast_impl=False
    )
    evaluator.reset()
    for record, output in pairs:
        evaluator.process([record], [output])
    return evaluator.evaluate()["bbox"]["AP"]


def test_good_data_is_read_as_it_is(tmp_path, data):
    file = write(tmp_path, data)
    name = register_coco(file, None, tmp_path / "clean")
    assert name == f"coco:{file}:{tmp_path / 'images'}"
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    assert metadata.json_file == str(file) and metadata.evaluator_type == "coco"
    assert not (tmp_path / "clean").exists()
    first, second = DatasetCatalog.get(name)
    assert first["file_name"] == str(tmp_path / "images" / "a.png") and first["image_id"] == 1
    assert first["annotations"][0]["bbox"] == [4, 4, 20, 20]
    assert [a["category_id"] for a in second["annotations"]] == [1]
    assert average_precision(name, tmp_path, perfect_predictions(name)) == pytest.approx(100)


def test_registering_twice_gives_the_same_name(tmp_path, data):
    file = write(tmp_path, data)
    name = register_coco(file, None, tmp_path)
    assert register_coco(file, tmp_path / "images", tmp_path) == name


@pytest.mark.parametrize("folder", ["images", "."])
def test_a_registered_file_is_not_read_again(tmp_path, data, folder):
    file = write(tmp_path, data)
    if folder == ".":
        for image in (tmp_path / "images").iterdir():
            image.rename(tmp_path / image.name)
        (tmp_path / "images").rmdir()
    name = register_coco(file, None, tmp_path)
    file.write_text("no JSON")
    assert register_coco(file, None, tmp_path) == name
    assert register_coco(file, tmp_path / folder, tmp_path) == name


def test_images_that_came_later_are_found_before_those_beside_the_file(tmp_path, data):
    file = write(tmp_path, data)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    for image in (tmp_path / "elsewhere").iterdir():
        (tmp_path / image.name).write_bytes(image.read_bytes())
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path}"
    (tmp_path / "images").mkdir()
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path}"
    (tmp_path / "images").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path / 'images'}"


def test_unused_categories_are_kept(tmp_path, data):
    data["annotations"] = []
    name = register_coco(write(tmp_path, data), None, tmp_path)
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]
    assert [record["annotations"] for record in DatasetCatalog.get(name)] == [[], []]


def test_images_beside_the_json(tmp_path, data):
    file = write(tmp_path, data)
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).rename(tmp_path / name)
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path}"


def test_file_names_with_folders(tmp_path, data):
    data["images"][0]["file_name"] = "images/a.png"
    data["images"][1]["file_name"] = str(tmp_path / "images" / "b.png")
    name = register_coco(write(tmp_path, data), None, tmp_path)
    assert name.endswith(f":{tmp_path}")
    assert all(Path(record["file_name"]).is_file() for record in DatasetCatalog.get(name))


ODD = [None, True, -1, 0, 3, 0.5, math.nan, 1e300, 10**400, "", "x", [], [1], [[1]], {}, {"a": 1}]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of keys and indices to everything inside `value`."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:9])
def test_an_odd_value_anywhere_is_named_or_harmless(tmp_path, data, odd):
    """Either a sentence with the file's name, or data that Detectron2 reads and evaluates."""
    data["annotations"][0]["segmentation"] = [[4, 4, 24, 4, 24, 24]]
    write(tmp_path, data)
    accepted = 0
    for number, (*path, key) in enumerate(places(data)):
        changed = copy.deepcopy(data)
        target = changed
        for step in path:
            target = target[step]
        target[key] = copy.deepcopy(odd)
        file = tmp_path / f"changed{number}.json"
        file.write_text(json.dumps(changed))
        try:
            name = register_coco(file, None, tmp_path / "clean")
        except (ValueError, FileNotFoundError) as error:
            assert file.name in str(error)
            continue
        accepted += 1
        result = average_precision(name, tmp_path, perfect_predictions(name))
        assert result == pytest.approx(100) or math.isnan(result)
    assert accepted >= 4


def test_missing_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*absent\.json"):
        register_coco(tmp_path / "absent.json", None, tmp_path)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        register_coco(tmp_path, None, tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 200, -1])
def test_truncated_json_names_file_and_place(tmp_path, data, keep):
    file = write(tmp_path, data)
    file.write_text(file.read_text()[:keep])
    with pytest.raises(ValueError, match=r"train\.json is not valid JSON: .* line 1, column \d+"):
        read_coco(file)


def test_json_cut_between_values_is_called_cut(tmp_path, data):
    file = write(tmp_path, data)
    file.write_text(file.read_text()[:-1])
    with pytest.raises(ValueError, match=r"character \d+ of \d+\). Is the file cut short\?"):
        read_coco(file)


def test_broken_json_names_the_line(tmp_path):
    file = tmp_path / "train.json"
    file.write_text('{"images": [],\n "annotations" []}')
    with pytest.raises(ValueError, match=r"train\.json .* line 2, column 16 \(character 30") as e:
        read_coco(file)
    assert "cut short" not in str(e.value)


def test_json_that_is_not_text(tmp_path):
    file = tmp_path / "train.json"
    file.write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"train\.json is not UTF-8 text"):
        read_coco(file)


def test_file_of_detections_is_not_annotations(tmp_path):
    with pytest.raises(ValueError, match=r"train\.json holds a list, .* file of detections\?"):
        read_coco(write(tmp_path, [{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}])
def test_missing_lists(tmp_path, data, key, value):
    data[key] = value
    with pytest.raises(ValueError, match=rf"train\.json is not a COCO .* no list '{key}'"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("key", ["images", "categories"])
def test_empty_lists(tmp_path, data, key):
    data[key] = []
    with pytest.raises(ValueError, match=rf"train\.json lists no {key}"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_duplicate_ids(tmp_path, data, kind):
    data[kind].append({**data[kind][0]})
    shared = data[kind][0]["id"]
    with pytest.raises(
        ValueError, match=rf"train\.json: {kind}\[0\] and {kind}\[2\] .* same id {shared}\."
    ):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("kind", ["images", "categories"])
@pytest.mark.parametrize("bad", [{}, {"id": "1"}, {"id": 1.0}, {"id": True}, {"id": None}, 3, None])
def test_ids_must_be_integers(tmp_path, data, kind, bad):
    data[kind].append(bad)
    with pytest.raises(ValueError, match=rf"train\.json: {kind}\[2\] has no integer id"):
        read_coco(write(tmp_path, data))


def test_duplicate_category_names(tmp_path, data):
    data["categories"].append({"id": 11, "name": "dog"})
    match = r"categories\[0\] \(id 9\) and categories\[2\] \(id 11\) have the same name 'dog'"
    with pytest.raises(ValueError, match=match):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("name", [None, "", 3])
def test_category_without_name(tmp_path, data, name):
    data["categories"][1]["name"] = name
    with pytest.raises(ValueError, match=r"train\.json: categories\[1\] \(id 5\) has no name"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("key", ["width", "height"])
@pytest.mark.parametrize("value", [None, 0, -3, 64.5, "64", math.nan])
def test_image_without_size(tmp_path, data, key, value):
    data["images"][1][key] = value
    with pytest.raises(ValueError, match=rf"train\.json: images\[1\] \(id 7\) needs a {key}"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("value", [None, "", 3])
def test_image_without_file_name(tmp_path, data, value):
    data["images"][1]["file_name"] = value
    with pytest.raises(ValueError, match=r"train\.json: images\[1\] \(id 7\) has no file_name"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("image_id", 99, "has image_id 99, which is not among the images"),
        ("image_id", None, "has image_id None"),
        ("image_id", [1], r"has image_id \[1\]"),
        ("category_id", 1, "has category_id 1, which is not among the categories"),
        ("category_id", {}, "has category_id {}"),
        ("bbox", None, "needs a bbox of four finite numbers"),
        ("bbox", [], r"not \[\]"),
        ("bbox", [1, 2, 3], r"not \[1, 2, 3\]"),
        ("bbox", [1, 2, 3, 4, 5], "needs a bbox"),
        ("bbox", [1, 2, "3", 4], "needs a bbox"),
        ("bbox", [1, 2, None, 4], "needs a bbox"),
        ("bbox", [1, 2, math.nan, 4], "needs a bbox"),
        ("bbox", [math.inf, 2, 3, 4], "needs a bbox"),
        ("bbox", [10**400, 2, 3, 4], "needs a bbox"),
        ("iscrowd", 2, "needs an iscrowd of 0 or 1, not 2"),
        ("iscrowd", None, "needs an iscrowd of 0 or 1, not None"),
        ("ignore", 1, "is marked 'ignore'"),
    ],
)
def test_unusable_annotation(tmp_path, data, key, value, sentence):
    data["annotations"][1][key] = value
    with pytest.raises(ValueError, match=rf"train\.json: annotations\[1\] \(id 2\) .*{sentence}"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("bad", [None, 4, "box", [1, 2]])
def test_annotation_that_is_no_dict(tmp_path, data, bad):
    data["annotations"].append(bad)
    with pytest.raises(ValueError, match=r"train\.json: annotations\[2\] is not a dict"):
        read_coco(write(tmp_path, data))


def test_annotation_with_a_list_as_id(tmp_path, data):
    data["annotations"][1]["id"] = [2]
    with pytest.raises(ValueError, match=r"annotations\[1\] .* has the id \[2\]"):
        read_coco(write(tmp_path, data))


def test_missing_images_are_counted_and_three_are_named(tmp_path, data):
    data["images"] += [
        {"id": 100 + i, "file_name": f"gone{i}.png", "width": 8, "height": 8} for i in range(5)
    ]
    file = write(tmp_path, data)
    with pytest.raises(FileNotFoundError, match=r"^5 of the 7 images that .*train\.json") as error:
        register_coco(file, None, tmp_path)
    assert [f"gone{i}.png" in str(error.value) for i in range(5)] == [True] * 3 + [False] * 2
    assert not any(str(tmp_path) in name for name in DatasetCatalog.list())


def test_no_image_folder_names_both_places(tmp_path, data):
    file = write(tmp_path, data, images=())
    with pytest.raises(FileNotFoundError, match=r"train\.json, a\.png, is neither in .*images nor"):
        register_coco(file, None, tmp_path)


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
    assert "of 7 annotations" in message and "train.json" in message
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


@pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4]], [[]], "x", [1, 2, 3, 4, 5, 6], {"a": 1}])
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
