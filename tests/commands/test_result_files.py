"""`iou-d2 analyze` and `iou-d2 draw` on result files."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from iou_d2.commands import analyze, draw
from iou_d2.errors import InputError


def box(image_id: int, x: float) -> dict:
    return {"image_id": image_id, "category_id": 1, "bbox": [x, 10, 20, 20]}


@pytest.fixture
def folder(tmp_path):
    """Two images of one stem in two folders, and one of that stem with another ending."""
    names = ["a/x.png", "b/x.png", "a/x.bmp"]
    truth = {
        "images": [
            {"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {**box(i, 10), "id": i + 1, "area": 400, "iscrowd": 0} for i in range(len(names))
        ],
    }
    for value, name in enumerate(names, start=1):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((48, 64, 3), 60 * value, dtype=np.uint8))
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    return tmp_path


def write_results(folder, results: list[dict]) -> list[str]:
    (folder / "results.json").write_text(json.dumps(results))
    return ["--gt", str(folder / "gt.json"), "--results", str(folder / "results.json")]


def test_pictures_of_equal_stems_are_all_drawn(folder):
    files = write_results(folder, [{**box(i, 12), "score": 0.9} for i in range(3)])
    draw.main([*files, "--images", str(folder), "--output", str(folder / "out")])
    pictures = {path.name: cv2.imread(str(path)) for path in (folder / "out").iterdir()}
    assert sorted(pictures) == ["x.png", "x_2.png", "x_3.png"]
    # Each has the grey of its image in the corner that no box reaches.
    greys = [int(pictures[name][-1, 0, 0]) for name in ("x.png", "x_2.png", "x_3.png")]
    assert greys == [60, 120, 180]


def test_a_count_is_printed_as_an_integer(folder, capsys):
    count = 12345
    results = [{**box(i % 3, 10), "score": 0.5 + i / count / 4} for i in range(count)]
    analyze.main([*write_results(folder, results), "--output", str(folder / "out")])
    rows = [
        line.replace(" ", "").strip("|").split("|") for line in capsys.readouterr().out.split("\n")
    ]
    assert ["detections", str(count)] in rows


def test_ground_truth_without_annotations(folder):
    files = write_results(folder, [{**box(i, 12), "score": 0.9} for i in range(3)])
    truth = json.loads((folder / "gt.json").read_text())
    del truth["annotations"]
    (folder / "gt.json").write_text(json.dumps(truth))
    draw.main([*files, "--images", str(folder), "--output", str(folder / "out")])
    drawn = cv2.imread(str(folder / "out/x.png"))
    middle = drawn.shape[1] // 2
    assert (drawn[:, : middle - 8] == 60).all() and (drawn[:, middle + 8 :] != 60).any()
    with pytest.raises(InputError, match="gt.json has no annotations: there is nothing to compare"):
        analyze.main([*files, "--output", str(folder / "out")])
