"""`iou-d2 compare`: curves of finished runs on the same test set."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from tabulate import tabulate

from iou_d2.analysis import metric_by_iteration, recall_by_false_positives
from iou_d2.analysis.comparison import is_iteration, is_number, same_truth
from iou_d2.analysis.plots import plot_curves
from iou_d2.analysis.reading import read_ground_truth, read_results, require_annotations
from iou_d2.commands.finished_runs import (
    file_of,
    logged_ap,
    read_metrics,
    read_run_config,
    trained_config,
)
from iou_d2.commands.output import make_folder
from iou_d2.commands.parsers.compare import parse_args
from iou_d2.commands.run_data import use_test_set
from iou_d2.commands.trained import load_trained
from iou_d2.data.coco_values import short
from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.errors import InputError
from iou_d2.evaluation import build_evaluator, coco_precision, summarize_ap
from iou_d2.evaluation.coco import file_stem, restrict_to_known

RESULTS = "coco_instances_results.json"
FALSE_POSITIVES = (10, 30, 100, 300, 1000)


def setup(run: Path) -> CfgNode:
    """The config of a run, with its first test set registered."""
    return with_test_set(trained_config(run), run)


def with_test_set(cfg: CfgNode, run: Path) -> CfgNode:
    if not cfg.DATASETS.TEST:
        raise InputError(f"The config of {run} has no DATASETS.TEST.")
    cfg.DATASETS.TEST = (use_test_set(cfg, run / "datasets"),)
    return cfg


def read_truth(cfg: CfgNode) -> dict:
    path = getattr(MetadataCatalog.get(cfg.DATASETS.TEST[0]), "json_file", None)
    if path is None:
        raise InputError(f"The test set {cfg.DATASETS.TEST[0]} has no COCO JSON.")
    truth = read_ground_truth(path)
    require_annotations(path, truth)
    return restrict_to_known(truth, cfg.DATASETS.TEST[0])


def average_precision(truth: dict, results: list[dict]) -> float:
    return summarize_ap(coco_precision(truth, results), [])["AP"]


def detect_at_side(
    cfg: CfgNode, truth: dict, side: int, folder: Path, trust: bool = False
) -> list[dict]:
    """The detections with the shorter side of the images resized to `side`, kept in `folder`."""
    if "square" in cfg.INPUT.AUGMENTATIONS:
        raise InputError(
            'INPUT.AUGMENTATIONS has "square", so there are no other sides than '
            f"INPUT.SQUARE_SIZE {cfg.INPUT.SQUARE_SIZE}."
        )
    cfg = cfg.clone()
    cfg.INPUT.MIN_SIZE_TEST = side
    cfg.INPUT.MAX_SIZE_TEST = 100 * side  # keeps the aspect ratio of any image
    cfg.TEST.AUG.ENABLED = False
    path, settings = folder / RESULTS, folder / "config.yaml"
    if not _is_up_to_date(path, settings, cfg):
        name = cfg.DATASETS.TEST[0]
        model = load_trained(cfg, trust)
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        loader = build_detection_test_loader(cfg, name, mapper=mapper)
        inference_on_dataset(model, loader, build_evaluator(cfg, name, str(folder)))
        settings.write_text(cfg.dump())
    return read_results(path, truth)


def _is_up_to_date(results: Path, settings: Path, cfg: CfgNode) -> bool:
    """Whether `results` are those of the weights and the settings of `cfg`."""
    if not (results.is_file() and settings.is_file() and settings.read_text() == cfg.dump()):
        return False
    return results.stat().st_mtime >= Path(cfg.MODEL.WEIGHTS).stat().st_mtime


def recall_curves(runs: dict[str, Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name; warns of runs on another test set than the first one's."""
    curves, of_first = {}, None
    for name, run in runs.items():
        truth, results = truth_and_results(run)
        curves[name] = recall_by_false_positives(truth, results)
        of_first = of_first or truth
        if not same_truth(of_first, truth):
            logging.getLogger(__name__).warning(
                f"{run} is not on the same images and objects as the first run: their curves do "
                "not compare."
            )
    return curves


def truth_and_results(run: Path) -> tuple[dict, list[dict]]:
    """Of the first test set of a run."""
    cfg = read_run_config(run)
    several = len(cfg.DATASETS.TEST) > 1
    cfg = with_test_set(cfg, run)
    folder = f"inference/{file_stem(cfg.DATASETS.TEST[0])}" if several else "inference"
    results = file_of(run, f"{folder}/{RESULTS}")
    truth = read_truth(cfg)
    return truth, read_results(results, truth)


def iteration_curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """AP on the first test set."""
    cfg = read_run_config(run)
    metric, lines = logged_ap(cfg), read_metrics(run)
    for line in lines:
        if not (is_iteration(line.get("iteration", 0)) and is_number(line.get(metric, 0))):
            raise InputError(
                f"{run / 'metrics.json'} has a line whose iteration is no whole number, or whose "
                f"{metric} is no number: {short(line)}."
            )
    return metric_by_iteration(lines, metric, cfg.SOLVER.MAX_ITER)


def side_curve(run: Path, sides: list[int], trust: bool = False) -> tuple[np.ndarray, np.ndarray]:
    cfg = setup(run)
    truth = read_truth(cfg)
    values = [
        average_precision(truth, detect_at_side(cfg, truth, side, run / "sides" / str(side), trust))
        for side in sides
    ]
    return np.array(sides), np.array(values)


def print_table(header: str, curves: dict, at: list[int]) -> None:
    """The curves at or, where they have no point there, before each value of `at`."""
    rows = []
    for name, (x, y) in curves.items():
        index = np.searchsorted(x, at, side="right") - 1
        rows.append([name, *(f"{y[i]:.3g}" if i >= 0 else "-" for i in index)])
    print(tabulate(rows, [header, *map(str, at)], "github", disable_numparse=True), end="\n\n")


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    make_folder(args.output)
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]

    curves = recall_curves(dict(zip(names, args.runs)))
    plot_curves(
        curves,
        args.output / "recall_by_false_positives.png",
        x_label="false positives",
        y_label="recall at IoU 0.5",
        x_scale="symlog",
    )
    print_table("recall at false positives", curves, FALSE_POSITIVES)

    curves = dict(zip(names, map(iteration_curve, args.runs)))
    plot_curves(
        curves,
        args.output / "ap_by_iteration.png",
        x_label="iteration",
        y_label="AP (%)",
        marker="o",
    )
    print_table("AP at iteration", curves, sorted({i for x, _ in curves.values() for i in x}))

    if args.sides:
        sides = sorted(args.sides)
        curves = {
            name: side_curve(run, sides, args.trust_weights) for name, run in zip(names, args.runs)
        }
        plot_curves(
            curves,
            args.output / "ap_by_side.png",
            x_label="shorter side of the test images, pixels",
            y_label="AP (%)",
            marker="o",
        )
        print_table("AP at side", curves, sides)
