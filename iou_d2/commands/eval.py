"""`iou-d2 eval`: evaluates a trained detector, or one that was exported."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import tqdm
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import print_csv_format, verify_results
from detectron2.utils.logger import setup_logger

from iou_d2.commands import train
from iou_d2.commands.arguments import config_of
from iou_d2.commands.exported import ExportedPredictor
from iou_d2.commands.parsers.eval import parse_args
from iou_d2.commands.pictures import read_picture
from iou_d2.commands.run_data import Start, use_datasets
from iou_d2.engine.lock import locked
from iou_d2.engine.run_record import describe_run, recorded
from iou_d2.errors import InputError
from iou_d2.evaluation.build import build_evaluator


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.model is None:
        train.run(args)
    else:
        evaluate_exported(args)


def evaluate_exported(args: argparse.Namespace) -> None:
    """Evaluate the file --model on DATASETS.TEST, and record it as any other evaluation."""
    predictor = ExportedPredictor(args.model)
    cfg = config_of(args)
    if cfg.TEST.AUG.ENABLED:
        raise InputError(
            "TEST.AUG.ENABLED is True, but an exported model is given each image once: set it to "
            "False."
        )
    with locked(cfg.OUTPUT_DIR):
        for name in ("detectron2", "iou_d2"):
            setup_logger(cfg.OUTPUT_DIR, name=name)
        use_datasets(cfg, Start(args.model, predictor.class_names), eval_only=True, resume=False)
        cfg.freeze()
        record = describe_run(cfg, args.model, [*args.more_opts, *args.opts])
        with recorded(record, Path(cfg.OUTPUT_DIR) / "evaluation.json"):
            results = {name: evaluate_on(cfg, name, predictor) for name in cfg.DATASETS.TEST}
            if len(results) == 1:  # as Detectron2's `DefaultTrainer.test` has it
                results = results[cfg.DATASETS.TEST[0]]
            record["results"] = results
            train.log_results(cfg, results)
            verify_results(cfg, results)


def evaluate_on(cfg: CfgNode, name: str, predictor: ExportedPredictor) -> dict[str, dict]:
    """The results on one dataset, {task: {metric: value}}."""
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for image in tqdm.tqdm(DatasetCatalog.get(name)):
        evaluator.process([image], [predictor(read_picture(image["file_name"]))])
    results = evaluator.evaluate()
    logging.getLogger("iou_d2").info(f"Evaluation results for {name}:")
    print_csv_format(results)
    return results
