"""`iou-d2 calibrate`: learns what predicted IoUs are worth, and writes it beside the weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import nn

from iou_d2.analysis.calibration import Reliability, reliability
from iou_d2.analysis.isotonic import fit_knots
from iou_d2.analysis.plots import plot_curves
from iou_d2.commands.arguments import config_of
from iou_d2.commands.finished_runs import file_of
from iou_d2.commands.oracle import prepare
from iou_d2.commands.output import check_output_file, write_whole
from iou_d2.commands.parsers.calibrate import parse_args
from iou_d2.data.mapper import truth_mapper
from iou_d2.engine.checkpoint import split_weights
from iou_d2.engine.config_checks import require_predicted_ious
from iou_d2.engine.safe_load import local_file
from iou_d2.errors import InputError
from iou_d2.evaluation.judged import Judged, JudgedDetections
from iou_d2.ops.calibration import PiecewiseLinear

MIN_DETECTIONS = 100


def read_config(args: argparse.Namespace) -> CfgNode:
    if args.run is not None:
        args.config_file = str(file_of(args.run, "config.yaml"))
        weights = str(file_of(args.run, "model_final.pth"))
        args.more_opts = ["MODEL.WEIGHTS", weights, *args.more_opts]
    cfg = config_of(args)
    if cfg.MODEL.CALIBRATION:
        raise InputError(
            f"MODEL.CALIBRATION is {cfg.MODEL.CALIBRATION}: what is calibrated already is not "
            "calibrated again. Set it to ''."
        )
    require_predicted_ious(cfg, "A calibration")
    return cfg


def place_of(args: argparse.Namespace, cfg: CfgNode) -> Path:
    """The file to write, whose folder is there. Raises InputError where it cannot be written."""
    weights = local_file(split_weights(cfg.MODEL.WEIGHTS)[0])
    path = Path(args.output or Path(weights).with_suffix(".calibration.json"))
    check_output_file(path)
    return path


def detections_of(cfg: CfgNode, name: str, model: nn.Module) -> Judged:
    """What the model detects in a registered dataset."""
    setup_logger(name="detectron2.evaluation.evaluator")  # how far it is
    loader = build_detection_test_loader(cfg, name, mapper=truth_mapper(cfg))
    return inference_on_dataset(model, loader, JudgedDetections())


def split(judged: Judged, share: float) -> tuple[Judged, Judged]:
    """Detections of `share` of the images, drawn at random, to fit on, and those of the others.

    Raises InputError where one of the two has hardly any.
    """
    count = int(judged.image.max(initial=-1)) + 1
    chosen = np.random.default_rng(0).permutation(count)[: round(share * count)]
    fitted = np.isin(judged.image, chosen)
    parts = judged.part(fitted), judged.part(~fitted)
    if min(len(part.true) for part in parts) < MIN_DETECTIONS:
        raise InputError(
            f"There are {len(parts[0].true)} detections to fit on and {len(parts[1].true)} to "
            f"judge by, but {MIN_DETECTIONS} of each are needed: give more images, or a lower "
            "score threshold."
        )
    return parts


def diagrams(judged: Judged, knots: PiecewiseLinear) -> dict[str, Reliability]:
    """How far each score is from the true IoU, by name."""
    scores = {
        "confidence": judged.confidence,
        "predicted IoU": judged.predicted,
        "calibrated IoU": knots(torch.from_numpy(judged.predicted)).numpy(),
    }
    return {name: reliability(values, judged.true) for name, values in scores.items()}


def report(fitted: dict[str, Reliability], judged: dict[str, Reliability]) -> str:
    rows = []
    for part, diagram_of in (("fit", fitted), ("held out", judged)):
        for name, x in diagram_of.items():
            count = x.count.sum()
            means = [np.nansum(x.count * values) / count for values in (x.claimed, x.true)]
            rows.append([name, part, count, *(f"{value:.3f}" for value in (*means, x.error))])
    headers = ["score", "images", "detections", "mean", "mean true IoU", "calibration error"]
    return tabulate(rows, headers, "pipe", disable_numparse=True)


def draw(judged: dict[str, Reliability], path: Path) -> Path:
    """The reliability diagram beside the file `path`."""
    picture = path.with_suffix(".png")
    curves = {name: (x.claimed, x.true) for name, x in judged.items()}
    plot_curves(curves, picture, x_label="score", y_label="mean true IoU", marker="o")
    return picture


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    name, model = prepare(cfg, args.trust_weights)
    cfg.freeze()
    path = place_of(args, cfg)
    judged = detections_of(cfg, name, model)
    parts = split(judged.part(judged.true >= args.min_iou), args.share)
    fit = fit_knots(parts[0].predicted, parts[0].true)
    knots = PiecewiseLinear(tuple(fit.claimed.tolist()), tuple(fit.true.tolist()))
    fitted, held_out = (diagrams(part, knots) for part in parts)
    content = {
        "knots": {"predicted": knots.predicted, "true": knots.true},
        "weights": cfg.MODEL.WEIGHTS,
        "dataset": name,
        "min_iou": args.min_iou,
        "detections": {"fit": len(parts[0].true), "held_out": len(parts[1].true)},
        "calibration_error": {key: x.error for key, x in held_out.items()},
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")
    print(report(fitted, held_out))
    print(f"\nFiles: {path}, {draw(held_out, path)}")
