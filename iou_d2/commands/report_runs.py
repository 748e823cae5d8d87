"""Finished runs, and those that were cut off, as subjects of a report. Whatever a run does not hold
becomes a note on the page."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from iou_d2 import get_config
from iou_d2.analysis import metric_by_iteration
from iou_d2.analysis.comparison import is_iteration, is_number
from iou_d2.analysis.reading import read_ground_truth, read_results, require_annotations
from iou_d2.commands.finished_runs import logged_ap, read_metrics
from iou_d2.commands.run_data import use_test_set
from iou_d2.data.coco_values import short
from iou_d2.data.json_file import parse_json
from iou_d2.errors import InputError, MissingFileError
from iou_d2.evaluation.coco import file_stem, restrict_to_known
from iou_d2.report import Curve, Expected, Subject

_PARTS = ("run.json", "evaluation.json", "config.yaml", "metrics.json", "inference")
_RESULTS = "coco_instances_results.json"
_LARGEST_NUMBER_OF_LOSSES = 12
_NONE = type(None)
# What a run writes into its record under keys that the page reads; each may be null too.
_KINDS = {
    "train": list,
    "test": list,
    "overrides": list,
    "devices": list,
    "versions": dict,
    "results": dict,
}
# Of Detectron2's inference_on_dataset: "(0.196431 s / img per device, on 1 devices)".
_INFERENCE = re.compile(r"inference pure compute time: .*\(([\d.e-]+) s / (\w+) per device")


def subject_of_run(run: Path, name: str, command: str) -> Subject:
    """What the folder `run` holds.

    Args:
        name: of the subject. command: that wrote the report.

    Raises:
        MissingFileError: there is no such folder.
        InputError: the folder holds nothing of a run.
    """
    if not run.is_dir():
        raise MissingFileError(f"There is no folder {run}.")
    if not any((run / part).exists() for part in _PARTS):
        raise InputError(f"{run} is no run: it holds none of {', '.join(_PARTS)}.")
    notes: list[str] = []
    record, is_evaluation = _record(run, notes)
    cfg = _config(run, is_evaluation, notes)
    lines = _logged(run, notes)
    test = {} if cfg is None else _or_note(lambda: _test_set(run, cfg, notes), notes, {})
    if record.get("outcome") not in (None, "finished"):
        notes.append(f"The run ended with {record['outcome']}")
    elif record and record.get("outcome") is None:
        notes.append("The run has not ended, or was cut off.")
    return Subject(
        name=name,
        facts=_facts(run, record, cfg),
        recorded=record.get("results") or {},
        expected=_expected(cfg, notes),
        losses=_losses(lines, cfg),
        ap=_curve(lines, "bbox/AP" if cfg is None else logged_ap(cfg), cfg),
        speed=_speed(run, lines, record),
        commands=_commands(run, record, command),
        notes=notes,
        **test,
    )


def _or_note(read, notes: list[str], otherwise):
    """What `read` gives; `otherwise`, and the sentence among the notes, where it cannot."""
    try:
        return read()
    except (InputError, OSError) as error:
        notes.append(str(error))
        return otherwise


def _record(run: Path, notes: list[str]) -> tuple[dict, bool]:
    """The record of the last training or evaluation with results, and whether it is the latter."""
    found = []
    for name in ("run.json", "evaluation.json"):
        if (run / name).is_file():
            record = _or_note(lambda path=run / name: parse_json(path)[0], notes, None)
            if isinstance(record, dict):
                record = _without_odd_values(record, run / name, notes)
                found.append((record, name == "evaluation.json"))
    if not found:
        return {}, False
    return max(found, key=lambda pair: (bool(pair[0].get("results")), str(pair[0].get("start"))))


def _without_odd_values(record: dict, path: Path, notes: list[str]) -> dict:
    """What is as a run writes it; the notes say what is left out."""
    odd = [key for key, kind in _KINDS.items() if not isinstance(record.get(key), (kind, _NONE))]
    notes += [f"{path} has {key} {short(record[key])}, which is left out." for key in odd]
    record = {key: value for key, value in record.items() if key not in odd}
    results = record.get("results") or {}
    odd = [key for key, value in results.items() if not (value is None or is_number(value))]
    notes += [f"{path} has {key} {short(results[key])}, which is no number." for key in odd]
    return {**record, "results": {key: results[key] for key in results if key not in odd}}


def _logged(run: Path, notes: list[str]) -> list[dict]:
    """The lines of metrics.json but for those with numbers that mean nothing."""
    lines = _or_note(lambda: read_metrics(run), notes, [])
    plain = [
        line
        for line in lines
        if is_iteration(line.get("iteration", 0))
        and all(is_number(value) for value in line.values() if type(value) is int)
    ]
    if len(plain) < len(lines):
        notes.append(
            f"{len(lines) - len(plain)} lines of {run / 'metrics.json'} are left out: they have an "
            "iteration that is no whole number, or a number that is too large."
        )
    return plain


def _config(run: Path, is_evaluation: bool, notes: list[str]) -> CfgNode | None:
    file = run / "evaluation_config.yaml"
    if not (is_evaluation and file.is_file()):
        file = run / "config.yaml"
    return _or_note(lambda: get_config(file), notes, None)


def _test_set(run: Path, cfg: CfgNode, notes: list[str]) -> dict:
    """The ground truth, the results and the folder of the images of the first test set."""
    sets = len(cfg.DATASETS.TEST)
    name = use_test_set(cfg, run / "datasets")
    folder = run / "inference"
    if sets > 1:
        notes.append(f"The page is on the first of {sets} test sets, {name}.")
        folder = folder / file_stem(name)
    metadata = MetadataCatalog.get(name)
    file = metadata.get("json_file") or folder / f"{file_stem(name)}_coco_format.json"
    truth = read_ground_truth(file)
    require_annotations(file, truth)
    truth = restrict_to_known(truth, name)
    if not (folder / _RESULTS).is_file():
        raise MissingFileError(f"{folder} holds no {_RESULTS}: the run has not been evaluated.")
    return {
        "truth": truth,
        "results": read_results(folder / _RESULTS, truth),
        "images": Path(metadata.get("image_root") or ""),
        "max_dets": max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
    }


def _facts(run: Path, record: dict, cfg: CfgNode | None) -> dict[str, str]:
    facts = {
        "config": record.get("config"),
        "trained on": ", ".join(map(str, record.get("train") or ())),
        "tested on": ", ".join(map(str, record.get("test") or ())),
        "classes": _class_names(cfg),
        "schedule": cfg
        and f"{cfg.SOLVER.MAX_ITER:,} iterations of {cfg.SOLVER.IMS_PER_BATCH} images",
        "seed": record.get("seed"),
        "devices": ", ".join(map(str, record.get("devices") or ())),
        "versions": ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items()),
        "commit": record.get("commit"),
        "began": record.get("start"),
        "outcome": record.get("outcome"),
        "folder": run,
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def _class_names(cfg: CfgNode | None) -> str:
    names = list(cfg.MODEL.CLASS_NAMES) if cfg else []
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def _expected(cfg: CfgNode | None, notes: list[str]) -> list[Expected]:
    entries = list(cfg.TEST.EXPECTED_RESULTS) if cfg else []
    try:
        return [Expected(str(a), str(b), float(c), float(d)) for a, b, c, d in entries]
    except (TypeError, ValueError):
        notes.append(f"TEST.EXPECTED_RESULTS has an entry that is none: {entries}.")
        return []


def _losses(lines: Sequence[dict], cfg: CfgNode | None) -> dict[str, Curve]:
    logged = dict.fromkeys(key for line in lines for key in line if "loss" in key)
    keys = sorted(logged, key=lambda key: (key != "total_loss", key))[:_LARGEST_NUMBER_OF_LOSSES]
    curves = {key: _curve(lines, key, cfg) for key in [*keys, "lr"]}
    return {key: curve for key, curve in curves.items() if len(curve.values)}


def _curve(lines: Sequence[dict], key: str, cfg: CfgNode | None) -> Curve:
    max_iter = cfg.SOLVER.MAX_ITER if cfg else math.inf
    plain = [
        line for line in lines if is_iteration(line.get("iteration")) and is_number(line.get(key))
    ]
    return Curve(*metric_by_iteration(plain, key, max_iter))


def _speed(run: Path, lines: Sequence[dict], record: dict) -> dict[str, str]:
    speed = {}
    for key, label in (("time", "training"), ("data_time", "of it waiting for data")):
        values = [line[key] for line in lines if is_number(line.get(key))]
        if values:
            speed[label] = f"{median(values):.3g} s an iteration (median)"
    log = run / "log.txt"
    found = _INFERENCE.findall(log.read_text("utf-8", "replace")) if log.is_file() else []
    if found:
        seconds, what = found[-1]
        unit = {"img": "image", "iter": "iteration"}.get(what, what)
        speed["inference"] = f"{float(seconds):.3g} s an {unit}"
    if is_number(record.get("seconds")):
        speed["all of it"] = f"{record['seconds']:,.0f} s"
    return speed


def _commands(run: Path, record: dict, command: str) -> list[str]:
    commands = []
    if record.get("config"):
        is_evaluation = not (run / "run.json").is_file()
        line = ["iou-d2", "eval" if is_evaluation else "train", "--config", record["config"]]
        for option, key in (("--train", "train"), ("--test", "test")):
            if record.get(key):
                line += [option, *record[key]]
        commands.append(shlex.join(map(str, [*line, *(record.get("overrides") or ())])))
    if (run / "model_final.pth").is_file():
        weights = str(run / "model_final.pth")
        config = str(run / "config.yaml")
        commands.append(
            shlex.join(["iou-d2", "eval", "--config", config, "MODEL.WEIGHTS", weights])
        )
    return [*commands, command]
