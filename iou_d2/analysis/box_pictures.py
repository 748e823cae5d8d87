"""Pictures of boxes on parts of images, written to files: rivals, and paths of boxes.

Boxes are XYXY in pixels of the image, images (H, W, 3) RGB uint8.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .plots import save

TRUTH, SCORE, SIGNAL = "limegreen", "tab:red", "deepskyblue"


class Line(NamedTuple):
    """A box with what its colour means, and what is written of it below the picture."""

    box: Sequence[float]
    name: str
    text: str
    colour: str


class RivalsPanel(NamedTuple):
    image: np.ndarray
    lines: Sequence[Line]


class PathPanel(NamedTuple):
    """The way of a box: (T + 1, 4) boxes, (T + 1,) true and predicted IoUs, and its object (4,)."""

    image: np.ndarray
    boxes: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    object_: np.ndarray
    title: str


def window(boxes: np.ndarray, size: tuple[int, int], margin: float = 0.4) -> tuple[int, ...]:
    """The part (x1, y1, x2, y2) in whole pixels of an image (height, width) around boxes (B, 4): a
    square, as far as the image has room, with `margin` of their longer side around them."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    side = math.ceil(max(*(high - low), 4) * (1 + 2 * margin))
    spans = []
    for centre, room in zip((low + high) / 2, size[::-1]):
        length = min(side, room)
        start = min(max(round(centre - length / 2), 0), room - length)
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def plot_rivals(panels: Sequence[RivalsPanel], path: str | os.PathLike, title: str) -> Figure:
    """Draw the boxes of each panel side by side, and below it what is said of them."""
    figure = Figure(figsize=(max(2.7 * len(panels), 6), 3.7), layout="compressed")
    figure.suptitle(title, fontsize=10)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _show(axes, panel.image, np.array([line.box for line in panel.lines], dtype=np.float64))
        for line in panel.lines:
            _rectangle(axes, line.box, line.colour, dashed=line.colour == TRUTH, label=line.name)
        written = [line for line in panel.lines if line.text]
        axes.set_xlabel("\n" * len(written))  # room for them
        for number, line in enumerate(written):
            style = {"va": "top", "fontsize": 8, "color": line.colour}
            place = {"xycoords": "axes fraction", "textcoords": "offset points"}
            axes.annotate(line.text, (0, 0), xytext=(0, -4 - 12 * number), **place, **style)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), fontsize=9)
    return save(figure, path)


def plot_paths(panels: Sequence[PathPanel], path: str | os.PathLike, title: str) -> Figure:
    """Draw the boxes of each path over its image, red first and yellow last, its object dashed, and
    below them the IoUs against the step."""
    figure = Figure(figsize=(max(3.1 * len(panels), 5), 5.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    rows = figure.subplots(2, len(panels), squeeze=False, height_ratios=[1.6, 1])
    low = min((min(p.true.min(), p.predicted.min()) for p in panels), default=0.5)
    for image, curve, panel in zip(rows[0], rows[1], panels):
        _show(image, panel.image, np.concatenate([panel.boxes, panel.object_[None]]))
        _rectangle(image, panel.object_, TRUTH, dashed=True)
        for box, part in zip(panel.boxes, np.linspace(0, 1, len(panel.boxes))):
            _rectangle(image, box, colormaps["autumn"](part))
        image.set_title(panel.title, fontsize=9)
        steps = np.arange(len(panel.boxes))
        curve.plot(steps, panel.true, marker="o", label="true IoU")
        curve.plot(steps, panel.predicted, marker="s", linestyle="--", label="predicted IoU")
        curve.set(xlabel="step", ylim=(max(low - 0.05, 0), 1.02), xticks=steps)
        curve.grid(alpha=0.3)
    rows[1, 0].set_ylabel("IoU")
    handles = rows[1, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9)
    return save(figure, path)


def _show(axes, image: np.ndarray, boxes: np.ndarray) -> None:
    """The part of the image around the boxes, brightened where it is dark; the axes keep the pixels
    of the whole image."""
    left, top, right, bottom = window(boxes, image.shape[:2])
    part = image[top:bottom, left:right] / max(int(image[top:bottom, left:right].max()), 1)
    axes.imshow(part, extent=(left, right, bottom, top))
    axes.set(xticks=[], yticks=[])


def _rectangle(axes, box: Sequence[float], colour, dashed: bool = False, label="") -> None:
    x1, y1, x2, y2 = box
    style = {"linestyle": (0, (4, 3)), "linewidth": 1.4} if dashed else {"linewidth": 1.8}
    style |= {"fill": False, "edgecolor": colour, "label": label}
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))
