"""`iou-d2 oracle`: the AP of a detector whose boxes, classes or IoUs were true."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import nn

from iou_d2.analysis.plots import plot_bars
from iou_d2.commands.arguments import config_of
from iou_d2.commands.output import make_folder, write_whole
from iou_d2.commands.parsers.oracle import parse_args
from iou_d2.commands.run_data import Start, use_datasets
from iou_d2.commands.trained import fill, names_in, read_weights
from iou_d2.engine.build import build_detector
from iou_d2.engine.config_checks import check_config, check_datasets
from iou_d2.engine.oracle import ORACLES, editor_of
from iou_d2.engine.oracle.evaluation import Plan, measure, plan
from iou_d2.errors import InputError

METRICS = ("AP", "AP50", "AP75", "AP90")
RANKED_BY = {False: "class score", True: "class score and quality"}


def prepare(cfg: CfgNode, trust: bool) -> tuple[str, nn.Module]:
    """The name of the test set, registered for the classes of the weights, and the model with them,
    in test mode.

    Raises InputError: the config, the weights or the data cannot be used, or do not go together.
    """
    check_config(cfg)
    check_datasets(cfg, "DATASETS.TEST")
    if len(cfg.DATASETS.TEST) > 1:
        raise InputError(
            f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} datasets: give one with --test."
        )
    content = read_weights(cfg, trust)
    start = Start(cfg.MODEL.WEIGHTS, names_in(content, cfg.MODEL.WEIGHTS))
    use_datasets(cfg, start, eval_only=True, resume=False)
    (name,) = cfg.DATASETS.TEST
    if not MetadataCatalog.get(name).get("has_annotations", True):
        raise InputError(f"'{name}' has no annotations: there is no truth to compare with.")
    return name, fill(build_detector(cfg).eval(), cfg, content)


def report(rows: list[dict], left_out: dict[str, str]) -> str:
    """The table, and a sentence for each oracle that it lacks."""
    lines = [
        [
            row["replaced"],
            RANKED_BY[row["with_quality"]],
            *("-" if row["bbox"][key] is None else f"{row['bbox'][key]:.1f}" for key in METRICS),
        ]
        for row in rows
    ]
    headers = ["replaced by ground truth", "ranked by", *METRICS]
    table = tabulate(lines, headers, "pipe", disable_numparse=True)
    reasons = [f"{name} has no meaning: {reason}." for name, reason in left_out.items()]
    return "\n".join([table, "", *reasons] if reasons else [table])


def draw(rows: list[dict], title: str, path: Path) -> None:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        ap = row["bbox"]["AP"]
        bars = groups.setdefault(row["replaced"], {})
        bars[RANKED_BY[row["with_quality"]]] = math.nan if ap is None else ap
    plot_bars(groups, path, y_label="AP (%)", title=title)


def write(
    output: Path, cfg: CfgNode, config_file: str, name: str, rows: list[dict], chosen: Plan
) -> None:
    """oracle.json and oracle.png."""
    content = {
        "config": config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "dataset": name,
        "rows": rows,
        "left_out": chosen.left_out,
    }
    write_whole(output / "oracle.json", json.dumps(content, indent=2) + "\n")
    draw(rows, cfg.MODEL.META_ARCHITECTURE, output / "oracle.png")


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    cfg = config_of(args)
    output = make_folder(args.output or Path(cfg.OUTPUT_DIR) / "oracle")
    name, model = prepare(cfg, args.trust_weights)
    cfg.freeze()
    if cfg.MODEL.CALIBRATION:
        raise InputError("A true IoU needs no calibration: leave MODEL.CALIBRATION empty.")
    editor = editor_of(model)
    chosen = plan(editor, args.oracles or list(ORACLES))
    setup_logger(name="detectron2.evaluation.evaluator")  # how far it is
    rows = measure(cfg, name, model, editor, chosen.rows, output)
    print(report(rows, chosen.left_out))
    write(output, cfg, args.config_file, name, rows, chosen)
    print(f"\nFiles: {output / 'oracle.json'}, {output / 'oracle.png'}")
