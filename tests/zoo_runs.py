"""A plan of a few runs, and what a finished training leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

PLAN = """
sets:
  cells:
    train: "coco:DATA/a.json"
    test: "coco:DATA/b.json"
    overrides: {TEST.DETECTIONS_PER_IMAGE: "7"}
  shapes:
tables:
  losses:
    title: "Losses"
    sets: [cells, shapes]
    seeds: [1, 2]
    overrides: {SOLVER.MAX_ITER: "3"}
    rows:
      plain: {name: "Plain", config: quick/vfnet_shapes}
      other: {name: "Other", config: quick/vfnet_shapes, overrides: {SOLVER.MAX_ITER: "4"}}
"""

# A branch that is trained from a detector, and an evaluation of it.
CHAIN = """
  chain:
    title: "Chain"
    sets: [cells]
    seeds: [1, 2]
    metrics: [AP, AP75]
    baseline: detector
    rows:
      detector: {name: "Detector", config: quick/faster_rcnn_shapes}
      branch: {name: "Branch", config: quick/iou_net_standalone_shapes, starts_from: detector}
      soft: {name: "Soft", evaluates: branch, overrides: {MODEL.IOU_NET.NMS: soft_linear}}
"""


def finished(folder: Path, run, ap: float = 40.0, **changes) -> Path:
    """A folder as training leaves it."""
    words = ["OUTPUT_DIR", "/somewhere", "SEED", str(run.seed), "MODEL.DEVICE", "cpu"]
    words += ["MODEL.WEIGHTS", "/somewhere/model_final.pth"] if run.base else []
    words += [word for pair in run.overrides.items() for word in pair]
    metrics = {"AP": ap, "AP50": ap + 30, "AP75": ap - 5, "AP90": None}
    record = {
        "config": run.config or "/somewhere/config.yaml",
        "overrides": words,
        "train": ["/somewhere/a.json"],
        "seed": run.seed,
        "devices": ["cpu, 1 thread"],
        "versions": {"torch": "2.11.0+cpu"},
        "commit": "abc",
        "start": "2026-01-01",
        "seconds": 90.0,
        "outcome": "finished",
        "results": {
            **{f"bbox/{name}": value for name, value in metrics.items()},
            "localization/pearson_confidence": 0.51234567,
        },
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = "evaluation.json" if run.is_evaluation else "run.json"
    (folder / name).write_text(json.dumps(record))
    return folder
