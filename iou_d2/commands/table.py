"""A table of AP and correlations from the metrics.json of finished runs, in Markdown.

iou-d2 table output/retinanet_shapes output/iou_retinanet_shapes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from tabulate import tabulate

AP_KEYS = ["AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90"]
CORRELATIONS = ["pearson_cls_score", "pearson_confidence", "pearson_pred_iou"]


def read_metrics(run: Path) -> dict[str, float]:
    """The last value of every metric that the run logged."""
    path = run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no metrics.json: has its training finished?")
    metrics = {}
    for line in path.read_text().splitlines():
        metrics.update(json.loads(line))
    if "bbox/AP" not in metrics:
        raise ValueError(f"{path} holds no bbox/AP: has the run been evaluated?")
    return metrics


def row(run: Path) -> list[str]:
    metrics = read_metrics(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    values = [f"{metrics[f'bbox/{key}']:.1f}" for key in AP_KEYS]
    for key in CORRELATIONS:
        value = metrics.get(f"localization/{key}")
        values.append("-" if value is None else f"{value:.3f}")
    return [run.resolve().name, str(config["SEED"]), *values]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    runs = parser.parse_args(argv).runs
    names = ["r class score", "r confidence", "r predicted IoU"]
    headers = ["run", "seed", *AP_KEYS, *names]
    print(tabulate([row(run) for run in runs], headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
