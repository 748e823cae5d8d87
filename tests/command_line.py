"""train_net.py and demo.py as a user runs them, each in its own process, on a few small images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONFIG = "configs/quick/iou_retinanet_shapes.yaml"
TINY = (
    *("DATASETS.TRAIN", "('shapes_train_12x64',)", "DATASETS.TEST", "('shapes_val_6x64',)"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2"),
    *("SOLVER.BASE_LR", "0.01", "TEST.EXPECTED_RESULTS", "[]"),
)


def command(*arguments: str, script: str = "train_net.py", config: str = CONFIG) -> list[str]:
    return [sys.executable, script, "--config-file", config, *arguments]


def run(environment: dict, arguments: list[str], fails: bool = False) -> str:
    """What a command prints; it has to fail exactly where `fails` says so."""
    done = subprocess.run(
        arguments,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=280,
    )
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


def metrics_of(folder: Path) -> dict:
    """The last value of each metric."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}
