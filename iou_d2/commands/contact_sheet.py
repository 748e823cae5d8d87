"""Twenty images of datasets with their boxes, in one picture."""

from __future__ import annotations

import os
import random
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw

from iou_d2.commands.drawing import (
    color_of,
    draw_box,
    font_of,
    printable,
    readable_on,
    shortened,
    write_label,
)
from iou_d2.commands.pictures import read_picture, write_picture
from iou_d2.errors import InputError

COLUMNS, ROWS = 5, 4
# Pixels. Everything is drawn at the size that it has in the sheet.
_CELL, _CAPTION, _GAP = 480, 44, 8
_LETTER, _LINE = 15, 50  # height of letters in pixels, letters of a line
_FONT = font_of(_LETTER)
_DRAWN = 300  # objects of an image
_LABELLED = 12  # with more objects labels would hide them; the caption names the classes anyway
_RED = (200, 0, 0)


def draw_sheet(sets: dict[str, list[dict]], folder: Path, seed: int = 0) -> Path:
    """Write pictures.png into `folder`: images drawn at random, those with objects first.

    A caption under each has the name of the file and the classes in the colours of their boxes. An
    image that cannot be used leaves a cell that says why.

    `sets`: name of a registered dataset -> its dicts. Raises InputError where the picture cannot be
    written.
    """
    pairs = [(name, record) for name, dicts in sets.items() for record in dicts]
    random.Random(seed).shuffle(pairs)
    pairs.sort(key=lambda pair: not pair[1].get("annotations"))
    pairs = pairs[: COLUMNS * ROWS]
    columns = max(1, min(COLUMNS, len(pairs)))
    rows = -(-len(pairs) // columns) or 1
    sheet = Image.new("RGB", (columns * _CELL, rows * _CELL), "white")
    for index, (name, record) in enumerate(pairs):
        cell = draw_cell(record, MetadataCatalog.get(name).thing_classes)
        sheet.paste(cell, (index % columns * _CELL, index // columns * _CELL))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pictures.png"
    write_picture(file, np.asarray(sheet)[:, :, ::-1])
    return file


def draw_cell(record: dict, class_names: list[str]) -> Image.Image:
    """A picture of _CELL x _CELL: the image of one of Detectron2's dicts, its boxes, a caption."""
    cell = Image.new("RGB", (_CELL, _CELL), "white")
    name, room = os.path.basename(record["file_name"]), _CELL - _GAP
    try:
        bgr = read_picture(record["file_name"])
    except InputError as error:
        reason = str(error).replace(str(record["file_name"]), name)
        ImageDraw.Draw(cell).rectangle((0, 0, room - 1, room - 1), outline=_RED, width=2)
        _write_lines(ImageDraw.Draw(cell), f"{name} cannot be used: {reason}")
        return cell
    picture = Image.fromarray(np.ascontiguousarray(bgr[:, :, ::-1]))
    scale = min(room / picture.width, (room - _CAPTION) / picture.height)
    drawn = picture.resize([max(1, round(side * scale)) for side in picture.size])
    _draw_objects(drawn, record, class_names, scale)
    cell.paste(drawn, (0, 0))
    draw = ImageDraw.Draw(cell)
    said = record["width"], record["height"]
    title, color = name, "black"
    if picture.size != said:
        title = f"{name}: not {said[0]}x{said[1]}, but {picture.width}x{picture.height}"
        color = _RED
    draw.text((2, drawn.height + 2), shortened(title, room, _FONT), color, _FONT)
    _write_classes(draw, record, class_names, drawn.height + _CAPTION // 2 + 2, room)
    return cell


def _draw_objects(picture: Image.Image, record: dict, class_names: list[str], scale: float) -> None:
    """Boxes where the annotations have them, also in an image of another size than they say."""
    draw = ImageDraw.Draw(picture)
    annotations = record.get("annotations", [])
    labelled = len(class_names) > 1 and len(annotations) <= _LABELLED
    for annotation in annotations[:_DRAWN]:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        box = [float(value) * scale for value in box]
        color = color_of(annotation["category_id"])
        draw_box(draw, box, color)
        if labelled or annotation.get("iscrowd"):
            crowd = " (crowd)" if annotation.get("iscrowd") else ""
            label = class_names[annotation["category_id"]] + crowd
            write_label(draw, box[0], box[1], label, color, picture.width, _FONT)


def _write_classes(
    draw: ImageDraw.ImageDraw, record: dict, class_names: list[str], y: int, room: int
) -> None:
    """The classes of an image with their numbers of objects, most frequent first, on one line."""
    counts = Counter(a["category_id"] for a in record.get("annotations", []))
    if not counts:
        draw.text((2, y), "no object", "gray", _FONT)
    x = 2.0
    for index, number in counts.most_common():
        text = f" {shortened(class_names[index], room // 2, _FONT)} {number} "
        if x + draw.textlength(text, _FONT) > room - 20:
            draw.text((x, y), "...", "black", _FONT)
            return
        color = color_of(index)
        box = draw.textbbox((x, y), text, _FONT)
        draw.rectangle((box[0], y, box[2], y + _LETTER + 4), fill=color)
        draw.text((x, y), text, readable_on(color), _FONT)
        x = box[2] + 6


def _write_lines(draw: ImageDraw.ImageDraw, text: str) -> None:
    """`text` in red at the top of a cell."""
    for number, line in enumerate(textwrap.wrap(printable(text), _LINE)):
        draw.text((_GAP, _GAP + number * (_LETTER + 4)), line, _RED, _FONT)
