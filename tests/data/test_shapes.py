"""The generated dataset `shapes`: exact boxes, same bytes, what it holds, safe writing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_d2.data import shapes, shapes_image
from iou_d2.data.shapes import ShapesSpec, ensure_shapes, parse_shapes_name, write_shapes
from iou_d2.data.shapes_image import CLASSES, make_image, tight_box

# pycocotools with NumPy 2, for every mask it decodes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIXELS = 128
IMAGES = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(ShapesSpec("train", IMAGES, PIXELS), path)
    return path


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads((folder / "instances.json").read_text())


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Register names under an empty root, and forget them again."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    names = []

    def register_name(name: str) -> bool:
        assert name not in DatasetCatalog.list(), f"{name} belongs to another test"
        names.append(name)
        return shapes.register_shapes_by_name(name)

    yield register_name
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def loop_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Oracle: XYXY extent by a loop over all covered pixels."""
    x1 = y1 = 10**9
    x2 = y2 = -1
    for y, x in np.argwhere(mask).tolist():
        x1, y1, x2, y2 = min(x1, x), min(y1, y), max(x2, x), max(y2, y)
    return x1, y1, x2 + 1, y2 + 1


def by_image(data: dict) -> list[list[dict]]:
    groups = {record["id"]: [] for record in data["images"]}
    for annotation in data["annotations"]:
        groups[annotation["image_id"]].append(annotation)
    return list(groups.values())


# ---------------------------------------------------------------------------- one image


def test_boxes_are_the_extent_of_the_masks():
    for index in range(12):
        for annotation in make_image(3, 1, index, 96)[1]:
            assert annotation.box == loop_box(annotation.mask)


def test_tight_box_of_single_pixels_and_of_nothing():
    mask = np.zeros((5, 7), bool)
    assert tight_box(mask) == (0, 0, 0, 0)
    mask[4, 6] = True
    assert tight_box(mask) == (6, 4, 7, 5)
    mask[0, 2] = True
    assert tight_box(mask) == (2, 0, 7, 5)


def test_image_depends_on_seed_split_and_index_only():
    image, annotations = make_image(5, 0, 2, 64)
    again, _ = make_image(5, 0, 2, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert annotations and all(a.mask.shape == (64, 64) for a in annotations)
    np.testing.assert_array_equal(image, again)
    for other in [(6, 0, 2), (5, 1, 2), (5, 0, 3)]:
        assert not np.array_equal(image, make_image(*other, 64)[0])


def test_objects_stay_visible():
    """Painted in order, each keeps half of its pixels; others and its occluder hide the rest."""
    kept = []
    for index in range(60):
        objects = shapes_image._arrange(np.random.default_rng([0, 0, index]), PIXELS)
        owner = np.full((PIXELS, PIXELS), -1)
        for i, placed in enumerate(objects):
            owner[placed.paint] = i
        kept += [(owner == i).sum() / placed.mask.sum() for i, placed in enumerate(objects)]
    assert min(kept) >= 0.5 and np.mean(np.array(kept) < 0.8) > 0.15


def test_an_object_changes_the_pixels_inside_its_box():
    """Pixels in boxes must differ from the ground more than the ground differs from itself."""
    inside, outside = [], []
    for index in range(30):
        image, annotations = make_image(0, 0, index, PIXELS)
        covered = np.any([a.mask for a in annotations], axis=0)
        if not annotations or covered.all():
            continue
        ground = np.median(image[~covered], axis=0)
        distance = np.linalg.norm(image - ground, axis=2)
        inside.append(distance[covered].mean())
        outside.append(distance[~covered].mean())
    assert np.mean(inside) > 2 * np.mean(outside)


# ---------------------------------------------------------------------------- the same bytes


def test_same_bytes_for_any_number_of_threads(tmp_path, monkeypatch):
    spec = ShapesSpec("val", 70, 64, seed=9)  # more than one chunk
    write_shapes(spec, tmp_path / "two")
    monkeypatch.setattr(shapes, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    write_shapes(spec, tmp_path / "one")
    monkeypatch.setattr(shapes, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(5))
    write_shapes(spec, tmp_path / "five")
    assert len(digests(tmp_path / "two")) == 71
    assert digests(tmp_path / "two") == digests(tmp_path / "one") == digests(tmp_path / "five")


def test_long_set_begins_with_short_set(folder, tmp_path):
    write_shapes(ShapesSpec("train", 3, PIXELS), tmp_path / "short")
    short, long = digests(tmp_path / "short"), digests(folder)
    names = [name for name in short if name.endswith(".png")]
    assert len(names) == 3 and all(short[name] == long[name] for name in names)


def test_finished_set_is_not_made_again(tmp_path):
    spec = ShapesSpec("train", 2, 64)
    write_shapes(spec, tmp_path / "set")
    before = (tmp_path / "set" / "instances.json").stat().st_mtime_ns
    write_shapes(spec, tmp_path / "set")
    assert (tmp_path / "set" / "instances.json").stat().st_mtime_ns == before
    write_shapes(ShapesSpec("train", 2, 64, seed=1), tmp_path / "set")
    assert (tmp_path / "set" / "instances.json").stat().st_mtime_ns != before


# ---------------------------------------------------------------------------- what it holds


def test_sizes_and_counts(data):
    singles = [a for a in data["annotations"] if not a["iscrowd"]]
    longer = np.array([max(a["bbox"][2:]) for a in singles]) / PIXELS
    pixel = 2 / PIXELS  # drawing rounds outwards
    assert longer.max() <= 1 / 2 + pixel and longer.max() > 0.4
    # Cut by the border an object may be shorter than 1/16, but it keeps half of its area.
    assert longer.min() >= 0.5 / 16 and np.quantile(longer, 0.02) >= 1 / 16 - pixel
    counts = [sum(not a["iscrowd"] for a in group) for group in by_image(data)]
    assert max(counts) <= 7 and 3 < np.mean(counts) < 6
    labels = np.bincount([a["category_id"] for a in singles], minlength=6)
    assert labels[0] == 0 and (labels[1:] > 0.12 * len(singles)).all()


def test_same_class_pairs_overlap(data):
    """Half of the images hold a pair with IoU 0.3 to 0.6, and no boxes overlap by more."""
    with_pair = 0
    for group in by_image(data):
        singles = [a for a in group if not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in singles], dtype=np.float64).reshape(-1, 4)
        ious = mask_util.iou(boxes, boxes, [0] * len(boxes)) if len(boxes) else np.zeros((0, 0))
        pairs = list(itertools.combinations(range(len(boxes)), 2))
        assert all(ious[i, j] <= 0.6 + 1e-9 for i, j in pairs)
        with_pair += any(
            ious[i, j] >= 0.3 and singles[i]["category_id"] == singles[j]["category_id"]
            for i, j in pairs
        )
    assert 0.5 <= with_pair / IMAGES <= 0.8


def test_empty_images_crowds_and_truncated_objects(data):
    groups = by_image(data)
    assert 0.015 <= np.mean([not group for group in groups]) <= 0.08
    crowds = [a for a in data["annotations"] if a["iscrowd"]]
    assert 0.03 <= len(crowds) / IMAGES <= 0.1
    parts = [cv2.connectedComponents(mask_util.decode(a["segmentation"]))[0] - 1 for a in crowds]
    assert min(parts) >= 5 and np.mean(parts) >= 8, "a crowd region is made of many objects"
    cut = [
        x == 0 or y == 0 or x + w == PIXELS or y + h == PIXELS
        for x, y, w, h in (a["bbox"] for a in data["annotations"])
    ]
    assert 0.03 <= np.mean(cut) <= 0.25


def test_colour_does_not_tell_the_class():
    """The nearest mean colour of a class guesses the class of new objects no better than chance."""
    means, labels = [], []
    for index in range(150):
        image, annotations = make_image(0, 0, index, 64)
        for annotation in annotations:
            means.append(image[annotation.mask].mean(axis=0))
            labels.append(annotation.label)
    means, labels = np.array(means), np.array(labels)
    half = len(labels) // 2
    centres = [means[:half][labels[:half] == label].mean(axis=0) for label in range(len(CLASSES))]
    guesses = np.linalg.norm(means[half:, None] - np.array(centres), axis=2).argmin(axis=1)
    assert (guesses == labels[half:]).mean() < 0.32


# ---------------------------------------------------------------------------- COCO


def test_json_is_valid_coco(folder, data):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
    assert [c["name"] for c in data["categories"]] == list(CLASSES)
    assert [i["id"] for i in data["images"]] == list(range(1, IMAGES + 1))
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    assert len(list((folder / "images").iterdir())) == IMAGES
    for record in data["images"][:20]:
        image = cv2.imread(str(folder / "images" / record["file_name"]))
        assert image.shape == (record["height"], record["width"], 3) == (PIXELS, PIXELS, 3)
    for annotation in data["annotations"]:
        mask = coco.annToMask(annotation)
        assert annotation["bbox"] == mask_util.toBbox(annotation["segmentation"]).tolist()
        assert annotation["area"] == mask.sum() > 0


def test_ground_truth_as_detections_has_ap_one(folder, data):
    detections = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in data["annotations"]
        if not a["iscrowd"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_detectron2_loads_it_at_first_use(register, tmp_path):
    name = "shapes_val_30x64"
    assert register(name) and not list(tmp_path.iterdir()), "registration makes no data"
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == list(CLASSES)
    dicts = DatasetCatalog.get(name)
    data = json.loads(Path(metadata.json_file).read_text())
    assert Path(metadata.json_file).is_relative_to(tmp_path)
    assert len(dicts) == 30 and all(Path(d["file_name"]).is_file() for d in dicts)
    assert [len(d["annotations"]) for d in dicts] == [len(g) for g in by_image(data)]
    loaded = [a for d in dicts for a in d["annotations"]]
    for mine, theirs in zip(data["annotations"], loaded):
        assert theirs["bbox"] == mine["bbox"] and theirs["iscrowd"] == mine["iscrowd"]
        assert theirs["category_id"] == mine["category_id"] - 1


def test_evaluator_works_before_the_loader_is_called(register, tmp_path):
    name = "shapes_val_3x64"
    register(name)
    ensure_shapes(name)
    COCOEvaluator(name, output_dir=str(tmp_path / "out"), use_fast_impl=False)


# ---------------------------------------------------------------------------- names


def test_names():
    assert parse_shapes_name("shapes_train") == ShapesSpec("train", 1000, 256, 0)
    assert parse_shapes_name("shapes_val") == ShapesSpec("val", 200, 256, 0)
    assert parse_shapes_name("shapes_val_5x64") == ShapesSpec("val", 5, 64, 0)


@pytest.mark.parametrize(
    "name",
    ["shapes_", "shapes_test", "shapes_train_", "shapes_train_5", "shapes_train_0x64",
     "shapes_train_5x063", "shapes_train_5x64\n", "shapes_val_-5x64", "shapes_val_5x64x3"],
)  # fmt: skip
def test_malformed_name_is_told(name):
    with pytest.raises(ValueError, match="is not a name of a shapes dataset: write"):
        shapes.register_shapes_by_name(name)
    assert name not in DatasetCatalog.list()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("test", 5, 64, 0), "split"),
        (("val", 0, 64, 0), "at least 1 image"),
        (("val", 5, 63, 0), "64 to 4096 pixels"),
        (("val", 5, 4097, 0), "64 to 4096 pixels"),
        (("val", 5, 64, -1), "seed"),
    ],
)
def test_values_out_of_range_are_told(values, message):
    with pytest.raises(ValueError, match=message):
        ShapesSpec(*values)


def test_other_names_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shapes.register_shapes_by_name("coco_2017_train") is False
    ensure_shapes("coco_2017_train")
    ensure_shapes("shapes_of_my_own")
    assert not list(tmp_path.iterdir())


def test_base_names_register_once():
    shapes.register_shapes()
    shapes.register_shapes()
    assert {"shapes_train", "shapes_val"} <= set(DatasetCatalog.list())


# ---------------------------------------------------------------------------- safe writing


def start_writer(folder: Path, images: int) -> multiprocessing.Process:
    """Write a set in another process: forked, for a new one takes seconds to import PyTorch."""

    def write():
        cv2.setNumThreads(0)  # OpenCV's threads do not survive the fork
        write_shapes(ShapesSpec("train", images, 64), folder)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    return process


def test_killed_half_way_then_two_at_once(tmp_path):
    """A killed writer leaves no set; two later ones find it whole, as one alone makes it."""
    folder = tmp_path / "set"
    writer = start_writer(folder, 100_000)
    unfinished = tmp_path / "set.partial" / "images"
    deadline = time.monotonic() + 60
    while not (unfinished.is_dir() and len(os.listdir(unfinished)) > 20):
        assert writer.is_alive() and time.monotonic() < deadline, "no image was written"
        time.sleep(0.05)
    writer.kill()
    writer.join()
    assert not folder.exists() and unfinished.is_dir()

    writers = [start_writer(folder, 150) for _ in range(2)]
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    write_shapes(ShapesSpec("train", 150, 64), tmp_path / "alone")
    assert digests(folder) == digests(tmp_path / "alone")
    assert not unfinished.exists()


def test_incomplete_folder_is_made_anew(tmp_path):
    spec = ShapesSpec("train", 2, 64)
    write_shapes(spec, tmp_path / "whole")
    write_shapes(spec, tmp_path / "set")
    expected = digests(tmp_path / "whole")
    for damage in (b"", b'{"info": {"desc', b"\xff\xfe", None):
        path = tmp_path / "set" / "instances.json"
        path.unlink() if damage is None else path.write_bytes(damage)
        write_shapes(spec, tmp_path / "set")
        assert digests(tmp_path / "set") == expected


def test_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "root").write_text("a file in place of a folder")
    for folder in (tmp_path / "root" / "set", tmp_path / "root"):
        with pytest.raises(OSError, match=f"Cannot write the shapes dataset to {folder} "):
            write_shapes(ShapesSpec("train", 2, 64), folder)
    assert (tmp_path / "root").is_file() and not (tmp_path / "root.partial").exists()


def test_full_disk_is_told_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # less than one image
        with pytest.raises(OSError, match="Cannot write the shapes dataset to .*has room"):
            write_shapes(ShapesSpec("train", 4, 128), tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["set.lock"]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    """At no time do more records wait than those of one chunk."""
    made, waiting = [], []
    make_one, write_records = shapes._make_one, shapes._write_records

    def counted_make_one(*args):
        made.append(1)
        return make_one(*args)

    def watched(file, records):
        def watch():
            for record in records:
                if "image_id" in record:
                    waiting.append(len(made) - record["image_id"])
                yield record

        write_records(file, watch())

    monkeypatch.setattr(shapes, "_make_one", counted_make_one)
    monkeypatch.setattr(shapes, "_write_records", watched)
    write_shapes(ShapesSpec("train", 300, 64), tmp_path / "set")
    assert len(made) == 300 and max(waiting) <= shapes._CHUNK


def test_command_makes_a_set_and_a_contact_sheet(tmp_path, monkeypatch, capsys):
    tool = str(Path(__file__).parents[2] / "tools" / "make_shapes.py")
    sheet = tmp_path / "sheet.png"
    options = ["--images", "4", "--pixels", "64", "--out", str(tmp_path / "set")]
    monkeypatch.setattr(sys, "argv", [tool, *options, "--contact-sheet", str(sheet)])
    runpy.run_path(tool, run_name="__main__")
    assert len(digests(tmp_path / "set")) == 5 and cv2.imread(str(sheet)).any()
    with pytest.raises(SystemExit):
        runpy.run_path(tool, run_name="__main__")
    assert "takes a new or an empty folder" in capsys.readouterr().err
