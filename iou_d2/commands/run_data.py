"""The datasets of a run: registered, checked, and of one mind about the classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from iou_d2.config import set_class_names
from iou_d2.data.classes import (
    OWN,
    classes_of,
    match_classes,
    require_objects,
    training_classes,
)
from iou_d2.data.cleaning import Trust
from iou_d2.data.coco_records import records_of
from iou_d2.data.images import check_images
from iou_d2.data.register import register_dataset
from iou_d2.data.shapes import ensure_shapes
from iou_d2.engine.annotation_checks import check_key_points, check_masks
from iou_d2.engine.proposals import check_proposals
from iou_d2.errors import InputError
from iou_d2.evaluation.coco import file_stem


class Start(NamedTuple):
    """What a run begins with."""

    weights: str  # a file or an address; empty for none
    class_names: list[str]  # of the classes that it knows; empty where it does not say


def use_datasets(cfg: CfgNode, start: Start, eval_only: bool, resume: bool) -> None:
    """Register and check the datasets of `cfg`, give them all the same classes in the same order,
    and store these.

    `resume`: whether `start` is a checkpoint that the run goes on from.

    Raises InputError where the data, or they and the classes in `start`, do not go together.
    """
    clean_dir = os.path.join(cfg.OUTPUT_DIR, "datasets")
    trust = trust_of(cfg)
    cfg.DATASETS.TEST = tuple(register_dataset(n, clean_dir, trust) for n in cfg.DATASETS.TEST)
    used = cfg.DATASETS.TEST
    if not eval_only:
        train = tuple(register_dataset(n, clean_dir, trust) for n in cfg.DATASETS.TRAIN)
        cfg.DATASETS.TRAIN = train
        used = tuple(dict.fromkeys(train + used))
    elif not used:
        raise InputError("DATASETS.TEST is empty: name the data to evaluate on with --test.")
    classes, known_by = classes_of_run(cfg, start, eval_only, resume)
    for name in used:
        match_classes(name, classes, known_by, leave_out=cfg.DATASETS.TRUST_CLASSES)
    set_class_names(cfg, classes)
    for name in used:
        ensure_shapes(name)
    require_measurable(cfg, eval_only)
    if not eval_only:
        check_key_points(cfg)
    check_own_data(cfg, used, clean_dir, eval_only)
    check_proposals(cfg, ["TEST"] if eval_only else ["TRAIN", "TEST"])


def trust_of(cfg: CfgNode) -> Trust:
    return Trust(boxes=cfg.DATASETS.TRUST_BOXES, paths=cfg.DATASETS.TRUST_PATHS)


def use_test_set(cfg: CfgNode, clean_dir: str | os.PathLike) -> str:
    """Register the first of DATASETS.TEST for a trained model, and return its name.

    Its classes are matched with MODEL.CLASS_NAMES, where `cfg` has them, whatever an earlier call
    matched them with. Raises InputError where there is no test set, or one of other classes.
    """
    if not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty: there are no images to measure on.")
    name = cfg.DATASETS.TEST[0]
    if name.startswith(OWN) and name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    name = register_dataset(name, clean_dir, trust_of(cfg))
    classes = list(cfg.MODEL.CLASS_NAMES)
    if classes:
        leave_out = cfg.DATASETS.TRUST_CLASSES
        match_classes(name, classes, "MODEL.CLASS_NAMES", leave_out=leave_out)
    return name


def require_measurable(cfg: CfgNode, eval_only: bool = False) -> None:
    """Raise an InputError where TEST.EXPECTED_RESULTS, or SOLVER.PATIENCE of a training, wait for
    the AP of a set that gives none."""
    first = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST and not eval_only else None
    if (
        first
        and cfg.SOLVER.PATIENCE
        and not MetadataCatalog.get(first).get("has_annotations", True)
    ):
        raise InputError(
            f"SOLVER.PATIENCE waits for a better AP on '{first}', which has no annotations: set it "
            "to 0."
        )
    for name in cfg.DATASETS.TEST:
        if cfg.TEST.EXPECTED_RESULTS and not MetadataCatalog.get(name).get("has_annotations", True):
            raise InputError(
                f"TEST.EXPECTED_RESULTS cannot be held against '{name}', which has no annotations: "
                "set it to []."
            )


def classes_of_run(
    cfg: CfgNode, start: Start, eval_only: bool, resume: bool
) -> tuple[list[str], str]:
    """The classes of the model, in the order of its outputs, and what says so.

    A checkpoint decides where it is evaluated or resumed, and the order where training begins with
    one of the same classes. Otherwise the training data do.
    """
    weights, known = start
    if eval_only:
        if known:
            return known, weights
        if cfg.MODEL.CLASS_NAMES:
            return list(cfg.MODEL.CLASS_NAMES), "MODEL.CLASS_NAMES"
        return classes_of(cfg.DATASETS.TEST[0]), cfg.DATASETS.TEST[0]
    join, tests = cfg.DATASETS.TRUST_CLASSES, cfg.DATASETS.TEST
    classes = training_classes(cfg.DATASETS.TRAIN, join, tests)
    if sorted(known) == sorted(classes):
        return known, weights
    if known and resume:
        raise InputError(
            f"{weights} cannot be resumed: it has the classes {', '.join(known)}, but "
            f"DATASETS.TRAIN has {', '.join(classes)}."
        )
    return classes, "DATASETS.TRAIN"


def check_own_data(cfg: CfgNode, names: Sequence[str], clean_dir: str, eval_only: bool) -> None:
    """Find before the run what would end it: no object to learn, images that cannot be used, masks
    that are not there. Looks at a user's own datasets, and lets one process do it."""
    if not comm.is_main_process():
        return
    own = [name for name in names if name.startswith(OWN)]
    if not eval_only and set(cfg.DATASETS.TRAIN) <= set(own):
        require_objects(cfg.DATASETS.TRAIN)
    if not eval_only:
        check_masks(cfg, [name for name in own if name in cfg.DATASETS.TRAIN])
    for name in own:
        cache = Path(clean_dir) / f"{file_stem(name)}.images_checked"
        check_images(records_of(name), cache, name)
