"""Files of detections beside their ground truth, as analyze and refine read them."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np

from iou_d2.analysis.average_precision import coco_precision
from iou_d2.analysis.reading import read_ground_truth, read_results, require_annotations
from iou_d2.commands.analyze import records_of
from iou_d2.errors import InputError

from .coco import valid_json
from .judge import READ, Surface, Try, refused, require, require_nothing_ran
from .mutate import edit_bytes, edit_tree, to_json

NAMES = ("instances.json", "results.json")


def prepare(folder: Path) -> tuple[dict, list]:
    truth = valid_json(["a.png", "b.png", "c.png"])
    results = [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": [x + 0.5 for x in annotation["bbox"]],
            "score": 0.9 - 0.1 * index,
            "pred_iou": 0.5,
        }
        for index, annotation in enumerate(truth["annotations"])
    ]
    return truth, results


def make(prepared: tuple[dict, list], one: Try) -> Path:
    plan = one.plan
    attacked = plan.special % 4 > 0  # the results more often than the truth
    for name, tree in zip(NAMES, prepared):
        data = json.dumps(tree).encode()
        if attacked == (name == NAMES[1]):
            edited = plan.of_values
            data = edit_bytes(data, plan.edits) if not edited else None
            data = data or to_json(edit_tree(copy.deepcopy(tree), plan.edits))
        (one.folder / name).write_bytes(data)
    return one.folder


def judge(folder: Path) -> str:
    truth_file, results_file = (folder / name for name in NAMES)
    try:
        truth = read_ground_truth(truth_file)
        require_annotations(truth_file, truth)
        results = read_results(results_file, truth)
        args = argparse.Namespace(gt=str(truth_file), results=str(results_file))
        records = records_of(args, truth, results)
    except InputError as error:
        require_nothing_ran()
        return refused(error, *NAMES)
    require(len(records) == len(results), "detections were lost")
    require(bool(np.isfinite(records.boxes).all()), "a box is not finite")
    require(bool(np.isfinite(records.score).all()), "a score is not finite")
    iou = records.true_iou
    require(bool(((iou >= 0) & (iou <= 1)).all()), "a true IoU is outside of [0, 1]")
    precision = np.asarray(coco_precision(truth, results))
    require(bool((precision <= 1 + 1e-9).all()), "a precision is over 1")
    return READ


SURFACES = {
    "results": Surface(
        "results",
        "detections and ground truth as analyze and refine read them: finite, IoU in [0, 1]",
        tries=2500,
        prepare=prepare,
        make=make,
        judge=judge,
    )
}
