"""Counts of a dataset, by hand."""

from __future__ import annotations

from detectron2.structures import BoxMode

from iou_d2.data.statistics import (
    alike,
    collect,
    count_classes,
    count_sizes,
    hints,
    joined,
    percentiles,
    shared_images,
)


def record(*annotations: tuple) -> dict:
    """Of (class, box XYWH, is crowd) each."""
    keys = ("category_id", "bbox", "iscrowd")
    objects = [{**dict(zip(keys, a)), "bbox_mode": BoxMode.XYWH_ABS} for a in annotations]
    return {"file_name": "x.png", "width": 200, "height": 150, "annotations": objects}


DICTS = [
    record((0, [0, 0, 10, 20], 0), (0, [0, 0, 10, 20], 0), (2, [0, 0, 10, 20], 0)),
    record((1, [0, 0, 32, 32], 0), (0, [5, 5, 96, 96], 0), (0, [0, 0, 9, 9], 1)),
    record((0, [0, 0, 50, 0.5], 0)),
    record((0, [0, 0, 9, 9], 1)),
    record(),
]


def test_counts():
    objects = collect(DICTS)
    assert (len(objects.boxes), objects.crowds, objects.empty_images) == (6, 2, 2)
    assert objects.boxes[4].tolist() == [5, 5, 101, 101]
    counts, images = count_classes(objects, 4)
    assert counts.tolist() == [4, 1, 1, 0]
    assert images.tolist() == [3, 1, 1, 0]
    # 32^2 is no longer small and 96^2 is large, as in COCO.
    assert count_sizes(objects) == {"small": 4, "medium": 1, "large": 1}


def test_hints_count_what_is_odd():
    found = hints(collect(DICTS), ["a", "b", "c", "d"])
    assert found == [
        "1 of 6 objects have a side under one pixel.",
        "1 of 6 objects are over 10 times as long as wide.",
        "1 of 6 objects repeat the box and the class of another in their image.",
        "1 of 6 objects repeat the box of another of their image with another class.",
        "4 of 4 classes have under 10 objects: a (4), b (1), c (1), d (0).",
    ]


def test_other_box_modes_and_no_dicts():
    corners = {"category_id": 0, "bbox": [1, 2, 4, 8], "bbox_mode": BoxMode.XYXY_ABS}
    objects = collect([{"width": 9, "height": 9, "annotations": [corners]}])
    assert objects.sides.tolist() == [[3, 6]]
    nothing = collect([])
    assert (len(nothing.boxes), nothing.empty_images, percentiles(nothing.boxes[:, 0])) == (
        0,
        0,
        [],
    )
    assert hints(nothing, []) == []


def test_images_are_shared_by_path_or_by_content(tmp_path):
    for name, content in [("a", b"one"), ("b", b"two"), ("copy", b"one"), ("long", b"longer")]:
        (tmp_path / name).write_bytes(content)
    paths = {name: str(tmp_path / name) for name in ("a", "b", "copy", "long", "gone")}
    first = [paths["a"], paths["b"], paths["gone"]]
    second = [paths["copy"], paths["b"], paths["long"], paths["gone"]]
    assert shared_images(first, second) == [
        (paths["a"], paths["copy"]),
        (paths["b"], paths["b"]),
    ]


def test_unreadable_files_are_in_no_pair(tmp_path):
    (tmp_path / "folder").mkdir()
    paths = [str(tmp_path / "folder"), str(tmp_path / "other")]
    (tmp_path / "other").mkdir()
    assert shared_images(paths[:1], [paths[1], "with\0zero"]) == []


def test_names_that_differ_by_case_and_blanks_are_alike():
    names = ["cat", "Cat ", "dog", "traffic light", "traffic_light", "cat", "cats"]
    assert alike(names) == [["cat", "Cat "], ["traffic light", "traffic_light"]]
    assert alike([]) == []


def test_joined_objects_are_those_of_the_joined_dicts():
    parts = [DICTS[:2], [], DICTS[2:]]
    together, expected = joined([collect(part) for part in parts]), collect(DICTS)
    for field in ("boxes", "classes", "images", "sizes"):
        assert getattr(together, field).tolist() == getattr(expected, field).tolist()
    assert together.crowds == expected.crowds
