"""Evaluate a trained detector: `iou-d2 train --eval-only`. Or one that was exported.

    iou-d2 eval --config output/x/config.yaml --test coco:val.json \\
        MODEL.WEIGHTS output/x/model_final.pth
    iou-d2 eval --model model.onnx --test coco:val.json OUTPUT_DIR output/x
"""

from __future__ import annotations

import argparse
import logging
import sys

import tqdm
from detectron2.data import DatasetCatalog
from detectron2.evaluation import print_csv_format
from detectron2.utils.logger import setup_logger

from iou_d2.commands.arguments import add_config_arguments, config_of
from iou_d2.commands.exported import ExportedPredictor
from iou_d2.commands.pictures import read_picture
from iou_d2.commands.run_data import Start, use_datasets
from iou_d2.commands.train import log_results
from iou_d2.commands.train import main as train
from iou_d2.errors import InputError
from iou_d2.evaluation.build import build_evaluator


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.split("=")[0] == "--model" for argument in argv):
        return evaluate_exported(argv)
    return train(["--eval-only", *argv])


def evaluate_exported(argv: list[str]) -> dict[str, dict]:
    """Evaluate the file --model on DATASETS.TEST: the results of each dataset, by name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="FILE", help="of `iou-d2 export`")
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    if args.config_file:
        raise InputError("--model knows how it was trained: leave --config out.")
    predictor = ExportedPredictor(args.model)
    cfg = config_of(args)
    setup_logger(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, name="iou_d2")
    use_datasets(cfg, Start(args.model, predictor.class_names), eval_only=True, resume=False)
    cfg.freeze()
    results = {}
    for name in cfg.DATASETS.TEST:
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        for record in tqdm.tqdm(DatasetCatalog.get(name)):
            evaluator.process([record], [predictor(read_picture(record["file_name"]))])
        results[name] = evaluator.evaluate()
        logging.getLogger("iou_d2").info(f"Evaluation results for {name}:")
        print_csv_format(results[name])
    log_results(cfg, results[name] if len(results) == 1 else results)
    return results


if __name__ == "__main__":
    main()
