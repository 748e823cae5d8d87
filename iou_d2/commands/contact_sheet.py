"""Twenty images of datasets with their boxes, in one picture."""

from __future__ import annotations

import os
import random
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from iou_d2.commands.pictures import read_picture, write_picture
from iou_d2.errors import InputError

COLUMNS, ROWS = 5, 4
# Pixels. Everything is drawn at the size that it has in the sheet.
_CELL, _CAPTION, _GAP = 480, 44, 8
_FONT, _LINE = 15, 50  # height of letters in pixels, letters of a line
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
    draw.text((2, drawn.height + 2), _shortened(title, room), color, _font())
    _write_classes(draw, record, class_names, drawn.height + _CAPTION // 2 + 2, room)
    return cell


def _draw_objects(picture: Image.Image, record: dict, class_names: list[str], scale: float) -> None:
    """Boxes where the annotations have them, also in an image of another size than they say."""
    draw = ImageDraw.Draw(picture)
    annotations = record.get("annotations", [])
    labelled = len(class_names) > 1 and len(annotations) <= _LABELLED
    for annotation in annotations[:_DRAWN]:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        x0, y0, x1, y1 = (float(value) * scale for value in box)
        color = _color(annotation["category_id"])
        x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=2)
        if labelled or annotation.get("iscrowd"):
            crowd = " (crowd)" if annotation.get("iscrowd") else ""
            label = class_names[annotation["category_id"]] + crowd
            _write_label(draw, x0, y0, label, color, picture.width)


def _write_label(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    color: tuple[int, int, int],
    room: int,
) -> None:
    """A label above the box whose corner is (x, y), or inside where there is no room."""
    text = _shortened(text, room // 2)
    x = max(0.0, min(x, room - 4 - draw.textlength(text, _font())))
    y = y - _FONT - 4 if y > _FONT + 4 else y
    left, top, right, bottom = draw.textbbox((x + 2, y), text, _font())
    draw.rectangle((left - 2, top - 1, right + 1, bottom + 1), fill=color)
    draw.text((x + 2, y), text, _readable_on(color), _font())


def _write_classes(
    draw: ImageDraw.ImageDraw, record: dict, class_names: list[str], y: int, room: int
) -> None:
    """The classes of an image with their numbers of objects, most frequent first, on one line."""
    counts = Counter(a["category_id"] for a in record.get("annotations", []))
    if not counts:
        draw.text((2, y), "no object", "gray", _font())
    x = 2.0
    for index, number in counts.most_common():
        text = f" {_shortened(class_names[index], room // 2)} {number} "
        if x + draw.textlength(text, _font()) > room - 20:
            draw.text((x, y), "...", "black", _font())
            return
        color = _color(index)
        box = draw.textbbox((x, y), text, _font())
        draw.rectangle((box[0], y, box[2], y + _FONT + 4), fill=color)
        draw.text((x, y), text, _readable_on(color), _font())
        x = box[2] + 6


def _write_lines(draw: ImageDraw.ImageDraw, text: str) -> None:
    """`text` in red at the top of a cell."""
    for number, line in enumerate(textwrap.wrap(_printable(text), _LINE)):
        draw.text((_GAP, _GAP + number * (_FONT + 4)), line, _RED, _font())


def _shortened(text: str, room: int) -> str:
    """`text` on one line, without its middle where it is wider than `room` pixels."""
    text = _printable(text)
    if _font().getlength(text) <= room:
        return text
    kept = len(text)
    while kept > 2 and _font().getlength(f"{text[: kept // 2]}...{text[-(kept // 2) :]}") > room:
        kept -= 1
    return f"{text[: kept // 2]}...{text[-(kept // 2) :]}"


def _printable(text: str) -> str:
    """Pillow draws no line breaks in labels, and fails at names of files that are no UTF-8."""
    return "".join(character if character.isprintable() else " " for character in text)


@cache
def _font() -> ImageFont.FreeTypeFont:
    file = font_manager.findfont("DejaVu Sans")
    return ImageFont.truetype(file, _FONT, layout_engine=ImageFont.Layout.BASIC)


def _color(index: int) -> tuple[int, int, int]:
    palette = colormap(rgb=True)
    return tuple(int(value) for value in palette[index % len(palette)])


def _readable_on(color: tuple[int, int, int]) -> str:
    return "black" if np.dot(color, (0.299, 0.587, 0.114)) > 140 else "white"
