"""Draw GIoU against IoU for random pairs of boxes: figure 2 of arXiv 1902.09630.

    python tools/plot_iou_giou.py docs/iou_giou.png

The corners of both boxes are uniform in a square, so that about 44 in 100 pairs overlap. GIoU is at
most the IoU, the nearer to it the larger the IoU is; pairs that do not overlap, whose IoU is 0, it
tells apart down to -1. A JSON beside the picture has the numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from iou_d2.analysis.curves import binned_mean, correlation
from iou_d2.ops.box_losses import box_iou_loss
from iou_d2.ops.boxes import aligned_iou

SIDE = 1000.0  # of the square in pixels
BINS = np.linspace(0, 1, 11)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) XYXY in float64, each of two uniform corners."""
    corners = SIDE * torch.rand(count, 2, 2, generator=generator, dtype=torch.float64)
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)


def similarities(pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """IoU and GIoU of so many random pairs: (pairs,) each."""
    generator = torch.Generator().manual_seed(seed)
    boxes, others = random_boxes(pairs, generator), random_boxes(pairs, generator)
    return aligned_iou(boxes, others).numpy(), (1 - box_iou_loss(boxes, others, "giou")).numpy()


def summarize(iou: np.ndarray, giou: np.ndarray) -> dict:
    """What the JSON says: Pearson's r and Spearman's rho, and how far GIoU lies below the IoU."""
    overlap = iou > 0
    numbers = {"pairs": len(iou), "overlapping": int(overlap.sum())}
    subsets = {"all": iou >= 0, "overlapping": overlap, "iou_over_0.5": iou > 0.5}
    for name, chosen in subsets.items():
        r, rho = correlation(iou[chosen], giou[chosen])
        numbers[f"correlation_{name}"] = {"pearson": round(r, 4), "spearman": round(rho, 4)}
    apart = giou[~overlap]
    limits = (apart.min(), apart.max()) if len(apart) else ()
    numbers["giou_without_overlap"] = [round(float(x), 4) for x in limits]
    gap = binned_mean(iou[overlap], (iou - giou)[overlap], BINS)
    numbers["mean_iou_minus_giou"] = {
        f"{low:.1f} to {high:.1f}": None if np.isnan(value) else round(float(value), 4)
        for low, high, value in zip(BINS, BINS[1:], gap)
    }
    return numbers


def draw(iou: np.ndarray, giou: np.ndarray, numbers: dict) -> Figure:
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes, overlap = figure.subplots(), iou > 0
    for name, chosen, colour in (
        ("they overlap", overlap, "tab:blue"),
        ("they do not", ~overlap, "tab:red"),
    ):
        axes.scatter(iou[chosen], giou[chosen], s=3, alpha=0.3, linewidths=0, color=colour)
        axes.scatter([], [], s=12, color=colour, label=f"{name}: {chosen.sum()}")
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="GIoU = IoU")
    r, rho = numbers["correlation_overlapping"].values()
    axes.set_title(f"{len(iou)} pairs; where they overlap r = {r}, rho = {rho}", fontsize=8)
    axes.set(xlabel="IoU", ylabel="GIoU", xlim=(-0.02, 1.02), ylim=(-1.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="FILE.png")
    parser.add_argument("--pairs", type=int, default=10_000, help="as many as in the paper")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs is at least 2, but it is {args.pairs}.")
    iou, giou = similarities(args.pairs, args.seed)
    numbers = {"seed": args.seed, **summarize(iou, giou)}
    figure = draw(iou, giou, numbers)
    FigureCanvasAgg(figure)
    figure.savefig(args.output, dpi=100)
    args.output.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
