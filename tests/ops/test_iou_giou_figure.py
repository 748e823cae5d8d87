"""tools/plot_iou_giou.py: its numbers are those of a loop, and hold what GIoU's paper proves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from box_losses_by_hand import loss_of_pair


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "plot_iou_giou.py"
    spec = importlib.util.spec_from_file_location("plot_iou_giou", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_similarities_equal_a_loop(tool):
    iou, giou = tool.similarities(200, 3)
    generator = torch.Generator().manual_seed(3)
    boxes, others = (tool.random_boxes(200, generator).tolist() for _ in range(2))
    for name, found in (("iou", iou), ("giou", giou)):
        expected = [1 - loss_of_pair(a, b, name) for a, b in zip(boxes, others)]
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert (giou <= iou + 1e-9).all() and (giou > -1).all()


def test_the_picture_and_its_numbers(tool, tmp_path):
    path = tmp_path / "figure.png"
    tool.main([str(path), "--pairs", "300"])
    assert path.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(path.with_suffix(".json").read_text())
    iou, giou = tool.similarities(300, 0)
    assert (numbers["pairs"], numbers["overlapping"]) == (300, int((iou > 0).sum()))
    r = np.corrcoef(iou, giou)[0, 1]
    assert numbers["correlation_all"]["pearson"] == pytest.approx(r, abs=1e-4)
    chosen = (iou > 0.2) & (iou < 0.3)
    gap = (iou - giou)[chosen].mean()
    assert numbers["mean_iou_minus_giou"]["0.2 to 0.3"] == pytest.approx(gap, abs=1e-4)


def test_too_few_pairs_are_refused(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "figure.png"), "--pairs", "1"])
    assert "at least 2" in capsys.readouterr().err
