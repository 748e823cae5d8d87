"""AP of a detector under each oracle: Detectron2's evaluation loop, once over the data for all."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.data.mapper import truth_mapper
from iou_d2.detectors.dense import rescale_detections
from iou_d2.evaluation.build import build_evaluator

from .editors import Editor, Foreground
from .oracles import Oracle, parts_of

NOTHING = "nothing"


class Row(NamedTuple):
    """One row of the table."""

    name: str  # of what is overwritten: NOTHING, or names of ORACLES joined by "+"
    with_quality: bool  # whether the predicted quality counts, too
    oracles: Sequence[Oracle]

    @property
    def folder(self) -> str:
        """Where its detections are written."""
        return f"{self.name}_with_quality" if self.with_quality else self.name


class Plan(NamedTuple):
    """What is to be measured."""

    rows: list[Row]
    left_out: dict[str, str]  # name of an oracle -> why it has no meaning for the detector


def plan(editor: Editor, names: Sequence[str]) -> Plan:
    """The rows of the oracles `names`, after those of no oracle.

    A detector that predicts a quality has two of each, without it and with it. Raises InputError
    for an unknown name.
    """
    rows, left_out = [], {}
    for name in (NOTHING, *dict.fromkeys(names)):
        oracles = [] if name == NOTHING else parts_of(name)
        reasons = [reason for oracle in oracles if (reason := oracle.why_not(editor))]
        if reasons:
            left_out[name] = reasons[0]
            continue
        if not any(oracle.is_quality for oracle in oracles):
            rows.append(Row(name, False, oracles))
        if editor.has_quality or any(oracle.is_quality for oracle in oracles):
            rows.append(Row(name, True, oracles))
    return Plan(rows, left_out)


class OracleModel(nn.Module):
    """A detector whose images come with their ground truth, and that detects once for each row.

    Its output is {folder of a row: {"instances": ...}} for each image.
    """

    def __init__(self, detector: nn.Module, editor: Editor, rows: Sequence[Row]):
        super().__init__()
        self.detector = detector
        self.editor = editor
        self.rows = rows

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict[str, dict]]:
        images = self.editor.preprocess(batched_inputs)
        predictions = self.editor.predict(images)
        truth = [truth_of(x, size) for x, size in zip(batched_inputs, images.image_sizes)]
        truth = [x.to(images.tensor.device) for x in truth]
        foreground = self.editor.foreground(predictions, images.image_sizes, truth)
        outputs: list[dict[str, dict]] = [{} for _ in batched_inputs]
        for row in self.rows:
            edited = self.overwritten(predictions, foreground, row)
            detections = self.editor.detect(edited, images.image_sizes)
            for output, found in zip(outputs, rescale_detections(detections, batched_inputs)):
                output[row.folder] = found
        return outputs

    def overwritten(self, predictions: Any, foreground: Foreground, row: Row) -> Any:
        """The predictions of a row."""
        for oracle in row.oracles:
            predictions = oracle.replace(self.editor, predictions, foreground)
        return predictions if row.with_quality else self.editor.without_quality(predictions)


def truth_of(image: dict, size: tuple[int, int]) -> Instances:
    """The objects of an image (height, width) at the size of the network input; none where it has
    no annotations."""
    if "instances" in image:
        return image["instances"]
    none = Instances(size)
    none.gt_boxes = Boxes(torch.zeros(0, 4))
    none.gt_classes = torch.zeros(0, dtype=torch.int64)
    return none


class RowEvaluators(DatasetEvaluator):
    """One evaluator for each row."""

    def __init__(self, evaluators: dict[str, DatasetEvaluator]):
        self.evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self.evaluators.values():
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict[str, dict]]) -> None:
        for name, evaluator in self.evaluators.items():
            evaluator.process(inputs, [output[name] for output in outputs])

    def evaluate(self) -> dict[str, dict]:
        return {name: evaluator.evaluate() for name, evaluator in self.evaluators.items()}


def measure(
    cfg: CfgNode,
    dataset: str,
    detector: nn.Module,
    editor: Editor,
    rows: Sequence[Row],
    output: str | os.PathLike,
) -> list[dict]:
    """The box AP of each row on a registered dataset: {"replaced", "with_quality", "bbox"}, where
    "bbox" are the metrics in percent and what is not defined is None.

    `output` gets a folder for each row, with its detections.
    """
    folders = [row.folder for row in rows]
    evaluators = {x: build_evaluator(cfg, dataset, os.path.join(output, x)) for x in folders}
    loader = build_detection_test_loader(cfg, dataset, mapper=truth_mapper(cfg))
    model = OracleModel(detector, editor, rows)
    results = inference_on_dataset(model, loader, RowEvaluators(evaluators))
    return [
        {
            "replaced": row.name,
            "with_quality": row.with_quality,
            "bbox": {key: _defined(x) for key, x in results[row.folder]["bbox"].items()},
        }
        for row in rows
    ]


def _defined(value: float | Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None
