"""Boxes against their image, lists of missing files, and copies written at once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_d2.data.cleaning import (
    CLIPPED,
    NO_AREA,
    OUTSIDE,
    OVERSHOOT,
    clean_box,
    copy_name,
    missing_files,
    require_files,
    write_text,
)

side = st.floats(-200, 200) | st.integers(-40, 140)


@settings(deadline=None, database=None)
@given(st.tuples(side, side, side, side))
def test_every_kept_box_shows_in_its_image_and_loses_only_what_does_not(box):
    width, height = 100, 50
    kept, finding = clean_box(box, width, height)
    x0, y0, x1, y1 = (
        min(max(value, 0), limit) for value, limit in zip(box, (width, height, width, height))
    )
    visible = max(x1 - x0, 0) * max(y1 - y0, 0) > 0 or (x1 > x0 and y1 > y0)
    assert (kept is not None) == visible
    if kept is None:
        has_area = box[2] > box[0] and box[3] > box[1]
        assert finding == (OUTSIDE if has_area else NO_AREA)
    elif finding == CLIPPED:
        assert kept == (x0, y0, x1, y1)
    else:
        assert kept == box and finding is None
        overshoot = max(-box[0], -box[1], box[2] - width, box[3] - height)
        assert overshoot <= OVERSHOOT


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 0), (5, 5, 5, 9), (5, 5, 9, 5), (9, 9, 5, 5), (200, 0, 100, 9)]
)
def test_no_area(box):
    assert clean_box(box, 100, 50) == (None, NO_AREA)


@pytest.mark.parametrize("box", [(-9, 0, 0, 9), (0, -9, 9, 0), (100, 0, 109, 9), (0, 50, 9, 59)])
def test_touching_the_image_from_outside(box):
    assert clean_box(box, 100, 50) == (None, OUTSIDE)


def test_smallest_and_huge_boxes():
    tiny = (5.0, 5.0, math.nextafter(5.0, 6.0), 6.0)
    assert clean_box(tiny, 100, 50) == (tiny, None)
    assert clean_box((-1e11, -1e11, 1e11, 1e11), 100, 50) == ((0, 0, 100, 50), CLIPPED)


def test_missing_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good").symlink_to(tmp_path / "sub" / "a")
    there = [f"{tmp_path}/sub/a", f"{tmp_path}/sub/../sub/a", f"{tmp_path}//sub//a"]
    gone = [f"{tmp_path}/{name}" for name in ("b", "sub/b", "none/a", "sub", "link", "sub/")]
    assert missing_files([*there, *gone, f"{tmp_path}/good"]) == gone
    assert missing_files([]) == []


def test_require_files(tmp_path):
    require_files(tmp_path, "images", [])
    with pytest.raises(FileNotFoundError, match="1 of the 1 images that .* the first: x."):
        require_files(tmp_path, "images", ["x"])


def test_copies_of_different_datasets_do_not_meet():
    assert copy_name("train", "coco:a/train.json:i") != copy_name("train", "coco:b/train.json:i")
    assert copy_name("train", "coco:a:i") == copy_name("train", "coco:a:i")


def test_write_text_replaces_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "a" / "b.json"
    write_text(file, "old and longer")
    write_text(file, "neü")
    assert file.read_text(encoding="utf-8") == "neü"
    assert list(file.parent.iterdir()) == [file]
