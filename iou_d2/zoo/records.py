"""Records of finished runs: what run.json says of one, without what only its machine knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iou_d2.data.cleaning import write_text
from iou_d2.data.json_file import parse_json
from iou_d2.errors import InputError, MissingFileError

from .plan import MODEL, Plan, Run

# Of run.json. Paths of the machine stand in its overrides and sets, which the plan has.
KEPT = ("devices", "versions", "commit", "start", "seconds", "results")
# What a record is made from.
NEEDED = {*KEPT, "config", "seed", "overrides", "outcome"}
# Keys that say where and on what a run runs, but not what it computes.
ASIDE = {"OUTPUT_DIR", "SEED", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS"}
# What a training and an evaluation say of themselves, in the folder that they leave.
FILE, FILE_OF_EVALUATION = "run.json", "evaluation.json"


def path_of(plan: Plan, run: Run) -> Path:
    """The record of a run, or of one that may stand for it; where there is none, its place to come.
    `plan.records` goes before the folder of the plan."""
    folders = (plan.records, plan.path.parent)
    paths = [folder / f"{name}.json" for name in plan.alike(run) for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def kept(plan: Plan, run: Run) -> dict | None:
    """The record of a run; None where there is none yet.

    Raises InputError: the file is damaged, or is of other settings than the plan's.
    """
    path = path_of(plan, run)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["results"]["bbox/AP"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a run: {error!r}.") from error
    for key, value in run.settings.items():
        if record.get(key) != value:
            raise InputError(
                f"{path} has {key} {record.get(key)}, but the plan has {value}: delete the record "
                "to train anew."
            )
    return record


def trained_in(plan: Plan, run: Run, output: Path) -> Path | None:
    """The folder of a run's model, or of one that may stand for it; None where there is none.

    Args:
        output: of the folders of runs, each under its name.
    """
    folders = [output / name for name in plan.alike(run)]
    return next((folder for folder in folders if (folder / MODEL).is_file()), None)


def keep(plan: Plan, run: Run, folder: Path) -> Path:
    """Keep the record of `run`, which left `folder`, in `plan.records`.

    Raises:
        MissingFileError: `folder` holds no run.json, or no evaluation.json of an evaluation.
        InputError: the file is damaged, or the run has not finished or is of other settings than
            the plan's.
    """
    source = _source(run, folder)
    if not source.is_file():
        raise MissingFileError(f"{folder} holds no {source.name}: it is no run.")
    record = _read(source)
    if record["outcome"] != "finished" or not record["results"]:
        raise InputError(f"{source}: the run has not finished ({record['outcome']}).")
    words = record["overrides"]
    aside = ASIDE if run.base is None else ASIDE | {"MODEL.WEIGHTS"}
    settings = {k: v for k, v in zip(words[::2], words[1::2]) if k not in aside}
    wanted = {"config": run.config, "seed": run.seed}
    found = {"config": None if run.is_evaluation else record["config"], "seed": record["seed"]}
    expected = {key: value for key, value in run.overrides.items() if key not in aside}
    if found != wanted or settings != expected:
        raise InputError(
            f"{source} is of {found} with {settings}, but the plan's {run.name} is of {wanted} "
            f"with {expected}."
        )
    chosen = {key: record[key] for key in KEPT}
    # A run that was stopped and resumed took the time of all its parts.
    chosen["seconds"] += sum(part["seconds"] or 0 for part in record.get("earlier", []))
    chosen["results"] = _rounded(chosen["results"])
    path = plan.records / f"{run.name}.json"
    text = json.dumps({**run.settings, **chosen}, indent=1)
    write_text(path, text + "\n")
    return path


def agrees(plan: Plan, run: Run, folder: Path) -> bool:
    """Whether `folder` holds the run that the record of `run` is of, by its results; also where
    there is no record, but not where what the folder says of itself is damaged."""
    record = kept(plan, run)
    if record is None:
        return True
    try:
        return _rounded(_read(_source(run, folder))["results"]) == record["results"]
    except InputError:
        return False


def recorded_in(plan: Plan, run: Run, output: Path) -> Path | None:
    """The folder of the run that the record of `run` is of, its own or that of one that may stand
    for it; None where there is none.

    Args:
        output: of the folders of runs, each under its name.
    """
    folders = [output / name for name in plan.alike(run)]
    return next((folder for folder in folders if agrees(plan, run, folder)), None)


def _source(run: Run, folder: Path) -> Path:
    """What a run says of itself."""
    return folder / (FILE_OF_EVALUATION if run.is_evaluation else FILE)


def _read(source: Path) -> dict:
    """What a run says of itself, with all that is taken from it.

    Raises InputError: the file is not there, or is damaged.
    """
    record, _ = parse_json(source)
    if not _is_whole(record):
        raise InputError(f"{source} is no record of a run, or a damaged one: train anew.")
    return record


def _is_whole(record: Any) -> bool:
    if not isinstance(record, dict) or not NEEDED <= record.keys():
        return False
    results = {} if record["results"] is None else record["results"]
    if not (isinstance(results, dict) and isinstance(record["overrides"], list)):
        return False
    numbers = (record["seconds"], *results.values())
    return all(x is None or isinstance(x, (int, float)) for x in numbers)


def _rounded(results: dict[str, float | None] | None) -> dict[str, float | None] | None:
    if results is None:
        return None
    return {name: None if x is None else round(x, 4) for name, x in results.items()}
