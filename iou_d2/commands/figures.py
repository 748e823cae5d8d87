"""`iou-d2 figures`: what it measures, prints and writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tabulate import tabulate

from iou_d2.analysis.average_precision import IOU_THRESHOLDS
from iou_d2.analysis.plots import plot_bars, plot_curves, plot_panels
from iou_d2.commands.arguments import config_of
from iou_d2.commands.figure_numbers import (
    EDGES,
    refinement_numbers,
    rivals_numbers,
    variant_numbers,
)
from iou_d2.commands.figure_pictures import draw_paths, draw_rivals
from iou_d2.commands.oracle import prepare
from iou_d2.commands.output import make_folder, write_whole
from iou_d2.commands.parsers.figures import parse_args
from iou_d2.engine.figures import VARIANTS, Gathered, gather, source_of
from iou_d2.errors import InputError

# What refinement.png shows, with the names of its panels.
BY_STEP = {
    "AP": "AP (%)",
    "AP90": "AP90 (%)",
    "true_iou": "mean IoU with the object",
    "predicted_iou": "mean predicted IoU",
}


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    cfg = config_of(args)
    output = make_folder(args.output or Path(cfg.OUTPUT_DIR) / "figures")
    name, detector = prepare(cfg, args.trust_weights)
    cfg.freeze()
    source = source_of(cfg, detector, args.steps)
    gathered = gather(cfg, name, detector, source, output, args.images)
    if not any(not x.get("iscrowd", 0) for x in gathered.truth["annotations"]):
        raise InputError(f"'{name}' has no object that boxes could be compared with.")
    limit = max(100, cfg.TEST.DETECTIONS_PER_IMAGE)  # as `iou-d2 eval` counts
    numbers = {
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "dataset": name,
        **measure(gathered, limit, dict(source.left_out)),
    }
    files = draw_curves(numbers, output)
    files += draw_rivals(gathered, numbers, name, output, args.panels)
    files += draw_paths(gathered, numbers, name, output, args.panels)
    write_whole(output / "figures.json", json.dumps(numbers, indent=1) + "\n")
    print(report(numbers))
    print(f"\nFiles in {output}: figures.json, {', '.join(files)}")


def measure(gathered: Gathered, limit: int, left_out: dict[str, str]) -> dict:
    """What figures.json says."""
    images = len(gathered.truth["images"])
    if "iou_nms" not in gathered.variants:
        left_out["iou_nms"] = "no IoU of candidates is predicted"
    rivals = rivals_numbers(gathered.truth, gathered.variants["none"])
    if not rivals["objects"]:
        left_out["rivals"] = "no object has two boxes with an IoU of at least 0.5"
    return {
        "images": images,
        "objects": sum(not x.get("iscrowd", 0) for x in gathered.truth["annotations"]),
        "iou_edges": EDGES.tolist(),
        "iou_thresholds": IOU_THRESHOLDS.tolist(),
        "nms": {
            name: variant_numbers(gathered.truth, rows, limit)
            for name, rows in gathered.variants.items()
        },
        "rivals": rivals,
        "refinement": {
            name: refinement_numbers(gathered.truth, steps, gathered.paths[name], limit)
            for name, steps in gathered.steps.items()
        },
        "left_out": left_out,
    }


def draw_curves(numbers: dict, output: Path) -> list[str]:
    """The figures of numbers alone; their names."""
    nms = {VARIANTS[name]: part for name, part in numbers["nms"].items()}
    bins = [f"{low:.1f} to {high:.1f}" for low, high in zip(EDGES, EDGES[1:])]
    bars = {
        label: {name: part["boxes_by_iou"][k] for name, part in nms.items()}
        for k, label in enumerate(bins)
    }
    plot_bars(
        bars, output / "boxes_by_iou.png", y_label="boxes an image", x_label="IoU with the object"
    )
    plot_curves(
        {name: (IOU_THRESHOLDS, np.array(part["recall"])) for name, part in nms.items()},
        output / "recall_by_iou.png",
        x_label="matching IoU",
        y_label="recall (%)",
        marker="o",
    )
    files = ["boxes_by_iou.png", "recall_by_iou.png"]
    if numbers["refinement"]:
        plot_panels(
            {label: curves_of(numbers, key) for key, label in BY_STEP.items()},
            output / "refinement.png",
            x_label="steps of refinement",
        )
        files.append("refinement.png")
    return files


def curves_of(numbers: dict, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each refinement a number against the step."""
    return {
        name: (np.arange(len(part[key])), np.array(part[key], dtype=float))  # None is NaN
        for name, part in numbers["refinement"].items()
    }


def report(numbers: dict) -> str:
    """The tables, and a sentence for each figure that is left out."""
    metrics = ("AP", "AP50", "AP75", "AP90")
    rows = [
        [VARIANTS[name], part["boxes"], *(part[x] for x in metrics), part["recall"][0]]
        for name, part in numbers["nms"].items()
    ]
    headers = ["NMS", "boxes an image", *metrics, "recall at 0.5"]
    parts = [tabulate(rows, headers, "github", floatfmt=".1f", missingval="-")]
    by_step = numbers["refinement"]
    if by_step:
        steps = range(max(len(part["AP"]) for part in by_step.values()))
        rows = [
            [f"{metric}, {name}", *part[metric]]
            for metric in ("AP", "AP90")
            for name, part in by_step.items()
        ]
        table = tabulate(
            rows, ["steps", *map(str, steps)], "github", floatfmt=".1f", missingval="-"
        )
        parts.append(table)
    left_out = [f"{name} is left out: {why}." for name, why in numbers["left_out"].items()]
    return "\n\n".join([*parts, *left_out])
