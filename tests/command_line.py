"""train_net.py and demo.py as a user runs them, each in its own process, on a few small images."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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


class CommandServer:
    """tests/command_server.py for one environment."""

    def __init__(self, environment: dict):
        self._process = subprocess.Popen(
            [sys.executable, "tests/command_server.py"],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, arguments: list[str]) -> tuple[int, str]:
        """The exit status of a script with its arguments, and what it prints."""
        with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
            request = {"arguments": arguments, "output": output.name}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline()), output.read()


_servers: dict[frozenset, CommandServer] = {}


def run(environment: dict, arguments: list[str], fails: bool = False) -> str:
    """What `python SCRIPT ...` prints; it has to fail exactly where `fails` says so."""
    key = frozenset(environment.items())
    if key not in _servers:
        _servers[key] = CommandServer(environment)
    assert arguments[0] == sys.executable
    status, printed = _servers[key](arguments[1:])
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
