"""COCO JSON files: broken bytes, and values of every wrong type."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from .datasets import judge_dataset
from .files import SIDES, copy_folder, write_images
from .judge import Surface, Try
from .mutate import edit_bytes, edit_tree, to_json


def valid_json(names: list[str]) -> dict:
    images = [
        {"id": i + 1, "file_name": name, "width": w, "height": h}
        for i, (name, (w, h)) in enumerate(zip(names, SIDES))
    ]
    annotations = [
        {
            "id": i + 1,
            "image_id": i % len(images) + 1,
            "category_id": 1 + 2 * (i % 2),
            "bbox": [2.0 + i, 3, 10.5, 9 + i],
            "area": 10.5 * (9 + i),
            "iscrowd": int(i == 5),
            "segmentation": [[2.0 + i, 3, 12.5 + i, 3, 12.5 + i, 12 + i]] if i != 5 else [],
        }
        for i in range(6)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog", "supercategory": "animal"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def prepare(folder: Path) -> tuple[Path, dict]:
    return folder, valid_json(write_images(folder / "images"))


def make(prepared: tuple[Path, dict], one: Try) -> Path:
    folder, data = prepared
    copy_folder(folder, one.folder)
    plan, path = one.plan, one.folder / "instances.json"
    if plan.of_values:
        path.write_bytes(to_json(edit_tree(copy.deepcopy(data), plan.edits)))
    else:
        path.write_bytes(edit_bytes(json.dumps(data).encode(), plan.edits))
    return path


def judge(path: Path) -> str:
    return judge_dataset(f"coco:{path}", path.parent, (path.name,))


SURFACES = {
    "coco": Surface(
        "coco",
        "COCO JSON: boxes with area inside their image, known classes, images that are there",
        tries=2500,
        prepare=prepare,
        make=make,
        judge=judge,
        chunks=2,
    )
}
