"""Compare a trained detector in PyTorch with the same as a file in ONNX Runtime, on real images.

    python tools/export_check.py --config output/x/config.yaml --test coco:val.json \\
        MODEL.WEIGHTS output/x/model_final.pth

Both detect in each image, from reading it on: the model as Detectron2's predictor does, the file as
iou_d2.runtime does. Prints one row of a table: detections that both have, the largest differences
of their boxes in pixels of the image and of their scores, detections that one alone has, and AP of
both. Ends with status 1 where they do not agree. --model takes a file that was written before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tqdm
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from tabulate import tabulate

from iou_d2.commands.arguments import add_config_arguments, config_of
from iou_d2.commands.exported import ExportedPredictor
from iou_d2.commands.pictures import read_picture
from iou_d2.commands.run_data import Start, use_datasets
from iou_d2.engine.checkpoint import build_predictor
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.agreement import NOTHING, Agreement, agreement, arrays_of
from iou_d2.engine.export.describe import describe
from iou_d2.engine.export.files import InputSpec, write
from iou_d2.engine.export.graph import ImageGraph
from iou_d2.evaluation.build import build_evaluator

HEADERS = (
    *("model", "images", "detections", "boxes, px", "scores"),
    *("missing + more", "AP, PyTorch", "AP, file"),
)


class Comparison(NamedTuple):
    """Of a model and its file."""

    images: int
    found: Agreement
    precision: tuple[float, float]  # AP in percent of the model, and of the file

    def row(self, name: str) -> list[str]:
        found = self.found
        return [
            *(name, str(self.images), str(found.pairs)),
            *(f"{found.boxes:.0e}", f"{found.scores:.0e}", f"{found.missing} + {found.extra}"),
            *(f"{value:.2f}" for value in self.precision),
        ]


def compare_on(
    cfg: CfgNode,
    name: str,
    predictors: tuple[DefaultPredictor, ExportedPredictor],
    graph: ImageGraph,
) -> Comparison:
    """
    Args:
        name: of a registered dataset.
        predictors: the model's and the file's.
        graph: of the model.
    """
    images, found = DatasetCatalog.get(name), NOTHING
    evaluators = [
        build_evaluator(cfg, name, str(Path(cfg.OUTPUT_DIR) / side)) for side in ("model", "file")
    ]
    for evaluator in evaluators:
        evaluator.reset()
    for image in tqdm.tqdm(images):
        picture = read_picture(image["file_name"])
        outputs = [predictor(picture) for predictor in predictors]
        for evaluator, output in zip(evaluators, outputs):
            evaluator.process([image], [output])
        ours, theirs = ([detections_of(output["instances"])] for output in outputs)
        limit = cfg.TEST.DETECTIONS_PER_IMAGE
        found = found.joined(agreement(ours, theirs, limit, graph.score_threshold))
    precision = tuple(evaluator.evaluate()["bbox"]["AP"] for evaluator in evaluators)
    return Comparison(len(images), found, precision)


def detections_of(instances: Instances) -> dict:
    """Without masks, which are drawn at the size of the image: AP counts boxes."""
    found = arrays_of(instances)
    found.pop("masks", None)
    return found


def write_file(cfg: CfgNode, graph: ImageGraph, path: str) -> str:
    description = describe(cfg, graph.detector, "detections", cfg.MODEL.WEIGHTS)
    write("onnx", graph, path, InputSpec(), description)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", metavar="FILE", help="of `iou-d2 export`")
    parser.add_argument("--name", default="", help="of the row; the architecture by default")
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    cfg = config_of(args)
    cfg.MODEL.DEVICE = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        predictor = build_predictor(cfg)
        graph = build_graph(cfg, predictor.model)
        path = args.model or write_file(cfg, graph, str(Path(folder) / "model.onnx"))
        exported = ExportedPredictor(path)
        use_datasets(cfg, Start(path, exported.class_names), eval_only=True, resume=False)
        title = args.name or cfg.MODEL.META_ARCHITECTURE
        compared = [
            compare_on(cfg, name, (predictor, exported), graph) for name in cfg.DATASETS.TEST
        ]
    rows = [comparison.row(title) for comparison in compared]
    print(tabulate(rows, HEADERS, "github", disable_numparse=True))
    if not all(comparison.found.holds(graph.doubtful) for comparison in compared):
        sys.exit(f"{path} and its model do not agree.")


if __name__ == "__main__":
    main()
