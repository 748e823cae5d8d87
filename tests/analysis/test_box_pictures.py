"""What the pictures of boxes show, and that they are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from iou_d2.analysis.box_pictures import (
    SCORE,
    TRUTH,
    Line,
    PathPanel,
    RivalsPanel,
    plot_paths,
    plot_rivals,
    window,
)
from iou_d2.analysis.plots import plot_panels

IMAGE = np.zeros((60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "box", [[10, 10, 30, 20], [0, 0, 3, 3], [70, 40, 90, 60], [0, 0, 90, 60], [5, 5, 5, 5]]
)
def test_the_window_holds_the_boxes_and_lies_in_the_image(box):
    boxes = np.array([box], dtype=float)
    left, top, right, bottom = window(boxes, (60, 90))
    assert 0 <= left <= box[0] and box[2] <= right <= 90
    assert 0 <= top <= box[1] and box[3] <= bottom <= 60
    room = [right - left, bottom - top]
    side = -(-max(box[2] - box[0], box[3] - box[1], 4) * 9 // 5)  # 1.8 times, upwards
    assert room == [min(side, 90), min(side, 60)]


def test_boxes_and_what_is_said_of_them_are_in_the_picture(tmp_path):
    lines = [
        Line([12, 10, 30, 25], "object", "", TRUTH),
        Line([10, 10, 30, 20], "highest class score", "class score 0.90", SCORE),
    ]
    figure = plot_rivals([RivalsPanel(IMAGE, lines)] * 2, tmp_path / "rivals.png", "two")
    axes = figure.axes[0]
    assert [patch.get_bbox().extents.tolist() for patch in axes.patches] == [x.box for x in lines]
    assert [text.get_text() for text in axes.texts] == ["class score 0.90"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["object", "highest class score"]
    assert (tmp_path / "rivals.png").read_bytes()[:4] == b"\x89PNG"


def test_a_path_has_a_box_and_two_ious_a_step(tmp_path):
    boxes = np.array([[10, 10, 30, 20], [11, 10, 30, 21], [12, 10, 30, 24.0]])
    true, predicted = np.array([0.5, 0.6, 0.8]), np.array([0.7, 0.75, 0.8])
    panel = PathPanel(IMAGE, boxes, true, predicted, np.array([12, 10, 30, 25.0]), "gain")
    figure = plot_paths([panel], tmp_path / "paths.png", "one")
    image, curve = figure.axes
    assert len(image.patches) == 4 and image.get_title() == "gain"
    for line, values in zip(curve.lines, (true, predicted)):
        assert line.get_xdata().tolist() == [0, 1, 2]
        assert line.get_ydata().tolist() == values.tolist()


def test_panels_of_curves(tmp_path):
    curve = (np.arange(3), np.array([1.0, np.nan, 2.0]))
    panels = {"AP": {"ascent": curve, "regression": curve}, "AP90": {"ascent": curve}, "IoU": {}}
    figure = plot_panels(panels, tmp_path / "panels.png", x_label="steps")
    assert [axes.get_ylabel() for axes in figure.axes] == ["AP", "AP90", "IoU", ""]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 0, 0]
