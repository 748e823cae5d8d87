"""Seconds that `iou-d2 report` takes for a set of the size of COCO's val2017, on the boxes of
benchmarks/evaluate_coco.py: 5,000 images, 80 classes, 500,000 detections of each detector.

Prints the seconds for one detector and for two with 1 and with 201 draws of the paired test, and
the size of the page; there are no pictures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

from common import machine, seconds
from evaluate_coco import predictions, write_truth
from iou_d2.evaluation.coco import instances_to_results

DRAWS = (1, 201)


def write_results(truth: Path, path: Path) -> None:
    results = []
    for image, output in predictions(truth):
        found = instances_to_results(output["instances"], image["image_id"])
        results += [{**x, "category_id": x["category_id"] + 1} for x in found]
    path.write_text(json.dumps(results))


def report(truth: Path, results: list[Path], draws: int, page: Path) -> None:
    command = [sys.executable, "-m", "iou_d2", "report", "--gt", str(truth), "--results"]
    names = [f"detector {i}" for i in range(len(results))]
    command += [*map(str, results), "--names", *names, "--draws", str(draws)]
    subprocess.run([*command, "--output", str(page)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        truth, results, page = (Path(folder, x) for x in ("gt.json", "found.json", "page.html"))
        write_truth(truth)
        write_results(truth, results)
        alone = seconds(lambda: report(truth, [results], 1, page))
        size = page.stat().st_size / 1e6
        few, many = (
            seconds(lambda draws=draws: report(truth, [results, results], draws, page))
            for draws in DRAWS
        )
    print(f"{machine()}\n")
    rows = [
        ("one detector", alone),
        (f"two detectors, {DRAWS[0]} draw", few),
        (f"two detectors, {DRAWS[1]} draws", many),
    ]
    print(tabulate(rows, ["report of", "seconds"], "pipe", floatfmt=".2f"))
    print(f"\nThe page of one detector: {size:.1f} MB.")


if __name__ == "__main__":
    main()
