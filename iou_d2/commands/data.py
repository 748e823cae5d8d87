"""`iou-d2 data check`: tells what is in datasets before one trains on them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from iou_d2.commands import data_report
from iou_d2.commands.contact_sheet import draw_sheet
from iou_d2.commands.output import make_folder
from iou_d2.commands.parsers.data import parse_args
from iou_d2.data.classes import OWN, classes_of, require_objects
from iou_d2.data.cleaning import Findings, Trust
from iou_d2.data.images import check_images, read_header
from iou_d2.data.register import register_dataset
from iou_d2.data.shapes import ensure_shapes
from iou_d2.data.statistics import Objects, collect
from iou_d2.errors import InputError, MissingFileError
from iou_d2.evaluation.coco import file_stem


@dataclass(frozen=True)
class DataSet:
    """A registered dataset with what is in it."""

    name: str  # as the user wrote it
    registered: str
    dicts: list[dict]  # Detectron2's, each with its width and height
    classes: list[str]
    findings: Findings
    has_annotations: bool  # False for a test set that gives none on purpose

    @cached_property
    def objects(self) -> Objects:
        return collect(self.dicts)


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    trust = Trust(boxes=args.trust_boxes, paths=args.trust_paths)
    if not check(args.names, args.output, args.config, trust):
        sys.exit(1)


def check(names: list[str], output: Path, configs: list[str] | None, trust: Trust) -> bool:
    """Print all about the datasets `names`; whether none of them is refused.

    Raises InputError where `output` cannot be written or one of `configs` cannot be read.
    """
    make_folder(output)
    configs_read = data_report.read_configs(configs)
    sets: dict[str, DataSet] = {}
    refused = []
    for name in dict.fromkeys(names):
        print(f"\n== {name}")
        try:
            found = load(name, output / "datasets", trust)
        except InputError as error:
            print(_refusal(error))
            refused.append(name)
            continue
        if found.registered in sets:
            print(f"It is the same as {sets[found.registered].name}.")
            continue
        sets[found.registered] = found
        faults = faults_of(found, output / "datasets")
        refused += [name] if faults else []
        print(data_report.describe(found, [_refusal(fault) for fault in faults]))
    for text in data_report.together(list(sets.values()), configs_read):
        print(text)
    if sets:
        pictures = draw_sheet({name: found.dicts for name, found in sets.items()}, output)
        print(f"\nImages with their boxes: {pictures}")
    print(f"\nRefused: {', '.join(refused)}." if refused else "\nNothing is refused.")
    return not refused


def load(name: str, clean_dir: Path, trust: Trust) -> DataSet:
    """Register and read the dataset `name`. Raises InputError where it cannot be used at all."""
    with _silent(logging.getLogger("iou_d2.data")):  # the report tells what was mended
        registered = register_dataset(name, clean_dir, trust)
    ensure_shapes(registered)
    dicts = _read(registered)
    for record in dicts:  # readers of other projects may leave the size out
        if "width" not in record or "height" not in record:
            header = read_header(record["file_name"])
            record["width"], record["height"] = header.width, header.height
    metadata = MetadataCatalog.get(registered)
    return DataSet(
        name=name,
        registered=registered,
        dicts=dicts,
        classes=classes_of(registered),
        findings=metadata.get("findings") or Findings(),
        has_annotations=metadata.get("has_annotations", True),
    )


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Let `logger` say nothing below an error meanwhile."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read(name: str) -> list[dict]:
    try:
        return DatasetCatalog.get(name)
    except InputError:
        raise
    except FileNotFoundError as error:  # from here on by Detectron2's readers of its own datasets
        raise MissingFileError(f"The dataset {name} is not there: {error}.") from error
    except (AssertionError, ImportError) as error:
        if name.startswith(OWN):
            raise
        raise InputError(f"The dataset {name} cannot be read: {error}.") from error


def faults_of(found: DataSet, clean_dir: Path) -> list[InputError]:
    """What would end training or evaluation on a dataset that can be read."""
    cache = clean_dir / f"{file_stem(found.registered)}.images_checked"
    faults = []
    try:
        check_images(found.dicts, cache, found.name)
    except InputError as error:
        faults.append(error)
    if found.has_annotations and not len(found.objects.boxes):
        try:
            require_objects([found.registered])
        except InputError as error:
            faults.append(error)
    return faults


def _refusal(error: InputError) -> str:
    text = f"Refused: {error}"
    for key in ("BOXES", "PATHS"):
        if f"DATASETS.TRUST_{key}" in text:
            text += f" Here that is --trust-{key.lower()}."
    return text
