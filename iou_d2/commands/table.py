"""`iou-d2 table`: AP and correlations of finished runs, in Markdown."""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from iou_d2.analysis.comparison import is_number
from iou_d2.commands.finished_runs import read_metrics, read_run_config
from iou_d2.commands.parsers.table import parse_args
from iou_d2.errors import InputError

AP_KEYS = ["AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90"]
CORRELATIONS = ["pearson_cls_score", "pearson_confidence", "pearson_pred_iou"]


def row(run: Path) -> list[str]:
    metrics = {key: value for line in read_metrics(run) for key, value in line.items()}
    missing = [key for key in AP_KEYS if not is_number(metrics.get(f"bbox/{key}"))]
    if missing:
        raise InputError(
            f"{run / 'metrics.json'} holds no bbox/{missing[0]}: has the run been evaluated?"
        )
    values = [f"{metrics[f'bbox/{key}']:.1f}" for key in AP_KEYS]
    for key in CORRELATIONS:
        value = metrics.get(f"localization/{key}")
        values.append(f"{value:.3f}" if is_number(value) else "-")
    return [run.resolve().name, str(read_run_config(run).SEED), *values]


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    names = ["r class score", "r confidence", "r predicted IoU"]
    headers = ["run", "seed", *AP_KEYS, *names]
    print(tabulate([row(run) for run in args.runs], headers, "github", disable_numparse=True))
