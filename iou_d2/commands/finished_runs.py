"""What training leaves in OUTPUT_DIR, as other commands read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from iou_d2 import get_config
from iou_d2.errors import InputError, MissingFileError


def file_of(run: Path, name: str) -> Path:
    """The file `name` of a run. Raises MissingFileError where the run has none."""
    if not run.is_dir():
        raise MissingFileError(f"There is no folder {run}.")
    if not (run / name).is_file():
        raise MissingFileError(f"{run} holds no {name}: has its training finished?")
    return run / name


def read_run_config(run: Path, overrides: Sequence[str] = ()) -> CfgNode:
    return get_config(file_of(run, "config.yaml"), overrides)


def trained_config(run: Path) -> CfgNode:
    """The config of a run, with its last weights."""
    weights = file_of(run, "model_final.pth")
    return read_run_config(run, ["MODEL.WEIGHTS", str(weights)])


def logged_ap(cfg: CfgNode) -> str:
    """Under what name metrics.json has AP on the first test set: where there are several, that of
    the set comes with it."""
    sets = cfg.DATASETS.TEST
    return f"{sets[0]}/bbox/AP" if len(sets) > 1 else "bbox/AP"


def read_metrics(run: Path) -> list[dict]:
    """The lines of the run's metrics.json, in the order in which they were logged.

    Raises InputError: the file is not there, or one of its lines is no JSON object.
    """
    path = file_of(run, "metrics.json")
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"Line {number} of {path} is no JSON: {error}") from error
        if not isinstance(line, dict):
            raise InputError(f"Line {number} of {path} is no JSON object.")
        lines.append(line)
    return lines
