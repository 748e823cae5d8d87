"""What moving an RoI does to a pooled value, for each kind of pooling: steps, kinks, or neither.

python tools/pooling_figure.py --png docs/pooling.png --json pooling.json

An RoI over a random map is shifted to the right, or its right edge alone is moved, by four feature
pixels. Each panel shows the value of a bin, of a spatial pyramid that of a bin of each level, and
below its slope. The JSON holds the curves and what was measured on them: the largest step of the
value and of its slope between two positions, on a grid and on one twice as fine. Of a step the
finer grid leaves all, of a smooth curve half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.ops import RoIAlign

from iou_d2.layers import PrRoIPool
from iou_d2.layers.spp import RoIMaxPool, SpatialPyramidPool

BOX = (5.35, 6.2, 11.15, 12.6)  # feature pixels
BINS, BIN = 3, 5  # that of the middle row, at the right
LEVELS, PYRAMID_BINS = (3, 2, 1), [5, 9 + 3, 9 + 4]
TRAVEL, POSITIONS = 4.0, 1024
JUMP = 0.0015  # no slope here makes so large a step of TRAVEL / POSITIONS
KEPT = 0.75  # a finer grid that leaves more of a step than that shows a jump

Pool = Callable[[Tensor, Tensor], Tensor]


def grid(side: int) -> Pool:
    return RoIMaxPool(side, 1.0)


def kinds() -> dict[str, Pool]:
    """Name -> (1, 1, H, W), (R, 5) -> (R, V) of V bins."""

    def one_bin(pool: Pool) -> Pool:
        return lambda features, rois: pool(features, rois)[:, 0].flatten(1)[:, [BIN]]

    def of_pyramid(layer: Callable[[int], Pool]) -> Pool:
        pool = SpatialPyramidPool(LEVELS, layer)
        return lambda features, rois: pool(features, rois)[:, 0, PYRAMID_BINS, 0]

    align = {f"RoIAlign, {n}x{n} samples": RoIAlign(BINS, 1.0, n, aligned=True) for n in (1, 2)}
    align["RoIAlign, adaptive"] = RoIAlign(BINS, 1.0, 0, aligned=True)
    return {
        "RoI pooling (max)": one_bin(grid(BINS)),
        **{name: one_bin(pool) for name, pool in align.items()},
        "PrRoI pooling": one_bin(PrRoIPool(BINS, 1.0, aligned=True)),
        "SPP (max)": of_pyramid(grid),
        "PrRoISPP": of_pyramid(lambda side: PrRoIPool(side, 1.0, aligned=True)),
    }


def random_map() -> Tensor:
    """(1, 1, 20, 24), in float64."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(1, 1, 20, 24, generator=generator, dtype=torch.float64)


def rois_of(motion: str, positions: Tensor) -> Tensor:
    """(R, 5): BOX moved by each of the positions (R,), or its right edge alone."""
    rois = torch.tensor([0.0, *BOX], dtype=torch.float64).repeat(len(positions), 1)
    rois[:, 3] += positions
    if motion == "shift":
        rois[:, 1] += positions
    return rois


def sample(pool: Pool, motion: str, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (R,) and values (R, V) of a walk in steps of one size."""
    x = torch.linspace(0, TRAVEL, positions + 1, dtype=torch.float64)
    with torch.no_grad():
        return x.numpy(), pool(random_map(), rois_of(motion, x)).numpy()


def largest_steps(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of the value, and of its slope, between neighbours."""
    steps = np.diff(y, axis=0)
    slope = steps / np.diff(x)[:, None]
    return float(np.abs(steps).max()), float(np.abs(np.diff(slope, axis=0)).max())


def measure(pool: Pool, motion: str) -> dict:
    """The curve, its largest steps on two grids, and "steps", "kinks" or "smooth"."""
    x, y = sample(pool, motion, POSITIONS)
    coarse, fine = largest_steps(x, y), largest_steps(*sample(pool, motion, 2 * POSITIONS))
    kind = "smooth"
    if fine[1] > KEPT * coarse[1]:
        kind = "kinks"
    if fine[0] > KEPT * coarse[0]:
        kind = "steps"
    return {
        "kind": kind,
        "largest_step_of_value": [coarse[0], fine[0]],
        "largest_step_of_slope": [coarse[1], fine[1]],
        "x": x.round(6).tolist(),
        "y": y.round(6).tolist(),
    }


def draw(curves: dict[str, dict[str, dict]]) -> Figure:
    """Motions in pairs of rows, value over slope; a kind of pooling in each column."""
    names = list(next(iter(curves.values())))
    figure = Figure(figsize=(2.1 * len(names), 7.2), layout="constrained")
    panels = figure.subplots(2 * len(curves), len(names), sharex=True, sharey="row")
    labels = {"shift": "RoI shifted", "edge": "right edge moved"}
    for row, (motion, of_motion) in enumerate(curves.items()):
        for column, (name, curve) in enumerate(of_motion.items()):
            value, slope = panels[2 * row, column], panels[2 * row + 1, column]
            x, y = np.array(curve["x"]), np.array(curve["y"])
            # A step has no slope; a line through it would only show how fine the grid is.
            steps = np.diff(y, axis=0)
            value.plot(x, y, lw=1)
            slope.plot(x[1:], np.where(np.abs(steps) > JUMP, np.nan, steps / x[1]), lw=1)
            value.set_title(f"{name}\n{labels[motion]}: {curve['kind']}", fontsize=7.5)
        panels[2 * row, 0].set_ylabel("value of a bin", fontsize=8)
        panels[2 * row + 1, 0].set_ylabel("its slope", fontsize=8)
    for axes in panels.flat:
        axes.tick_params(labelsize=6)
        axes.grid(alpha=0.3)
    figure.supxlabel("feature pixels", fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """With a palette, so that the file is small enough for a page."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64).save(
        path, optimize=True
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--png", type=Path, help="the figure")
    parser.add_argument("--json", type=Path, help="the curves and what was measured")
    args = parser.parse_args(argv)
    curves = {
        motion: {name: measure(pool, motion) for name, pool in kinds().items()}
        for motion in ("shift", "edge")
    }
    for motion, of_motion in curves.items():
        for name, curve in of_motion.items():
            steps = [curve[f"largest_step_of_{x}"][1] for x in ("value", "slope")]
            print(f"{motion:6} {name:24} {curve['kind']:7} {steps[0]:.4f} {steps[1]:.4f}")
    if args.json:
        args.json.write_text(json.dumps(curves), encoding="utf-8")
    if args.png:
        save(draw(curves), args.png)


if __name__ == "__main__":
    main()
