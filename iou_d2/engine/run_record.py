"""run.json: what a run was, on what it ran, how long it took and what came of it."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from iou_d2.config_files import config_folder
from iou_d2.data.cleaning import write_text

from .compat import versions


def describe_run(cfg: CfgNode, config_file: str, overrides: Sequence[str]) -> dict:
    """What is known of a run at its start. All processes call it together.

    Returns:
        config: the name of a config that comes with iou_d2, or the path of another one.
        overrides: the KEY VALUE pairs.
        train, test: names of the datasets.
        seed: SEED of the config; negative for one drawn at random.
        test_augmentation: TEST.AUG, which gave the results of tasks that end with "_TTA"; None
            where it is not enabled.
        devices: what each process runs on.
        versions; commit: of the checkout of iou_d2, with "-dirty" where files differ from it; None
            where there is none.
        start: time in UTC. seconds, outcome, results: None until `recorded` knows them.
    """
    return {
        "config": config_name(config_file),
        "overrides": list(overrides),
        "train": list(cfg.DATASETS.TRAIN),
        "test": list(cfg.DATASETS.TEST),
        "seed": cfg.SEED,
        "test_augmentation": dict(cfg.TEST.AUG) if cfg.TEST.AUG.ENABLED else None,
        "devices": comm.gather(device_name(cfg.MODEL.DEVICE)),
        "versions": versions(),
        "commit": commit(),
        "start": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": None,
        "outcome": None,
        "results": None,
    }


@contextlib.contextmanager
def recorded(record: dict, path: Path, keep_earlier: bool = False) -> Iterator[dict]:
    """Write `record` to `path` at once, and completed when the block ends, by whatever.

    The block may put results into record["results"], {task: {metric: value}}. The outcome is
    "finished" or the error. With `keep_earlier` the records of the runs that this one goes on with
    stay in the file, in record["earlier"]. Only the main process writes.
    """
    if keep_earlier:
        record["earlier"] = earlier_records(path)
    start = time.monotonic()
    _write(record, path)
    try:
        yield record
        record["outcome"] = "finished"
    except BaseException as error:
        record["outcome"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        record["seconds"] = round(time.monotonic() - start, 1)
        record["results"] = _plain(record["results"])
        _write(record, path)


def earlier_records(path: Path) -> list[dict]:
    """The records in the file at `path`, oldest first; none where it is not there or is damaged."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(last, dict):
        return []
    earlier = last.pop("earlier", [])
    return [*earlier, last] if isinstance(earlier, list) else [last]


def config_name(config_file: str) -> str:
    path = Path(config_file).resolve()
    folder = config_folder().resolve()
    if folder not in path.parents:
        return config_file
    return path.relative_to(folder).with_suffix("").as_posix()


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' if threads != 1 else ''}"


def commit() -> str | None:
    """The commit of the checkout that iou_d2 is imported from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _plain(results: dict | None) -> dict | None:
    """{"task/metric": value}, with None for NaN, which is no JSON."""
    if not results:
        return None
    return {
        name: value if math.isfinite(value) else None
        for name, value in flatten_results_dict(results).items()
    }


def _write(record: dict, path: Path) -> None:
    if comm.is_main_process():
        write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
