"""YOLO folders: broken data.yaml and label files."""

from __future__ import annotations

import copy
from pathlib import Path

import yaml

from .datasets import judge_dataset
from .files import copy_folder, write_images
from .judge import Surface, Try
from .mutate import edit_bytes, edit_tree

DATA = {"path": ".", "train": "images", "val": "images", "nc": 2, "names": ["cat", "dog"]}
LABEL = [[0, 0.5, 0.5, 0.25, 0.5], [1, 0.3, 0.4, 0.2, 0.2], [0, 0.1, 0.1, 0.4, 0.1, 0.3, 0.6]]


def _text(rows: list) -> str:
    lines = [" ".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows]
    return "\n".join(lines) + "\n"


def prepare(folder: Path) -> Path:
    (folder / "labels").mkdir()
    for name in write_images(folder / "images"):
        (folder / "labels" / f"{Path(name).stem}.txt").write_text(_text(LABEL))
    (folder / "data.yaml").write_text(yaml.safe_dump(DATA))
    return folder


def make(prepared: Path, one: Try) -> Path:
    copy_folder(prepared, one.folder)
    plan, path = one.plan, one.folder / "data.yaml"
    label = one.folder / "labels" / f"im{plan.special % 3}.txt"
    if plan.special % 5 < 2:
        tree = edit_tree(copy.deepcopy(DATA), plan.edits)
        text = yaml.dump(tree).replace("@twice", "").encode("utf-8", "surrogatepass")
        path.write_bytes(text if plan.of_values else edit_bytes(path.read_bytes(), plan.edits))
    elif plan.of_values:
        rows = edit_tree(copy.deepcopy(LABEL), plan.edits)
        rows = rows if isinstance(rows, list) else [rows]
        label.write_bytes(_text(rows).encode("utf-8", "surrogatepass"))
    else:
        label.write_bytes(edit_bytes(label.read_bytes(), plan.edits))
    return path


def judge(path: Path) -> str:
    return judge_dataset(f"yolo:{path}:train", path.parent, (path.name, "im", str(path.parent)))


SURFACES = {
    "yolo": Surface(
        "yolo",
        "YOLO data.yaml and label files: as COCO",
        tries=2200,
        prepare=prepare,
        make=make,
        judge=judge,
    )
}
