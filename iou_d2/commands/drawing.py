"""Boxes with labels in pictures. Needs no torch.

Boxes are (R, 4) XYXY in pixels of the picture; images are (H, W, 3) uint8 BGR, as OpenCV has them.
Colours are RGB, as Pillow has them.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

READABLE_SIDE = 800  # pixels; smaller images are enlarged, or their labels would hide the objects
_LETTERS = 50  # heights of letters that the shorter side of a picture has room for
_SMALLEST_FONT = 12  # pixels
_GOLDEN = 0.618034  # multiples of it, modulo 1, are spread evenly however many there are
Color = tuple[int, int, int]


def detection_label(name: str, score: float, pred_iou: float | None = None) -> str:
    """Such as "star 0.93", or "star 0.93 IoU 0.88" where the detector predicts the IoU."""
    label = f"{name} {score:.2f}"
    return label if pred_iou is None else f"{label} IoU {pred_iou:.2f}"


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, classes: Sequence[int], labels: Sequence[str]
) -> np.ndarray:
    """A copy of `image`, enlarged to READABLE_SIDE where it is smaller, with the boxes drawn, the
    first on top.

    A class has the same colour in every picture. No boxes give the picture alone.
    """
    height, width = image.shape[:2]
    scale = max(1.0, READABLE_SIDE / max(height, width))
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
    if scale > 1:
        sides = max(1, round(width * scale)), max(1, round(height * scale))
        picture = picture.resize(sides, Image.Resampling.BILINEAR)
    font = font_of(max(_SMALLEST_FONT, min(picture.size) // _LETTERS))
    draw = ImageDraw.Draw(picture)
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    corners = np.clip(corners, -9, max(picture.size) + 9)  # sides far outside would take long
    drawn = list(zip(corners.tolist(), map(color_of, classes), labels))[::-1]
    for box, color, _ in drawn:
        draw_box(draw, box, color)
    for (x, y, _, _), color, label in drawn:
        if label:
            write_label(draw, x, y, label, color, picture.width, font)
    return np.asarray(picture)[:, :, ::-1]


def draw_box(draw: ImageDraw.ImageDraw, box: Sequence[float], color: Color) -> None:
    """The outline of a box, two pixels wide and inside it; a box without pixels is a dot."""
    x0, y0, x1, y1 = box
    draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color, width=2)


def write_label(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    color: Color,
    room: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    """A label above the box whose corner is (x, y), or inside where there is no room.

    `room`: the width of the picture; a longer label loses its middle."""
    text = shortened(text, room // 2, font)
    x = max(0.0, min(x, room - 4 - draw.textlength(text, font)))
    y = y - font.size - 4 if y > font.size + 4 else y
    left, top, right, bottom = draw.textbbox((x + 2, y), text, font)
    draw.rectangle((left - 2, top - 1, right + 1, bottom + 1), fill=color)
    draw.text((x + 2, y), text, readable_on(color), font)


def shortened(text: str, room: int, font: ImageFont.FreeTypeFont) -> str:
    """`text` on one line, without its middle where it is wider than `room` pixels."""
    text = printable(text)
    if font.getlength(text) <= room:
        return text
    kept = len(text)
    while kept > 2 and font.getlength(f"{text[: kept // 2]}...{text[-(kept // 2) :]}") > room:
        kept -= 1
    return f"{text[: kept // 2]}...{text[-(kept // 2) :]}"


def printable(text: str) -> str:
    """Pillow draws no line breaks in labels, and fails at names of files that are no UTF-8."""
    return "".join(character if character.isprintable() else " " for character in text)


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """`size`: height of the letters in pixels."""
    file = font_manager.findfont("DejaVu Sans")
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def color_of(index: int) -> Color:
    """The colour of a class: neighbours differ in hue, and every other one is darker."""
    hue = (0.1 + index * _GOLDEN) % 1
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.9, 1 - index % 2 * 0.3))


def readable_on(color: Color) -> str:
    return "black" if np.dot(color, (0.299, 0.587, 0.114)) > 140 else "white"
