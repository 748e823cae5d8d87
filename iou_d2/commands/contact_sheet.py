"""Twenty images of datasets with their boxes, in one picture."""

from __future__ import annotations

import os
import random
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from iou_d2.detectors.visualize import draw_boxes
from iou_d2.errors import InputError

COLUMNS, ROWS = 5, 4
_CELL = 400  # pixels
_DRAWN = 100  # objects of an image


def draw_sheet(sets: dict[str, list[dict]], folder: Path, seed: int = 0) -> Path:
    """Write pictures.png into `folder`: images drawn at random, those with objects first.

    `sets`: name of a registered dataset -> its dicts. An image that cannot be read leaves a cell
    with its name. Raises InputError where the picture cannot be written.
    """
    pairs = [(name, record) for name, dicts in sets.items() for record in dicts]
    random.Random(seed).shuffle(pairs)
    pairs.sort(key=lambda pair: not pair[1].get("annotations"))
    cells = [_cell(name, record) for name, record in pairs[: COLUMNS * ROWS]]
    blank = np.full((_CELL, _CELL, 3), 255, dtype=np.uint8)
    rows = -(-len(cells) // COLUMNS) or 1
    cells += [blank] * (rows * COLUMNS - len(cells))
    lines = [np.hstack(cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pictures.png"
    if not cv2.imwrite(str(file), np.vstack(lines)):
        raise InputError(f"The picture {file} cannot be written.")
    return file


def _cell(name: str, record: dict) -> np.ndarray:
    """(_CELL, _CELL, 3) uint8 BGR: the image with its boxes, on white."""
    cell = np.full((_CELL, _CELL, 3), 255, dtype=np.uint8)
    try:
        image = read_image(record["file_name"], format="BGR")
    except Exception:  # Pillow raises half a dozen types; the check has told this image
        text = f"unreadable: {os.path.basename(record['file_name'])}"
        cv2.putText(cell, text, (8, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 200), 1, cv2.LINE_AA)
        return cell
    drawn = _with_boxes(image, record, MetadataCatalog.get(name).thing_classes)
    scale = (_CELL - 8) / max(drawn.shape[:2])
    width, height = (max(1, round(side * scale)) for side in drawn.shape[1::-1])
    cell[:height, :width] = cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA)
    return cell


def _with_boxes(image: np.ndarray, record: dict, class_names: list[str]) -> np.ndarray:
    """Boxes are those of the annotations, also where the image has another size than they say."""
    annotations = record.get("annotations", [])[:_DRAWN]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = [annotation["category_id"] for annotation in annotations]
    labels = [
        class_names[index] + (" crowd" if annotation.get("iscrowd") else "")
        for index, annotation in zip(classes, annotations)
    ]
    return draw_boxes(image, np.array(boxes, dtype=np.float64), classes, labels)
