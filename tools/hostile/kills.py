"""Trainings that are killed, that find no room on the disk, or that share a folder."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from iou_d2.commands.main import main as command
from iou_d2.engine.safe_load import read_checkpoint_file

from .coco import valid_json
from .files import write_images
from .judge import READ, Surface, Try, require

SMALL = (
    *("--num-gpus", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "64", "TEST.EVAL_PERIOD", "0", "SEED", "1"),
)
LONGEST = 4.0  # seconds that a whole training takes, about


class Training(NamedTuple):
    data: Path
    folder: Path
    chance: float  # in [0, 1): when it is killed, or how little may be written

    def begin(self, log: str, iterations: int, *more: str, most_bytes: int | None = None) -> int:
        """Start it in a process of its own, which writes to `log`; returns its id."""
        child = os.fork()
        if child:
            return child
        file = os.open(self.folder / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if most_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        status = 1
        try:
            command([*self._arguments(iterations), *more, *self._keys(iterations)])
            status = 0
        except SystemExit as end:
            status = 1 if end.code else 0
            print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _arguments(self, iterations: int) -> list[str]:
        data = f"coco:{self.data / 'instances.json'}"
        return ["train", "--config", "quick/retinanet_own_data", "--train", data, "--test", data]

    def _keys(self, iterations: int) -> list[str]:
        limits = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", "()"]
        return [*SMALL, *limits, "OUTPUT_DIR", str(self.folder / "run")]

    def whole(self, log: str, iterations: int, *more: str, **limits: int) -> tuple[int, str]:
        """Its exit status and what it wrote."""
        status = os.waitpid(self.begin(log, iterations, *more, **limits), 0)[1]
        text = (self.folder / log).read_text(errors="replace")
        return os.waitstatus_to_exitcode(status), text


def prepare(folder: Path) -> Path:
    names = write_images(folder / "images")
    (folder / "instances.json").write_text(json.dumps(valid_json(names)))
    return folder


def make(prepared: Path, one: Try) -> Training:
    return Training(prepared, one.folder, one.rng.random())


def judge_kill(training: Training) -> str:
    child = training.begin("killed.txt", 12)
    time.sleep(training.chance * LONGEST)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    require_whole(training.folder / "run")
    status, text = training.whole("resumed.txt", 12, "--resume")
    require(status == 0, f"--resume ends with status {status}: {text[-1500:]}")
    require_finished(training.folder / "run")
    return READ


def judge_disk_full(training: Training) -> str:
    status, text = training.whole("first.txt", 4)
    require(status == 0, f"the training ends with status {status}: {text[-1500:]}")
    run = training.folder / "run"
    room = int(training.chance * (run / "model_final.pth").stat().st_size)
    room = max(room, 100_000)  # that logs may still be written
    status, text = training.whole("full.txt", 10, "--resume", most_bytes=room)
    require(status != 0, "a training that cannot save ends as if all were well")
    require("Traceback" not in text, f"no sentence, but a traceback: {text[-1500:]}")
    require_whole(run)
    unfinished = [path.name for path in run.rglob("*") if "unfinished" in path.name]
    require(not unfinished, f"{unfinished} are left behind")
    status, text = training.whole("resumed.txt", 10, "--resume")
    require(status == 0, f"--resume ends with status {status}: {text[-1500:]}")
    require_finished(run)
    return READ


def judge_two_runs(training: Training) -> str:
    first = training.begin("first.txt", 60)
    lock = training.folder / "run" / ".lock"
    limit = time.monotonic() + 30
    while not (lock.exists() and lock.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(training.chance)
    status, text = training.whole("second.txt", 60)
    require(status != 0, "two trainings run in one folder")
    require("Traceback" not in text, f"no sentence, but a traceback: {text[-1500:]}")
    require(str(first) in text, f"the refusal does not name the process {first}: {text[-500:]}")
    status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    require(status == 0, "the first training was disturbed")
    require_finished(training.folder / "run")
    return READ


def require_whole(run: Path) -> None:
    """Every file that a later run would read can be read."""
    if not run.is_dir():
        return
    for path in run.rglob("*.json"):
        if path.name == "metrics.json":  # appended line by line: only its end may be cut off
            for line in path.read_text().split("\n")[:-1]:
                json.loads(line)
        else:
            json.loads(path.read_text())
    for path in run.glob("model_*.pth"):
        read_checkpoint_file(str(path))
    last = run / "last_checkpoint"
    if last.exists():
        require((run / last.read_text()).is_file(), f"last_checkpoint names {last.read_text()!r}")


def require_finished(run: Path) -> None:
    require_whole(run)
    require((run / "model_final.pth").is_file(), "there is no model_final.pth")
    outcome = json.loads((run / "run.json").read_text())["outcome"]
    require(outcome == "finished", f"run.json says {outcome!r}")
    left = [p.name for p in run.rglob("*") if p.suffix in (".tmp", ".unfinished")]
    require(not left, f"{left} are left behind")


def _surface(name: str, what: str, tries: int, judge: Callable[[Any], str]) -> Surface:
    return Surface(name, what, tries, prepare, make, judge, seconds=120.0)


SURFACES = {
    "kill": _surface("kill", "SIGKILL at a random moment, then `--resume`", 50, judge_kill),
    "disk_full": _surface("disk_full", "no room for a checkpoint, `--resume`", 5, judge_disk_full),
    "two_runs": _surface("two_runs", "a second training in the folder", 3, judge_two_runs),
}
