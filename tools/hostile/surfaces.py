"""All surfaces by name, the longest first. A surface is loaded where it is run."""

from __future__ import annotations

import importlib

from .judge import Surface
from .runner import Count, run

# Name -> module of this package, which has it as SURFACE or in SURFACES.
NAMES = {
    "kill": "kills",
    "rois": "rois",
    "iou": "boxes",
    "box_losses": "boxes",
    "nms": "suppression",
    "assigners": "assigners",
    "jitter_refine": "assigners",
    "configs": "configs",
    "images": "images",
    "detect": "images",
    "coco": "coco",
    "voc": "voc",
    "yolo": "yolo",
    "checkpoints_pth": "checkpoints",
    "checkpoints_pkl": "checkpoints",
    "results": "results",
    "disk_full": "kills",
    "two_runs": "kills",
}


def surface(name: str) -> Surface:
    module = importlib.import_module(f".{NAMES[name]}", __package__)
    return module.SURFACES[name]


def run_part(task: tuple) -> Count:
    """In a process of its own: (name, seed, first, end, folder of failures)."""
    name, *others = task
    return run(surface(name), *others)
