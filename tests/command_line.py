"""train_net.py and demo.py as a user runs them, each in its own process, on a few small images."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

from forks import FORKS
from iou_d2.engine import launch

CONFIG = "configs/quick/iou_retinanet_shapes.yaml"
TINY = (
    *("DATASETS.TRAIN", "('shapes_train_12x64',)", "DATASETS.TEST", "('shapes_val_6x64',)"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2"),
    *("SOLVER.BASE_LR", "0.01", "TEST.EXPECTED_RESULTS", "[]"),
)


def command(*arguments: str, script: str = "train_net.py", config: str = CONFIG) -> list[str]:
    return [sys.executable, script, "--config-file", config, *arguments]


def start_script(
    environment: dict, arguments: list[str], output: Path, method: str | None = None
) -> BaseProcess:
    """`python SCRIPT ...`, in a fork that has loaded torch and Detectron2; `output` is a file for
    what it prints. `method` is how it starts processes of its own, in place of its own choice:
    "fork" spares them to load all that anew."""
    assert arguments[0] == sys.executable
    process = FORKS.Process(target=_run_script, args=(environment, arguments[1:], output, method))
    process.start()
    return process


def _run_script(environment: dict, arguments: list[str], output: Path, method: str | None) -> None:
    """What the fork does."""
    if method is not None:
        launch._start_method = lambda function: method
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def outcome(environment: dict, arguments: list[str], method: str | None = None) -> tuple[int, str]:
    """The exit status of `python SCRIPT ...`, and what it prints."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        process = start_script(environment, arguments, Path(output.name), method)
        process.join(timeout=280)
        process.kill()  # has no effect where it has ended
        process.join()
        return process.exitcode, output.read()


def run(
    environment: dict, arguments: list[str], fails: bool = False, method: str | None = None
) -> str:
    """What `python SCRIPT ...` prints; it has to fail exactly where `fails` says so. `method`: see
    `start_script`."""
    status, printed = outcome(environment, arguments, method)
    assert (status != 0) == fails, printed[-4000:]
    return printed


def run_alone(environment: dict, arguments: list[str], fails: bool = False) -> str:
    """As `run`, in a process that shares nothing with any other, for any program."""
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
