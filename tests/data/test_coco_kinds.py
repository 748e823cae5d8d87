"""COCO files as common tools write them: what has one meaning is read, what has none is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from coco_files import HEIGHT, WIDTH, annotation, two_images, write
from iou_d2.analysis import read_ground_truth
from iou_d2.data.cleaning import Trust
from iou_d2.data.coco import register_coco
from iou_d2.data.coco_boxes import doubt_about_boxes
from iou_d2.data.coco_masks import is_good_mask
from iou_d2.data.coco_reading import read_coco
from iou_d2.data.coco_records import LazyRecords, PackedRecords
from iou_d2.errors import InputError


@pytest.fixture
def data() -> dict:
    return two_images()


def load(tmp_path, data, trust=Trust()):  # noqa: B008
    name = register_coco(write(tmp_path, data), None, tmp_path / "clean", trust)
    first = DatasetCatalog.get(name)
    assert DatasetCatalog.get(name) == first
    # What is read from the mended copy, by whoever does, is the same.
    metadata = MetadataCatalog.get(name)
    again = read_coco(Path(metadata.json_file), tmp_path / "images", Trust(True, trust.paths))
    assert not again.findings
    packed = PackedRecords(again.data, tmp_path / "images")
    assert list(LazyRecords(packed, metadata.thing_dataset_id_to_contiguous_id)) == first
    return first, MetadataCatalog.get(name)


def test_records_equal_those_of_detectron2(tmp_path):
    rng = np.random.default_rng(0)
    data = two_images()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[5:20, 7:30] = 1
    rle = mask_util.encode(mask)
    counts = [7 * HEIGHT + 5, *[15, HEIGHT - 15] * 22, 15]
    counts.append(WIDTH * HEIGHT - sum(counts))
    masks = [
        [],
        [[4, 4, 24, 4, 24, 24], [1, 2, 3, 4]],
        {"size": rle["size"], "counts": rle["counts"].decode()},
        {"size": [HEIGHT, WIDTH], "counts": counts},
    ]
    data["annotations"] = [
        annotation(
            number + 1,
            [float(x) for x in rng.uniform(1, 20, 4)],
            image_id=int(rng.choice([1, 7])),
            category_id=int(rng.choice([5, 9])),
            iscrowd=int(rng.integers(2)),
            segmentation=copy.deepcopy(masks[number % 4]),
            keypoints=[3, 4, 2, 5.5, 6, 1] if number % 3 else [],
        )
        for number in range(60)
    ]
    file = write(tmp_path, data)
    records, metadata = load(tmp_path, data)
    assert metadata.json_file == str(file)
    assert records == load_coco_json(str(file), str(tmp_path / "images"), "coco_oracle")


def test_strings_and_decimals(tmp_path, data):
    expected, _ = load(tmp_path, copy.deepcopy(data))
    for image in data["images"]:
        image.update(id=str(image["id"]), width=float(WIDTH), height=str(HEIGHT))
    for record in data["annotations"]:
        record["bbox"] = [str(v) for v in record["bbox"]]
        record.update(image_id=float(record["image_id"]), category_id=str(record["category_id"]))
        record.update(iscrowd=None, id=f"{record['id']}.0")
    (tmp_path / "other").mkdir()
    records, metadata = load(tmp_path / "other", data)
    assert [r["annotations"] for r in records] == [r["annotations"] for r in expected]
    assert metadata.findings


@pytest.mark.parametrize("degrees", [40.0, 90, -30, "200.5"])
def test_turned_boxes_become_the_box_around_them(tmp_path, data, degrees):
    x, y, w, h = 20, 14, 20, 12
    data["annotations"][0].update(bbox=[x, y, w, h], attributes={"rotation": degrees})
    records, metadata = load(tmp_path, data)
    cos, sin = (
        abs(math.cos(math.radians(float(degrees)))),
        abs(math.sin(math.radians(float(degrees)))),
    )
    width, height = w * cos + h * sin, w * sin + h * cos
    expected = [x + w / 2 - width / 2, y + h / 2 - height / 2, width, height]
    assert records[0]["annotations"][0]["bbox"] == pytest.approx(expected)
    assert "turned" in str(metadata.findings)


def test_unused_groups(tmp_path, data):
    data["categories"] += [
        {"id": 0, "name": "dog", "supercategory": "none"},
        {"id": 3, "name": "thing", "supercategory": "dog"},
        {"id": 4, "name": "leaf", "supercategory": "thing"},
    ]
    with pytest.raises(InputError, match="same name 'dog'"):
        copied = copy.deepcopy(data)
        copied["annotations"][0]["category_id"] = 0
        load(tmp_path, copied)
    data["annotations"][0]["category_id"] = 4
    records, metadata = load(tmp_path, data)
    assert metadata.thing_classes == ["thing", "leaf", "cat", "dog"]
    assert records[0]["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path, data, mark):
    file = write(tmp_path, data)
    file.write_text(json.dumps(data), encoding=mark)
    name = register_coco(file, None, tmp_path / "clean")
    json.loads(open(MetadataCatalog.get(name).json_file, encoding="utf-8").read())


def test_missing_sizes_and_windows_names(tmp_path, data):
    del data["images"][0]["width"]
    data["images"][1]["height"] = 0
    data["images"][0]["file_name"] = "..\\..\\media\\a.png"
    data["images"][1]["file_name"] = "C:\\data\\b.png"
    records, _ = load(tmp_path, data)
    assert [(r["width"], r["height"]) for r in records] == [(WIDTH, HEIGHT)] * 2
    assert [r["file_name"].rsplit("/", 1)[1] for r in records] == ["a.png", "b.png"]


def test_no_annotations(tmp_path, data):
    del data["annotations"]
    records, metadata = load(tmp_path, data)
    assert not metadata.has_annotations and [r["annotations"] for r in records] == [[], []]


@pytest.mark.parametrize("how", ["up", "absolute", "link"])
def test_images_outside_of_the_folder(tmp_path, data, how):
    inner = tmp_path / "inner"
    inner.mkdir()
    file = write(inner, data)
    (inner / "images" / "a.png").rename(tmp_path / "secret.png")
    name = {"up": "../../secret.png", "absolute": f"{tmp_path}/secret.png", "link": "a.png"}[how]
    if how == "link":
        (inner / "images" / "a.png").symlink_to(tmp_path / "secret.png")
    data["images"][0]["file_name"] = name
    file.write_text(json.dumps(data))
    with pytest.raises(
        InputError, match=r"train\.json: images\[0\] .* outside of the image folder"
    ):
        register_coco(file, inner / "images", tmp_path / "clean")
    trusted = register_coco(file, inner / "images", tmp_path / "clean", Trust(paths=True))
    assert len(DatasetCatalog.get(trusted)) == 2


def test_corners_and_fractions_are_refused_unless_trusted(tmp_path, data):
    corners, fractions = copy.deepcopy(data), copy.deepcopy(data)
    for number in range(3):
        box = [30 + number, 20, 60, 40]
        corners["annotations"].append(annotation(10 + number, box))
        fractions["annotations"].append(annotation(10 + number, [0.1 * number, 0.2, 0.3, 0.4]))
    corners["annotations"] = corners["annotations"][2:]
    for broken, words in ((corners, "look like corners"), (fractions, "look like fractions")):
        with pytest.raises(InputError, match=words):
            load(tmp_path, broken)
    assert load(tmp_path, corners, Trust(boxes=True))[0]


def test_honest_boxes_near_the_border_are_not_doubted():
    sizes = np.full((5, 2), 100.0)
    tiny = np.array([[50.0, 50, 0.5, 0.5]] * 5)
    loose = np.array([[5.0, 5, 99, 97]] * 5)
    some = np.array([[10.0, 10, 20, 20], [30, 60, 20, 20], [90, 20, 30, 9], [60, 60, 8, 8],
                     [0, 0, 1, 1]])  # fmt: skip
    one = np.array([[20.0, 20, 95, 95]])
    for boxes in (tiny, loose, some, one, one[:0]):
        assert doubt_about_boxes(boxes, sizes[: len(boxes)]) is None


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"images": [' + "1" * 5000 + "]}", '{"images": [], "images": []}'],
)
def test_hostile_text(tmp_path, data, text):
    file = write(tmp_path, data)
    file.write_text(text)
    with pytest.raises(InputError, match=r"train\.json"):
        register_coco(file, None, tmp_path)


@pytest.mark.parametrize("counts", [[10**12], [1], [-1, WIDTH * HEIGHT + 1], "ooo", "\x00", "", 5])
def test_hostile_masks_never_reach_pycocotools(counts):
    assert not is_good_mask({"size": [HEIGHT, WIDTH], "counts": counts}, (WIDTH, HEIGHT))
    assert not is_good_mask({"size": [10**6, 10**6], "counts": [10**12]}, None)


def test_compressed_masks_are_counted_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for density in (0.01, 0.5, 0.99):
        mask = np.asfortranarray((rng.random((37, 53)) < density).astype(np.uint8))
        rle = mask_util.encode(mask)
        good = {"size": [37, 53], "counts": rle["counts"].decode()}
        assert is_good_mask(good, (53, 37))
        assert not is_good_mask({**good, "size": [37, 54]}, None)


def test_analysis_sees_what_training_sees(tmp_path, data):
    data["annotations"] += [annotation(3, [40, 30, 100, 100]), annotation(4, [5, 5, 0, 9])]
    records, metadata = load(tmp_path, data)
    boxes = [a["bbox"] for r in records for a in r["annotations"]]
    for path in (tmp_path / "train.json", metadata.json_file):
        assert sorted(a["bbox"] for a in read_ground_truth(path)["annotations"]) == sorted(boxes)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "1e13"])
@pytest.mark.parametrize("key", ["bbox", "area", "segmentation"])
def test_numbers_beyond_every_image(tmp_path, data, number, key):
    good = data["annotations"][0]
    good[key] = {"bbox": [4, 4, 20, "N"], "area": "N", "segmentation": [[4, 4, 24, 4, 24, "N"]]}[
        key
    ]
    file = write(tmp_path, data)
    file.write_text(file.read_text().replace('"N"', number))
    if key == "bbox":
        with pytest.raises(InputError, match=r"train\.json: annotations\[0\] .* finite numbers"):
            register_coco(file, None, tmp_path / "clean")
        return
    name = register_coco(file, None, tmp_path / "clean")
    assert MetadataCatalog.get(name).findings
    text = Path(MetadataCatalog.get(name).json_file).read_text()
    json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize("name", ["\ud800.png", "a\udcff.png", "a\0.png"])
def test_file_names_that_are_no_text(tmp_path, data, name):
    file = write(tmp_path, data)
    data["images"][0]["file_name"] = name
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"train\.json: images\[0\] \(id .*\) has no file_name"):
        register_coco(file, None, tmp_path / "clean")
